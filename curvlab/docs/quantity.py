"""A page for every diagnostic, made from the registry, its docstring and what `benchmarks/costs.py` counted."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from ..diagnostics import DIAGNOSTICS
from ..diagnostics.registry import ALIASES, NEEDS, Diagnostic
from ..regularizers import REGULARIZERS
from . import FOLDER
from .docstrings import entries, prose, sections

COUNTED = FOLDER.parents[1] / "benchmarks" / "records" / "costs.json"  # in a checkout
KINDS = {
    "exact": "**exact**: no sampling and no iteration. `error` is 0, and `floor` is the rounding.",
    "bound": "**bound**: the truth is within `error`; for an eigenvalue, *some* eigenvalue is.",
    "sem": "**sem**: `error` is one standard error with `df` degrees of freedom; `interval(0.95)` uses Student's t.",
}
OPTIONS = {  # what an option means wherever the docstring does not say it
    "batch_size": "b, or a sequence of them for a curve over an axis \"batch_size\"; default that of the snapshot.",
    "k": "how many eigenvectors or eigenvalues, the largest first.",
    "tol": "where the search stops: a residual relative to the largest |Ritz value|.",
    "samples": "random batches; default 16 at a single point, 4 in a run.",
    "num_probes": "random vectors, at least 2, of `steps` products each.",
    "steps": "Lanczos steps from each random vector, one product each.",
    "points": "points of the curve.",
    "method": "see the estimators above.",
    "alphas": "places along the step w - α lr g, in steps.",
    "micro_batch_size": "|M|; default that of training.",
    "draws": "how many draws to average, at least 2; by default one, whose value is exact for that draw.",
    "h": "length of the difference step in the penalty's gradient; the value does not depend on it.",
}  # fmt: skip
IN_TRAINING = {  # what has no value at a point that no training has led to, and an optimizer with which it has
    "preconditioned_sharpness": "Adam",
    "secant_sharpness": "SGD",
    "gradient_cosine": "SGD",
    "trajectory_distance": "SGD",
}


def quantity(name: str) -> str:
    """The page of a diagnostic.

    Raises:
        KeyError: there is none of this name.
    """
    entry = DIAGNOSTICS[name]
    said = sections(entry.function)
    out = [f"# {name}", f"`{entry.symbol}`, {entry.formula}", prose(said[""])]
    out += [f"Also called `{alias}`." for alias, own in ALIASES.items() if own == name]
    if f"{name}_penalty" in REGULARIZERS:
        out.append(f"The penalty of this name is `{name}_penalty`.")
    out += ["## Estimator", prose(said["Estimator"])] if "Estimator" in said else []
    out += ["## Error", KINDS[entry.kind], prose(said.get("Error", ""))]
    out += ["## Cost", _cost(entry)]
    out += ["## When it fails", prose(said["Fails"]), *_refusals(name)] if "Fails" in said else []
    out += ["## Needs and options", *_needs(entry), _options(entry)]
    out += [f"- {error}: {why}" for error, why in entries(said.get("Raises", "")).items() if error]
    out += _as_a_penalty(name)
    out += ["## Example", f"```python\n{example(name)}\n```"]
    out += ["## Source", prose(said["Source"])] if "Source" in said else []
    return "\n\n".join(part for part in out if part) + "\n"


def example(name: str) -> str:
    """A few lines that measure a diagnostic on a small problem, and run."""
    entry = DIAGNOSTICS[name]
    trains = "batch_gradient" in entry.needs or "micro_batch_size" in entry.options or name in IN_TRAINING
    lines = [
        "import torch",
        "import curvlab as cl",
        "",
        f"train, {'test' if 'test' in entry.needs else '_'} = cl.problems.digits(64)  # 64 handwritten digits",
        "torch.manual_seed(0)",
        "model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))",
        'L = cl.Objective(model, "cross_entropy", train)',
    ]
    given = {"test": "test=held_out"} if "test" in entry.needs else {}
    lines += ['held_out = cl.Objective(model, "cross_entropy", test)'] if given else []
    if trains:
        given |= {"micro_batch_size": "micro_batch_size=8"} if "micro_batch_size" in entry.options else {}
        optimizer = IN_TRAINING.get(name, "SGD")
        arguments = ", ".join(["L", "optimizer", "batches", "diagnostics=[name]", *given.values()])
        return "\n".join([
            *lines,
            "",
            f'name, batches = "{name}", cl.Batches(L.size, 16, steps=3)',
            f"optimizer = torch.optim.{optimizer}(model.parameters(), lr={0.01 if optimizer == 'Adam' else 0.1})",
            f"for at in cl.train({arguments}):",
            "    print(at.step, at.measurements[name])",
        ])  # fmt: skip
    given |= {"batch_size": "batch_size=8"} if "batch_size" in entry.options else {}
    given |= {"lr": "lr=0.1"} if "lr" in entry.needs else {}
    arguments = ", ".join(["L", f'["{name}"]', *given.values()])
    return "\n".join([*lines, "", f'found = cl.measure({arguments})["{name}"]', "print(found, found.kind)"])


def names() -> list[str]:
    """The diagnostics that belong to the package, in the order of the registry."""
    return [name for name, d in DIAGNOSTICS.items() if d.function.__module__.startswith("curvlab.")]


def rewrite(folder: Path = FOLDER / "quantities") -> list[Path]:
    """Write the pages of all diagnostics of the package, and remove those of others."""
    written = [folder / f"{name}.md" for name in names()]
    for file in written:
        file.write_text(quantity(file.stem), encoding="utf-8")
    for file in set(folder.glob("*.md")) - set(written):
        file.unlink()
    return written


def _cost(entry: Diagnostic) -> str:
    """The words of the registry, and the counts, where there are some that mean something."""
    said = f"{entry.cost[0].upper()}{entry.cost[1:]}."
    record = json.loads(COUNTED.read_text(encoding="utf-8")) if COUNTED.exists() else {"costs": {}}
    counted = record["costs"].get(entry.name)
    if counted is None or IN_TRAINING.get(entry.name) == "Adam":  # the benchmark trains with SGD
        return said
    p = record["problem"]
    where = {"point": "at a point", "step": "at a step of a run, once tracking has settled"}
    if entry.name in IN_TRAINING:
        where.pop("point")
    counts = [
        f"{number(counted[key][0])} + {number(counted[key][1])} {words}" for key, words in where.items() if counted[key]
    ]
    on = f"{p['n']} {p['data']}, {p['model']}, {p['loss'].replace('_', ' ')}, b = {p['b']}"
    return f"{said} Products with H + passes over the data, counted on the demo problem ({on}): {'; '.join(counts)}."


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 or x == int(x) else f"{x:.1f}"


def _needs(entry: Diagnostic) -> list[str]:
    return [f"- needs `{need}`: {NEEDS[need]}" for need in entry.needs]


def _options(entry: Diagnostic) -> str:
    """A table of the options with their defaults."""
    if not entry.options:
        return "" if entry.needs else "None."
    said, defaults = OPTIONS | _described(entry), _defaults(entry)
    rows = [f"| `{o}` | `{defaults[o]!r}` | {said.get(o, '').replace('|', chr(92) + '|')} |" for o in entry.options]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])


def _family(entry: Diagnostic) -> list[Any]:
    """The diagnostic's function, and the one whose options it passes on ("Options as `NAME`")."""
    other = re.search(r"Options as\s+`(\w+)`", entry.function.__doc__ or "")
    return [entry.function, *([DIAGNOSTICS[other[1]].function] if other else [])]


def _described(entry: Diagnostic) -> dict[str, str]:
    return {k: v for f in reversed(_family(entry)) for k, v in entries(sections(f).get("Args", "")).items()}


def _defaults(entry: Diagnostic) -> dict[str, Any]:
    return {k: p.default for f in reversed(_family(entry)) for k, p in inspect.signature(f).parameters.items()}


def _refusals(name: str) -> list[str]:
    """What keeps a penalty from existing."""
    what = {"outputs": "the outputs of the model are unknown", "likelihood": "the loss has no known likelihood"}
    needs = REGULARIZERS[name].needs if name in REGULARIZERS else ""
    return [f"No value where {what[needs]}."] if needs else []


def _as_a_penalty(name: str) -> list[str]:
    """How a diagnostic that is a regularizer is trained."""
    if name not in REGULARIZERS:
        return []
    entry, short = REGULARIZERS[name], name.removesuffix("_penalty")
    said = f'`cl.train(..., penalties=[(0.01, "{short}")])`, or `--penalty {short}=0.01` on the command line'
    own = f"in a loop of one's own `loss + 0.01 * cl.regularizers.{name}(L, None, batch)`"
    drawn = f" Draws {entry.draws} at each evaluation." if entry.draws else ""
    first = " Its gradient asks for no second derivative." if entry.first_order else ""
    return ["## As a penalty", f"{said}; {own}.{drawn}{first}"]
