"""`curvlab claims`, `curvlab plot` and `curvlab list`: what needs logs and registries only."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..files import printable
from ..problems.presets import ABOUT
from ..problems.studies import STUDIES, studies
from ..runs import CONFIG, Run
from .text import table, verdict_table


def claims_command(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        json: bool = False,
        by: Literal["run", "data"] = "run",
        all: bool = False,
    ) -> tuple[tuple[Path, ...], bool, str, bool]:
        """What runs say about the papers' claims; several runs are also judged together.

        Args:
            runs: Run folders, or folders of runs.
            json: Print JSON.
            by: data: a row a claim and a column a data set, with the papers' own numbers, and reversals marked.
            all: Also list the claims that do not apply to these runs.
        """
        return runs, json, by, all

    paths, as_json, by, every = tyro.cli(options, args=arguments, prog="curvlab claims")
    from ..claims import check
    from ..claims.datasets import by_data_set, lines

    if by == "data":
        rows = by_data_set(expand(paths))
        head, *body = lines(rows)
        text, found = table(head, body), [dataclasses.asdict(row) for row in rows]
    else:
        verdicts = check(expand(paths))
        text, found = verdict_table(verdicts, every=every), [dataclasses.asdict(v) for v in verdicts]
    print(json.dumps(found, indent=2, default=float) if as_json else text)
    return 0


def plot_command(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        out: Path | None = None,
        bands: bool = False,
        quantities: tuple[str, ...] = (),
    ) -> tuple[tuple[Path, ...], Path | None, bool, tuple[str, ...]]:
        """Draw the figures of runs, as PNG and PDF.

        Args:
            runs: Run folders, or folders of runs.
            out: Folder of the figures; default that of the runs.
            bands: One figure for all runs instead: of those that differ only in seeds, mean and 95% interval at each step.
            quantities: What --bands shows; default loss and sharpness.
        """
        return runs, out, bands, quantities

    paths, out, together, quantities = tyro.cli(options, args=arguments, prog="curvlab plot")
    from .. import plots

    if quantities and not together:
        raise ValueError("--quantities says what --bands shows; give both")
    runs = expand(paths)
    if together:
        place = out or (runs[0].path if len(runs) == 1 else Path(os.path.commonpath([run.path.parent for run in runs])))
        drawn = plots.save({place / "bands": plots.bands(runs, quantities)})
    else:
        drawn = plots.plot(runs, out)
    for path in drawn:
        print(printable(str(path)))
    return 0


def list_command(arguments: list[str]) -> int:
    def options() -> None:
        """Presets, studies, diagnostics, regularizers, methods, models, data sets and claims."""

    tyro.cli(options, args=arguments, prog="curvlab list")
    from ..claims import CLAIMS
    from ..diagnostics import DIAGNOSTICS
    from ..methods import METHODS
    from ..problems.registry import DATA, MODELS
    from ..regularizers import REGULARIZERS

    parts: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        ("presets", ("name", "what it shows"), list(ABOUT.items())),
        ("studies", ("name", "what is compared"), [(name, s.about) for name, s in STUDIES.items()]),
        ("at --scale paper", ("name", "what it shows"), [(name, s.about) for name, s in studies("paper").items()]),
        (
            "diagnostics",
            ("name", "symbol", "formula", "kind", "cost"),
            [(d.name, d.symbol, d.formula, d.kind, d.cost) for d in DIAGNOSTICS.values()],
        ),
        (
            "regularizers",
            ("name", "symbol", "formula", "source"),
            [(r.name, r.symbol, r.formula, r.source) for r in REGULARIZERS.values()],
        ),
        ("methods", ("name", "formula", "source"), [(name, m.formula, m.source) for name, m in METHODS.items()]),
        ("models", ("name", "what it is"), _first_lines(MODELS)),
        ("data sets", ("name", "what it is"), _first_lines(DATA)),
        ("claims", ("name", "source", "claim"), [(c.name, c.source, c.sentence) for c in CLAIMS.values()]),
    ]
    print("\n\n".join(f"{title}\n{table(head, rows)}" for title, head, rows in parts))
    return 0


def _first_lines(entries: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names, and the first lines of the docstrings."""
    return [(name, (entry.__doc__ or "").strip().splitlines()[0]) for name, entry in entries.items()]


def expand(paths: Sequence[Path]) -> list[Run]:
    """Run folders, and the runs inside folders that are none, at any depth; each once."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = (
            []
            if (path / CONFIG).exists()
            else sorted(
                file.parent
                for file in path.rglob(CONFIG)
                if "tuning" not in file.relative_to(path).parts  # not for verdicts
            )
        )
        found |= dict.fromkeys(sorted(inside, key=lambda p: (p.parent, len(p.name), p.name)) or [path])
    if not found:
        raise ValueError("name at least one run folder, such as runs/edge-of-stability-...")
    return [Run(path) for path in found]
