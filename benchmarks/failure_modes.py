"""What do curvlab and other libraries of the Hessian answer where measuring goes wrong?

Every row of scenarios.py is a situation that a user's model, data or options can be in. Each library is asked the same in a
process of its own, which is ended after `--timeout` seconds, and its answer is one of

    right            the number, within a relative error of 1e-4 for products and 1e-2 for eigenvalues, both of float32
                     models, of a dense float64 reference made without any of the libraries; and where the row is about
                     state, that is as before
    named error      an exception, or a warning beside the number, that names the module, parameter or argument of the row
                     (the pattern `names` of the scenario) and says what to do (an imperative, one of those in FIX); or
                     a number that is flagged as not converged
    error            any other exception, a crash, or no answer in time
    wrong            another number, NaN among them, or state changed, without a word
    not applicable   the library has no such feature

The libraries are used as their documentation shows, with their defaults, on the model as a training loop has it: in training
mode. Which state an answer leaves changed is recorded for every row (`changed`), and counts only where the row is about it.

    python benchmarks/failure_modes.py [--quick] [--rows F1 F77] [--libraries curvlab] [--records FOLDER]
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import common
import record
import torch
from libraries import LIBRARIES, Library, NotApplicable, Values
from scenarios import ROWS, Case, probes
from torch import Tensor, nn

OUTCOMES = ("right", "named error", "error", "wrong", "not applicable")
PRELOADED = (  # by the process that the others are forked from, which does not find the modules of this folder
    "torch._dynamo", "scipy.sparse.linalg", "curvlab.throughput", *(package for package, _ in LIBRARIES.values()),
)  # fmt: skip
QUICK = ("F1", "F8", "F53", "F77")
TOLERANCES = {"product": 1e-4, "eigenvalue": 1e-2, "trace": 0.1}
SEEDS, RIGHT_SEEDS = 20, 18
FIX = re.compile(  # an imperative: where a clause begins, or with a capital letter
    r"(?i:(^|[.;:,(]\s*|\b(or|and|please|either|instead)\s+)(add|call|choose|clean|clone|convert|declare|densify|drop|enable|"
    r"freeze|give|initiali[sz]e|keep|leave|make|measure|move|override|pass|put|register|remove|replace|rewrite|run|set|skip|"
    r"specify|switch|take|train|unwrap|use|wrap|write)\b)|\b(Call|Pass|Set|Use)\b"
)


def main() -> None:
    parser = common.options(__doc__, f"rows {', '.join(QUICK)}", "once")
    parser.add_argument("--rows", nargs="*", help="numbers of rows; default, and without any, all")
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, help="default those that are installed")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that an answer may take")
    chosen = parser.parse_args()
    wanted = (QUICK if chosen.quick else ()) if chosen.rows is None else chosen.rows
    names = [name for name in chosen.libraries or LIBRARIES if common.peer(LIBRARIES[name][0])]
    results = []
    for i, row in enumerate(ROWS):
        if not wanted or row.number in wanted:
            for name in names:
                who = {"row": row.number, "title": row.title, "library": name}
                results.append(who | asked(i, name, chosen.timeout))
                print("{row:6}{title:50.48} {library:20} {outcome:15} {detail:.100}".format(**results[-1]))
    for name in names:
        found = Counter(one["outcome"] for one in results if one["library"] == name)
        print(f"{name:20}", ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES))
    settings = {
        "quick": chosen.quick or bool(wanted) or bool(chosen.libraries), "device": "cpu", "tolerances": TOLERANCES,
        "peers": common.versions(*(LIBRARIES[name][0] for name in names if name != "curvlab")),
    }  # fmt: skip
    file = record.append({"benchmark": "failure_modes", "settings": settings, "results": results}, chosen.records)
    print(f"appended to {file}")


def asked(index: int, library: str, timeout: float) -> dict[str, Any]:
    """The outcome of one row for one library, in a fresh process."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, index, library))
    process.start()
    there.close()
    try:
        if here.poll(timeout):
            found = here.recv()
            if isinstance(found, str):
                raise RuntimeError(f"row {ROWS[index].number}, {ROWS[index].title}: the benchmark is broken\n{found}")
            return found
        process.kill()
        return {"outcome": "error", "detail": f"no answer in {timeout:.0f} s", "changed": []}
    except EOFError:
        return {"outcome": "error", "detail": "the process died", "changed": []}
    finally:
        process.join()


def _answer(pipe: Any, index: int, library: str) -> None:
    torch.set_num_threads(1)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            found: Any = judged(index, library)
    except Exception:  # not of the library: of a scenario or its reference
        found = traceback.format_exc()
    pipe.send(found)


def judged(index: int, library: str) -> dict[str, Any]:
    torch.manual_seed(0)
    random.seed(0)
    case = ROWS[index].make()
    before, said, found = state(case.model), "", None
    with heard() as lines:
        try:
            with case.during():
                made = LIBRARIES[library][1](case.model, case.criterion, case.data)
                case.between()
                found = question(case, made)
        except NotApplicable as why:
            outcome, detail = "not applicable", str(why)
        except Exception as error:  # whatever a library raises
            detail = f"{type(error).__name__}: {error}"
            outcome = "named error" if named(detail, case.names) else "error"
    after = state(case.model)
    changed = [name for name, value in after.items() if value != before[name]]
    if found is not None:
        outcome, detail = verdict(case, found)
        touched = [name for name in case.state if name in changed]
        if outcome == "right" and touched:
            outcome, detail = "wrong", f"{detail}; changed: {', '.join(touched)}"
        said = next((line for line in lines if named(line, case.names)), "")
    if outcome == "wrong" and said:
        outcome, detail = "named error", f"{said} ({detail})"
    return {"outcome": outcome, "detail": shortened(detail), "changed": changed}


def question(case: Case, made: Library) -> Any:
    if case.ask == "product":
        V = probes(sum(p.numel() for p in case.model.parameters() if p.requires_grad))
        return torch.stack([made.product(v).detach() for v in V.T], 1).double()
    if case.ask in ("trace", "one trace"):
        found = [made.trace(seed) for seed in range(1 if case.ask == "one trace" else SEEDS)]
        return found[0] if case.ask == "one trace" else found
    if case.ask == "budget":
        return made.top(1, products=4)
    if case.ask == "smallest":
        return made.smallest()
    return made.top(int(case.ask), start=case.start)


def verdict(case: Case, found: Any) -> tuple[str, str]:
    """A library's number against the references."""
    if case.ask == "budget":
        said = found.converged is not None and not found.converged.any()
        return ("right", "says that it has not converged") if said else ("wrong", "says nothing of convergence")
    if case.ask == "one trace":
        return "right", f"{float(found.values[0]):.4g}"
    if case.ask == "trace":
        return traces(found, float(case.references()[0].trace()))
    references = case.references()
    if not references:
        numbers = found.values if isinstance(found, Values) else found
        return "wrong", "a number where there is none" if bool(torch.isfinite(numbers).all()) else "nan"
    if case.ask == "product":
        V = probes(len(found)).double()
        errors = [float((found - H @ V).norm() / (H @ V).norm().clamp(min=1e-12)) for H in references]
        return within(errors, TOLERANCES["product"])
    off = [differences(case, found, H) for H in references]
    outcome, detail = within([float(one.max()) if len(one) else float("nan") for one in off], TOLERANCES["eigenvalue"])
    flagged = (
        found.converged is not None and not (found.converged[: len(off[0])] & (off[0] > TOLERANCES["eigenvalue"])).any()
    )
    if outcome == "wrong" and flagged:
        outcome, detail = "named error", f"{detail}, flagged as not converged"
    return outcome, f"{', '.join(f'{value:.4g}' for value in found.values[:4].tolist())}: {detail}"


def traces(found: list[Values], true: float) -> tuple[str, str]:
    errors = [abs(float(one.values[0]) - true) for one in found]
    close = sum(
        error <= TOLERANCES["trace"] * abs(true) or (one.bound is not None and error <= one.bound)
        for one, error in zip(found, errors, strict=True)
    )
    largest = f"{close} of {SEEDS} seeds; largest error {max(errors) / abs(true):.0%}"
    return ("right" if close >= RIGHT_SEEDS else "wrong"), largest


def differences(case: Case, found: Values, reference: Tensor) -> Tensor:
    """Of each eigenvalue, relative to the largest in magnitude; of the smallest one, relative to itself, unless the bound
    that comes with it covers the difference. All of them may come in any order; fewer than asked for are compared."""
    exact = torch.linalg.eigvalsh(reference).flip(0) if reference.ndim == 2 else reference
    values = found.values.double()
    if case.ask == "smallest":
        error = (values - exact[-1]).abs()
        return torch.zeros(1) if found.bound is not None and float(error) <= found.bound else error / exact[-1].abs()
    if len(values) == len(exact):
        values = values.sort(descending=True).values
    return (values - exact[: len(values)]).abs() / exact.abs().max().clamp(min=1e-6)


def within(errors: list[float], tolerance: float) -> tuple[str, str]:
    best = min(errors) if all(error == error for error in errors) else float("nan")
    return ("right" if best <= tolerance else "wrong"), f"off by {best:.1e}" if best == best else "nan"


def named(text: str, names: str) -> bool:
    return bool(re.search(names, text)) and bool(FIX.search(text))


def shortened(text: str) -> str:
    """One line without paths or addresses."""
    text = re.sub(r"(?<![\w.])/[\w./+-]+/|https?://\S+|0x[0-9a-f]+", "", " ".join(text.split()))
    return text if len(text) <= 240 else text[:237] + "..."


def state(model: nn.Module) -> dict[str, Any]:
    """What training has beside the loss, in values that compare."""
    own = [(name, p) for name, p in model.named_parameters() if not nn.parameter.is_lazy(p)]
    return {
        "parameters": [(name, stored(p.detach())) for name, p in own],
        "buffers": [(name, stored(b)) for name, b in model.named_buffers()],
        ".grad": [(name, p.grad is not None and (stored(p.grad.detach()), p.grad.requires_grad)) for name, p in own],
        "train/eval flags": [module.training for module in model.modules()],
        "torch's random state": stored(torch.get_rng_state()),
        "Python's random state": random.getstate(),
    }


def stored(tensor: Tensor) -> bytes:
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Warnings, and lines of logs, meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda one: lines.append(one.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: lines.append(str(message))
        yield lines
    logging.getLogger().removeHandler(handler)


if __name__ == "__main__":
    main()
