"""The page of all figures and tables of the papers, made from the presets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..problems.paper import FIGURES, PAPER, Figure
from ..problems.paper.figures import NEEDS
from ..problems.paper.marks import is_ours
from ..problems.presets import Experiment
from ..problems.rows import Row, Study
from ..problems.studies import studies
from ..regularizers import REGULARIZERS
from . import FOLDER
from .costs import asked, estimate

FILE = FOLDER / "figures.md"
CORE = (
    "data", "model", "model_options", "loss", "batch_size", "lr", "method_options", "penalty", "micro_batch", "num_epochs",
    "steps", "schedule",
)  # fmt: skip
_HEAD = """# From the papers' figures to commands

Every figure and table of the three papers that shows an experiment, with the commands that draw it. At small scale
they take minutes on two cores, with digits or a toy problem; what was seen is told in [claims](claims.md). `--scale
paper` has the paper's model, data, lengths and protocol, and needs its data set and a GPU. No run at the paper's
scale was made for this page; that each one starts is tested.

† marks settings that are ours, because our text of the paper does not state them: axes of figures and some appendices
are missing in it. All others are the paper's. Where each is stated, and why ours are what they are, is in the last
part of the page. Every setting is an option of the command; `curvlab explain sgd-iir`, for example, lists those of a
preset at both scales.

Costs are estimates from floating-point operations: 20 TFLOP/s, and no more than 200 updates a second, for all runs of
the command, seeds and grids included."""
_SOURCES = "## Where the settings of --scale paper are stated"
_HOW = ("device", "n")  # how, and not what, is computed


class Setting(NamedTuple):
    """A setting as text, and its source."""

    name: str
    value: str
    source: str


def page() -> str:
    """The page as markdown."""
    parts = [_HEAD]
    for name, figures in FIGURES.items():
        head = ("figure", "small scale", "paper's scale", "settings", "differences, cost")
        parts += [f"## {name}", NEEDS[name], table(head, [_line(figure) for figure in figures])]
    parts.append(_SOURCES)
    for name, figures in FIGURES.items():
        parts += _sources(name, list(dict.fromkeys(figure.name for figure in figures)))
    return "\n\n".join(parts) + "\n"


def rewrite() -> Path:
    """Write the page that ships with the package."""
    FILE.write_text(page(), encoding="utf-8")
    return FILE


def settings(study: Study, rows: Iterable[Row] | None = None, base: Experiment | None = None) -> list[Setting]:
    """What a study sets, and what its rows do: values with the same source together."""
    rows = list(study.rows.values() if rows is None else rows)
    varied: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        axes = {**row.tune, **row.grid}
        chosen = {"penalty"} & {axis.partition(".")[0] for axis in axes}  # its strength is an axis of the row
        for name, source in row.sources.items():
            if name not in chosen:
                varied.setdefault((name, source), []).extend(axes.get(name, [row.change.get(name)]))
    always = {name for name in study.sources if rows and all(name in row.sources for row in rows)}
    found = []
    for name, source in study.sources.items():
        holder: Any = study if not hasattr(Experiment, name) else base or study.base
        if name not in always:
            found.append(Setting(name, _text(name, [getattr(holder, name)]), source))
    return found + [Setting(name, _text(name, values), source) for (name, source), values in varied.items()]


def _sources(paper: str, names: Sequence[str]) -> list[str]:
    listed = {name: [s for s in settings(PAPER[name]) if s.name not in _HOW] for name in names}
    common = [s for s in listed[names[0]] if all(s in others for others in listed.values())]
    parts = [f"### {paper}: all", table(Setting._fields, common)]
    for name in names:
        parts += [f"### {name}", table(Setting._fields, [s for s in listed[name] if s not in common])]
    return parts


def about(name: str) -> str:
    """The page of a preset or study: its settings at small scale, and at the paper's with their sources."""
    parts = [f"# {name}"]
    for scale in ("small", "paper"):
        found = studies(scale).get(name)
        if found is None:
            continue
        single = list(found.rows) == [""] and not found.rows[""].grid
        option = "" if scale == "small" else " --scale paper"
        parts += [
            f"## curvlab {'run' if single else 'sweep'} {name}{option}",
            f"{found.about[0].upper()}{found.about[1:]}.",
        ]
        if scale == "paper":
            parts.append(table(Setting._fields, settings(found)))
            drawn = [(f"{paper}, {f.number}", f"`{f.command('paper')}`") for paper, all in FIGURES.items() for f in all
                     if f.name == name]  # fmt: skip
            parts.append(table(("figure", "command"), drawn))
        else:
            changed = [(n, _text(n, [v])) for n, v in vars(found.base).items() if v != getattr(Experiment(), n)]
            parts.append(table(("name", "value"), changed) if changed else "All settings have their defaults.")
        if not single:
            parts.append(
                table(("row", "what it is", "settings"), [_described(label, row) for label, row in found.rows.items()])
            )
    return "\n\n".join([*parts, "Every setting is an option: `--help` lists them."]) + "\n"


def _described(label: str, row: Row) -> tuple[str, str, str]:
    axes = {**row.tune, **row.grid}
    texts = [f"{name} {_text(name, [value])}" for name, value in {**row.change, **axes}.items()]
    return label or "all", row.about, ", ".join(texts)


def _line(figure: Figure) -> tuple[str, ...]:
    command = figure.command("paper")
    study, base, labels = asked(command)
    shown = [
        s for s in settings(study, [study.rows[label] for label in labels], base) if s.name.partition(".")[0] in CORE
    ]
    small, last = f"`{figure.command('small')}`", "; ".join(filter(None, [figure.differences, estimate(command)]))
    return f"{figure.number}: {figure.shows}", small, f"`{command}`", _brief(shown), last


def _brief(shown: Iterable[Setting]) -> str:
    """Settings in a cell: values of one name together, penalties by their symbols, and marks at those that are ours."""
    values: dict[tuple[str, str], list[str]] = {}
    for s in shown:
        name = s.name.removeprefix("penalty.") if "options" not in s.name else ""
        if s.value not in ("0", "none", "constant"):
            mark = "†" if is_ours(s.source) else ""
            values.setdefault((_symbol(name), mark), []).extend(s.value.split(", "))
    names: dict[tuple[str, str], list[str]] = {}
    for (name, mark), found in values.items():
        text = ", ".join(_symbol(value).replace("=", " = ") for value in dict.fromkeys(found))
        names.setdefault((text, mark), []).append(name)
    return "; ".join(f"{', '.join(found)} {text}{mark}".strip() for (text, mark), found in names.items())


def _symbol(text: str) -> str:
    """A penalty, alone or with its strength, by its symbol; anything else as it is."""
    name, equals, strength = text.partition("=")
    entry = REGULARIZERS.get(name) or REGULARIZERS.get(f"{name}_penalty")
    return f"{entry.symbol}{equals}{strength}" if entry else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(name: str, values: Sequence[Any]) -> str:
    """Values as the command line writes them; many numbers as a range."""
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    numbers = [_number(v) for v in dict.fromkeys(flat)]
    if len(numbers) > 6 and all(isinstance(v, int | float) for v in numbers):
        return f"{min(numbers):.5g} to {max(numbers):.5g} ({len(set(numbers))} values)"
    words = [
        "full" if name == "batch_size" and v == 0 else f"{v:.7g}" if isinstance(v, float) else str(v) for v in numbers
    ]
    return ", ".join(dict.fromkeys(words)) or "none"


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    for kind in (int, float):
        try:
            return value if isinstance(value, float) else kind(value)
        except ValueError:
            continue
    return value
