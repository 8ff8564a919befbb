"""The tables and figures of pages, from the last full record of each benchmark on each device.

python benchmarks/tables.py            # print the tables
python benchmarks/tables.py --write    # put them between their marks in the pages, and draw benchmarks/figures
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record
from failure_modes import OUTCOMES
from matplotlib.figure import Figure

from curvlab import plots
from curvlab.plots import style
from curvlab.throughput import Speed
from curvlab.timing import Spread

ROOT = Path(__file__).parents[1]
FIGURES = Path(__file__).parent / "figures"
MISSING = "No record yet: run the benchmarks, then `python benchmarks/tables.py --write`."
Record = dict[str, Any]
Table = Callable[[Record], list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the pages, with the figures")
    parser.add_argument("--records", type=Path, default=record.RECORDS, help="folder of the records")
    chosen = parser.parse_args()
    for name, (page, _) in PAGES.items():
        text = tables(name, chosen.records)
        print(text, end="\n\n")
        if chosen.write:
            before, _, rest = (ROOT / page).read_text(encoding="utf-8").partition(begin(name))
            after = rest.partition(end(name))[2]
            (ROOT / page).write_text(f"{before}{begin(name)}\n{text}\n{end(name)}{after}", encoding="utf-8")
    for name, (benchmark, draw) in DRAWN.items():
        found = latest(benchmark, chosen.records)
        if chosen.write and found:
            FIGURES.mkdir(exist_ok=True)
            draw(next(iter(found.values()))).savefig(FIGURES / f"{name}.png", dpi=110)


def begin(name: str) -> str:
    return f"<!-- {name}: made by benchmarks/tables.py from the records, checked by a test -->"


def end(name: str) -> str:
    return f"<!-- end of {name} -->"


def tables(name: str, folder: Path = record.RECORDS) -> str:
    """All tables of a part of a page, as markdown."""
    parts = [
        part
        for benchmark, table in PAGES[name][1].items()
        for found in latest(benchmark, folder).values()
        for part in table(found)
    ]
    return "\n\n".join(parts) or MISSING


def latest(name: str, folder: Path) -> dict[str, Record]:
    """The last full record of a benchmark on each device; CPUs first."""
    file = folder / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [one for one in map(json.loads, lines) if not one["settings"]["quick"]]
    by_device = {one["settings"]["device"]: one for one in found}
    return dict(sorted(by_device.items(), key=lambda item: item[0] != "cpu"))


def products(found: Record) -> list[str]:
    sizes = found["settings"]["models"]
    heads = {model: f"{model}, {size['parameters'] / 1e3:.0f}k" for model, size in sizes.items()}
    return [
        f"A Hessian-vector product in gradients of the same data, {conditions(found)}:",
        grid(found, "name", "model", heads, lambda row: ratio(row["product_ratio"])),
        "What comes first at a new point, the gradient included:",
        grid(found, "name", "model", heads, lambda row: ratio(row["first_ratio"]), keep=kept_engines),
        "Memory that grows in a fresh process during the first part and two products, MiB:",
        grid(found, "name", "model", heads, lambda row: mebibytes(row["peak_bytes"])),
    ]


def norms(found: Record) -> list[str]:
    heads = {model: model for model in found["settings"]["models"]}
    return [
        f"Exact squared norms of all per-example gradients, in gradients of the same data, {conditions(found)}:",
        grid(found, "name", "model", heads, lambda row: ratio(row["product_ratio"])),
    ]


def steps(found: Record) -> list[str]:
    """Median and mean of a step; the error is the larger of what is stated and what was found."""
    n, heads = found["settings"]["n"], {}
    for b in (n, found["settings"]["b"]):
        heads[b] = "full batch" if b == n else f"b = {b}"

    def cell(row: Record) -> str:
        error = max(row["stated_error"] or 0, row["true_error"] or 0)
        text = f"{row['gradients']['median']:.1f} (mean {row['mean_gradients']:.1f})"
        return text + (f", {error:.1%}" if error else "")

    return [
        f"A training step of the demo with each diagnostic, in gradients, and median errors, {conditions(found)}:",
        grid(found, "candidate", "b", heads, cell),
    ]


def solvers(found: Record) -> list[str]:
    """Medians over the points of a trajectory."""
    heads = {1: "top eigenvalue", 5: "top five"}

    def cell(row: Record) -> str:
        count, cost = row["products"]["median"], row["gradients"]["median"]
        return f"{count:.0f}, {cost:.0f}; {row['residual']:.0e}, {row['value_error']:.0e}"

    return [
        f"Products, and CPU time in gradients; residual, and error of the values, {conditions(found)}:",
        grid(found, "solver", "k", heads, cell),
    ]


def memory(found: Record) -> list[str]:
    budget, rows = found["settings"]["memory"], found["results"]
    heads = {"graph": "kept graphs", "double_backward": "double backward"}
    text = f"Peak of a gradient and two products with `memory={budget!r}`, MiB, {conditions(found)}:"
    cases = {(row["n"], row["chunk_size"]): f"N = {row['n']}, chunks of {row['chunk_size']}" for row in rows}
    named = found | {"results": [row | {"case": cases[row["n"], row["chunk_size"]]} for row in rows]}
    return [text, grid(named, "case", "engine", heads, lambda row: mebibytes(row["peak_bytes"]))]


def scaling(found: Record) -> list[str]:
    """Seconds with the share of communication, of what was measured and of what the plan says."""
    counts = list(dict.fromkeys(row["ranks"] for row in found["results"]))
    heads = {count: f"{count} {'ranks' if count > 1 else 'rank'}" for count in counts}
    rows = []
    for kind in ("measured", "planned"):
        prefix = "" if kind == "measured" else "planned_"
        for row in found["results"]:
            numbers = [row[prefix + key] for key in ("seconds", "communication")]
            rows.append({"name": f"{row['scaling']}, {kind}", "ranks": row["ranks"], "numbers": numbers})

    def cell(row: Record) -> str:
        seconds, communication = row["numbers"]
        return "-" if seconds is None else f"{1e3 * seconds:.0f} ms, {communication / seconds:.0%}"

    own, asked = found["environment"], found["settings"]
    text = f"The {asked['quantity']} of {asked['model']} over ranks, {asked['n']} examples in all or (weak) on each: "
    text += f"time and the share of communication, {conditions(found)}, at a load of {own['load']} on {own['cores']} cores:"
    return [text, grid({"results": rows}, "name", "ranks", heads, cell)]


def estimators(found: Record, budgets: tuple[int, int] = (16, 64)) -> list[str]:
    settings = found["settings"]
    places = [settings["budgets"].index(budget) for budget in budgets]
    points = [(model, point) for model in settings["models"] for point in ("initialization", "trained")]
    rows = [
        row | {"case": (row["model"], row["point"]), "name": f"{row['quantity']}: {row['estimator']}"}
        for row in found["results"]
    ]

    def cell(row: Record) -> str:
        errors = [row["errors"][place] for place in places]
        return ", ".join("-" if error is None else f"{error:.1%}" for error in errors)

    one, two = budgets
    return [
        f"Relative error, root mean square over {settings['seeds']} seeds, after {one} and {two} products or passes:",
        grid(found | {"results": rows}, "name", "case", {point: ", ".join(point) for point in points}, cell),
    ]


def scores(found: Record) -> list[str]:
    """How often each library gave which kind of answer."""
    libraries = {name: name for name in dict.fromkeys(row["library"] for row in found["results"])}
    counts = Counter((row["outcome"], row["library"]) for row in found["results"])
    rows = [{"outcome": o, "library": name, "count": counts[o, name]} for o in OUTCOMES for name in libraries]
    return [grid({"results": rows}, "outcome", "library", libraries, lambda row: str(row["count"]))]


def failures(found: Record) -> list[str]:
    libraries = {name: name for name in dict.fromkeys(row["library"] for row in found["results"])}
    rows = [row | {"case": f"{row['row']}: {row['title']}"} for row in found["results"]]
    return [
        grid({"results": rows}, "case", "library", libraries, lambda row: SHORT.get(row["outcome"], row["outcome"]))
    ]


def conditions(found: Record) -> str:
    environment = found["environment"]
    return f"one thread, {found['settings']['device']}, torch {environment['versions']['torch']}, medians"


def grid(
    found: Record,
    row_key: str,
    column_key: str,
    heads: Mapping[Any, str],
    cell: Callable[[Record], str],
    keep: Callable[[str], bool] = lambda name: True,
) -> str:
    """A markdown table of results by two of their keys."""
    cells = {(row[row_key], row[column_key]): cell(row) for row in found["results"]}
    names = [name for name in dict.fromkeys(row[row_key] for row in found["results"]) if keep(name)]
    lines = [["", *heads.values()], ["---"] * (1 + len(heads))]
    lines += [[name, *(cells.get((name, column), "-") for column in heads)] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept_engines(name: str) -> bool:
    """Those that do something before the first product."""
    return name in ("curvlab graph", "curvlab traced", "curvlab compiled", "by hand", "PyHessian, one batch")


def ratio(spread: Record | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f}"


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def panels(found: Record) -> dict[str, list[Speed]]:
    """What a record says, as it was measured."""
    spreads = ("first", "product", "first_ratio", "product_ratio")
    out: dict[str, list[Speed]] = {}
    for row in found["results"]:
        own = {key: value for key, value in row.items() if key not in ("model", "peak_bytes")}
        own |= {key: None if own[key] is None else Spread(**own[key]) for key in spreads}
        out.setdefault(row["model"], []).append(Speed(**own))
    return out


def speeds(found: Record) -> Figure:
    return plots.throughput(panels(found))


def errors(found: Record) -> Figure:
    """The error of each estimator against products: a row for each quantity, a column for each model and point."""
    cases = list(dict.fromkeys((row["model"], row["point"]) for row in found["results"]))
    quantities = list(dict.fromkeys(row["quantity"] for row in found["results"]))
    figure, axes = style.axes_of(len(quantities), len(cases), figsize=(13, 8), sharex=True, squeeze=False)
    for line, quantity in zip(axes, quantities, strict=True):
        for ax, case in zip(line, cases, strict=True):
            own = [
                row for row in found["results"] if (row["model"], row["point"], row["quantity"]) == (*case, quantity)
            ]
            for row, colour in zip(own, style.colours(len(own)), strict=True):
                values = [float("nan") if error is None else error for error in row["errors"]]
                ax.loglog(found["settings"]["budgets"], values, ".-", color=colour, lw=1, label=row["estimator"])
            ax.set_title(f"{quantity}: {', '.join(case)}", fontsize=9, loc="left")
            ax.set_xticks(found["settings"]["budgets"], [str(b) for b in found["settings"]["budgets"]])
            ax.minorticks_off()
        line[0].legend(fontsize=7)
        line[0].set_ylabel("relative error")
    figure.supxlabel("products, or passes over the data", fontsize=9)
    return figure


SHORT = {"named error": "named", "wrong": "**wrong**", "not applicable": "-"}
PAGES: dict[str, tuple[str, dict[str, Table]]] = {  # parts of pages, and what they are made of
    "speed": ("README.md", {"bench_hvp": products, "bench_per_example": norms, "bench_step": steps}),
    "scaling": ("README.md", {"bench_scaling": scaling}),
    "scores": ("README.md", {"failure_modes": scores}),
    "failures": ("benchmarks/README.md", {"failure_modes": failures}),
    "solvers": ("benchmarks/README.md", {"bench_eigsh": solvers}),
    "memory": ("benchmarks/README.md", {"bench_memory": memory}),
    "estimators": ("curvlab/docs/estimators.md", {"bench_estimators": estimators}),
}
DRAWN: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "hvp": ("bench_hvp", speeds),
    "estimators": ("bench_estimators", errors),
}

if __name__ == "__main__":
    main()
