"""Every example in the documentation is executed, and the README's table is the registry's."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import curvlab
from curvlab.diagnostics import DIAGNOSTICS

README = Path(__file__).parents[1] / "README.md"
MODULES = [m.name for m in pkgutil.walk_packages(curvlab.__path__, "curvlab.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    names = dict(vars(module)) | {"torch": torch}
    assert doctest.testmod(module, globs=names).failed == 0


def test_readme_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(README)
    try:
        for example in document.examples():
            example.evaluate()
    finally:
        DIAGNOSTICS.pop("gradient_curvature", None)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 20 + 1


def table() -> str:
    """The registry, with what `benchmarks/costs.py` counted on the demo problem: products + passes."""
    counted = json.loads((README.parent / "benchmarks" / "records" / "costs.json").read_text())["costs"]
    assert set(counted) == set(DIAGNOSTICS), "run python benchmarks/costs.py"

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def cost(pair: list[float] | None) -> str:
        return "-" if pair is None else " + ".join(f"{x:.0f}" if x >= 10 or x == int(x) else f"{x:.1f}" for x in pair)

    head = ["name", "symbol", "formula", "kind of error", "cost", "at a point", "per step"]
    rows = []
    for name, d in DIAGNOSTICS.items():
        costs = [cost(counted[name][key]) for key in ("point", "step")]
        rows.append([f"`{name}`", cell(d.symbol), cell(d.formula), d.kind, d.cost, *costs])
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def test_readme_table_is_the_registry():
    found = re.search(r"<!-- diagnostics:.*?-->\n(.*?)\n<!-- end -->", README.read_text(), re.S)
    assert found, "the table's markers are missing"
    assert found[1] == table(), f"put this table between the markers of README.md:\n\n{table()}"


def test_public_names_exist_and_are_documented():
    for name in curvlab.__all__:
        assert getattr(curvlab, name).__doc__, name
    with pytest.raises(AttributeError, match="it has Objective"):
        _ = curvlab.nonsense
    with pytest.raises(AttributeError, match="it has digits"):
        _ = curvlab.problems.nonsense
