"""Runs as one HTML file that needs nothing else: where they come from, figures, claims, and what measuring cost."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .claims import check
from .files import printable
from .runs import Run, flattened, write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 0.5rem 0 1.5rem }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% }
figure { margin: 0 0 1.5rem }
figcaption { font-size: 13px; color: #555 }
"""


def report(runs: Run | Sequence[Run], file: str | Path | None = None) -> Path:
    """Write configuration and provenance, figures, claims and costs of runs to one HTML file; returns its path.

    The figures are those of `curvlab.plots.figures`, as images in the file; it loads nothing and runs nothing.

    Args:
        file: default ``report.html`` in the run's folder, or in the parent of several.

    Raises:
        ValueError: no run, or none with a measurement.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    drawn = plots.figures(runs)  # refuses what has nothing to show
    place = runs[0].path if len(runs) == 1 else runs[0].path.parent
    name = ", ".join(run.path.name for run in runs)
    parts = [
        f"<h1>{_text(name)}</h1>",
        "<h2>What the papers' claims say of it</h2>", _claims(runs),
        "<h2>Figures</h2>", *(_figure(path, figure) for path, figure in drawn.items()),
        "<h2>What measuring cost</h2>", *(_costs(run) for run in runs),
        "<h2>Where it comes from</h2>", *(_origin(run) for run in runs),
    ]  # fmt: skip
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    target = Path(file) if file is not None else place / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, page.encode())


def _claims(runs: Sequence[Run]) -> str:
    rows = []
    for v in check(runs):
        interval = "" if v.interval is None else f" [{v.interval[0]:.3g}, {v.interval[1]:.3g}]"
        number = "" if v.statistic is None else f"{v.statistic:.4g}{interval}"
        rows.append((v.claim, v.run, v.decision, number, v.threshold, v.reason))
    rows.sort(key=lambda row: row[2] == "not applicable")
    return _table(("claim", "run", "verdict", "statistic, 95%", "rule", "why"), rows)


def _figure(path: Path, figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    image = base64.b64encode(buffer.getvalue()).decode()
    label = _text(f"{path.parent.name}: {path.name.replace('_', ' ')}")
    return f'<figure><img alt="{label}" src="data:image/png;base64,{image}"><figcaption>{label}</figcaption></figure>'


def _costs(run: Run) -> str:
    """Seconds and products of each quantity; what several share counts for the first that asked."""
    rows = []
    for name in run.names:
        found = [r["measurements"][name] for r in run.records if name in r["measurements"]]
        seconds, products = sum(m["seconds"] for m in found), sum(m["matvecs"] for m in found)
        mean = 1e3 * seconds / len(found)
        rows.append((name, len(found), f"{products / len(found):.3g}", f"{mean:.3g}", f"{seconds:.3g}"))
    total = sum(r.get("seconds") or 0.0 for r in run.records)
    head = ("quantity", "times measured", "products each", "ms each", "seconds in all")
    caption = f"{run.path.name}: {len(run.records)} records, {total:.3g} s of measuring"
    return f"<h3>{_text(caption)}</h3>{_table(head, rows)}"


def _origin(run: Run) -> str:
    settings = [(key, x if isinstance(x, str) else json.dumps(x)) for key, x in flattened(run.config).items()]
    rows = sorted(settings, key=lambda row: not row[0].startswith("provenance"))
    return f"<h3>{_text(str(run.path.name))}</h3>{_table(('setting', 'value'), rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(x: Any) -> str:
        kind = ' class="number"' if isinstance(x, int | float) or str(x).replace(".", "", 1).isdigit() else ""
        return f"<td{kind}>{_text(str(x))}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>{body}</table>"


def _text(text: str) -> str:
    return html.escape(printable(text))
