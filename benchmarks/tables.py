"""The tables and the figure of the README's "How fast", from the last full record of each benchmark on each device.

python benchmarks/tables.py            # print the tables
python benchmarks/tables.py --write    # put them between the marks in README.md, and draw benchmarks/figures/hvp.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record

from curvlab import plots
from curvlab.throughput import Speed
from curvlab.timing import Spread

README = Path(__file__).parents[1] / "README.md"
FIGURE = Path(__file__).parent / "figures" / "hvp.png"
BEGIN, END = "<!-- speed: made by benchmarks/tables.py from the records, checked by a test -->", "<!-- end of speed -->"
MISSING = "No record yet: run the benchmarks, then `python benchmarks/tables.py --write`."
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md, with the figure")
    parser.add_argument("--records", type=Path, default=record.RECORDS, help="folder of the records")
    chosen = parser.parse_args()
    text = tables(chosen.records)
    print(text)
    if chosen.write:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        found = latest("bench_hvp", chosen.records)
        if found:
            FIGURE.parent.mkdir(exist_ok=True)
            plots.throughput(panels(next(iter(found.values())))).savefig(FIGURE, dpi=110)


def tables(folder: Path = record.RECORDS) -> str:
    """All tables as markdown."""
    parts = [
        part
        for name, table in (("bench_hvp", products), ("bench_per_example", norms), ("bench_step", steps))
        for found in latest(name, folder).values()
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


if __name__ == "__main__":
    main()
