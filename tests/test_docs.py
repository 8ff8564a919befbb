"""Every example in the documentation is executed, and what is made from the registry is the registry's.

Compared with a reference: the README's table, the pages of quantities, the costs on the page of estimators. Names, links and
docstrings' parts are checked for existence. Nothing says that a sentence is true.
"""

import dataclasses
import doctest
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import curvlab
from curvlab.claims import CLAIMS
from curvlab.cli import COMMANDS
from curvlab.diagnostics import DIAGNOSTICS
from curvlab.diagnostics.registry import ALIASES
from curvlab.docs import TOPICS, quantity
from curvlab.docs.docstrings import sections
from curvlab.methods import METHODS
from curvlab.problems.registry import DATA, MODELS
from curvlab.regularizers import REGULARIZERS

README = Path(__file__).parents[1] / "README.md"
MODULES = [m.name for m in pkgutil.walk_packages(curvlab.__path__, "curvlab.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    if name.startswith("curvlab.integrations."):
        package = name.rpartition(".")[2]
        pytest.importorskip({"fabric": "lightning"}.get(package, package), exc_type=ImportError)
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
        rows.append(
            [f"[`{name}`](curvlab/docs/quantities/{name}.md)", cell(d.symbol), cell(d.formula), d.kind, d.cost, *costs]
        )
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


# Pages that ship with the package

DOCS = Path(curvlab.__file__).parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DIAGNOSTIC_PARTS = ["Estimator", "Error", "Fails", "Args", "Raises", "Source"]  # the order of a docstring


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_examples(page, tmp_path, monkeypatch, capsys):
    """Every block runs, those of a page one after another; that of a quantity prints a value."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)  # pages seed what they draw
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())
    assert len(examples) == page.read_text().count("```python")
    for example in examples:
        example.evaluate()
    if page.parent.name == "quantities":
        lines = capsys.readouterr().out.splitlines()
        assert any("no value" not in line for line in lines), lines


def test_pages_are_made_from_the_registry():
    assert {page.stem for page in DOCS.glob("*.md")} == set(TOPICS)
    assert {page.stem for page in (DOCS / "quantities").glob("*.md")} == set(quantity.names())
    for name in quantity.names():
        page = DOCS / "quantities" / f"{name}.md"
        assert page.read_text() == quantity.quantity(name), "run python -m curvlab.docs"


def test_pages_are_written_and_old_ones_removed(tmp_path):
    (tmp_path / "renamed.md").write_text("of a quantity that has another name now")
    assert [page.stem for page in quantity.rewrite(tmp_path)] == quantity.names()
    assert sorted(page.stem for page in tmp_path.glob("*")) == sorted(quantity.names())


@pytest.mark.parametrize("name", quantity.names())
def test_docstrings_of_diagnostics_have_the_same_parts_in_the_same_order(name):
    parts = [part for part in sections(DIAGNOSTICS[name].function) if part]
    if name not in REGULARIZERS:  # theirs are put together from two
        assert parts == [part for part in DIAGNOSTIC_PARTS if part in parts]
    assert {"Estimator", "Fails"} <= set(parts)
    if "sem" in DIAGNOSTICS[name].kind and name not in REGULARIZERS:
        assert "Error" in parts, "say what the standard error comes from"
    rows = re.findall(r"^\| `\w+` \| `.*?` \|(.*)\|$", quantity.quantity(name), re.M)
    assert len(rows) == len(DIAGNOSTICS[name].options)
    assert all(row.strip() for row in rows), "an option without a meaning"


def known_names() -> set[str]:
    """What a plain name in code style may be: a registered name, an argument, a field, a command."""
    registered = {
        *DIAGNOSTICS,
        *(d.symbol for d in DIAGNOSTICS.values()),
        *ALIASES,
        *REGULARIZERS,
        *METHODS,
        *CLAIMS,
        *TOPICS,
        *curvlab.__all__,
        *COMMANDS,
        *DATA,
        *MODELS,
    }
    callables = [curvlab.Objective, curvlab.measure, curvlab.train, *(d.function for d in DIAGNOSTICS.values())]
    arguments = {p for f in callables for p in inspect.signature(f).parameters}
    fields = {f.name for c in (curvlab.Measurement, curvlab.Snapshot) for f in dataclasses.fields(c)}
    return registered | arguments | fields | {"exact", "bound", "sem", "null", "threshold", "explain"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_pages_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    code = re.findall(r"`([^`]+)`", text)
    for plain in [c for c in code if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", c) and len(c) > 1]:
        assert plain in known_names(), plain
    for words in [c for c in code if re.match(r"(cl|curvlab)\.\w", c)]:
        found = curvlab
        for name in re.match(r"(?:cl|curvlab)((?:\.\w+)+)", words)[1].split(".")[1:]:
            found = getattr(found, name, None) or importlib.import_module(f"{found.__name__}.{name}")
    for argument in [c[:-1] for c in code if re.fullmatch(r"\w+=", c)]:
        assert argument in known_names(), argument
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (page.parent / target).exists(), target


def test_costs_of_the_estimators_are_those_counted():
    counted = json.loads((README.parent / "benchmarks" / "records" / "costs.json").read_text())["costs"]
    rows = re.findall(
        r"^\|.*?`(\w+)` \|(?:.*\|)? (\S+(?: \+ \S+)?) \| (\S+ \+ \S+) \|$", (DOCS / "estimators.md").read_text(), re.M
    )
    assert len(rows) == 21
    for name, *costs in rows:
        for shown, key in zip(costs, ("point", "step"), strict=True):
            nothing = key == "point" and name in quantity.IN_TRAINING
            assert shown == ("-" if nothing else " + ".join(quantity.number(x) for x in counted[name][key])), name
