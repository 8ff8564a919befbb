"""Notebooks: that source and stored outputs belong together, that every notebook runs, and what the stored outputs show.

Behavioural: a notebook that runs does not say that its sentences are true.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import execute
import jupytext
import pytest
from cases import some
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
SOURCES = execute.sources()
every = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def stored(source):
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_notebooks_are_numbered_from_one_and_listed_in_the_readme():
    assert [source.stem[:2] for source in SOURCES] == [f"{i:02d}" for i in range(1, len(SOURCES) + 1)]
    assert {file.stem for file in execute.FOLDER.glob("*.ipynb")} == {source.stem for source in SOURCES}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\(notebooks/(\d\d_\w+)\.ipynb\)", readme) == [s.stem for s in SOURCES]


@every
def test_the_stored_notebook_is_its_source(source):
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    assert jupytext.writes(notebook, "py:percent") == source.read_text(encoding="utf-8")
    assert set(notebook.metadata) == {"jupytext", "kernelspec", "language_info"}


@every
def test_the_stored_outputs_are_whole(source):
    notebook = stored(source)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    found = outputs(notebook)
    assert not [output for output in found if output["output_type"] == "error" or output.get("name") == "stderr"]
    figures = [
        imread(io.BytesIO(base64.b64decode(o["data"]["image/png"]))) for o in found if "image/png" in o.get("data", {})
    ]
    assert figures
    assert all(figure.std() > 0.05 for figure in figures)  # drawn upon
    assert source.with_suffix(".ipynb").stat().st_size < 300_000


@every
def test_the_stored_outputs_name_no_place_of_the_machine(source):
    text = [
        json.dumps({**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}})
        for o in outputs(stored(source))
    ]
    places = [
        re.search(r"(?<![\w/.*])/(home|tmp|root|work|usr|var|Users|private)/\S*|[A-Z]:\\\\\S+", line) for line in text
    ]
    assert not [place[0] for place in places if place]


@pytest.mark.parametrize("source", some(SOURCES, 8), ids=lambda source: source.stem)
def test_reduced_notebooks_run(source, tmp_path):
    code = "\n\n".join(c.source for c in execute.read(source, reduced=True).cells if c.cell_type == "code")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-"],
        input=code, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_reduced_setting_is_put_after_the_whole_one():
    for source in SOURCES:
        whole, reduced = (execute.read(source, reduced=which).cells for which in (False, True))
        changed = [(a.source, b.source) for a, b in zip(whole, reduced, strict=True) if a.source != b.source]
        assert len(changed) == 1, source.stem
        assert changed[0][1].startswith(changed[0][0] + "\n")


@pytest.mark.slow
@every
def test_whole_notebooks_run_within_two_minutes_of_a_core(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = os.times()
    notebook = execute.execute(source)
    spent = os.times()
    assert spent.children_user + spent.children_system - before.children_user - before.children_system < 120
    shown = [[sorted(o.get("data", {})) for o in outputs(n)] for n in (notebook, stored(source))]
    assert shown[0] == shown[1]  # as many figures and tables as are stored
