"""The report of runs and their comparison. Behaviour only: what is in the file, that it needs nothing else, refusals."""

from __future__ import annotations

import re

import pytest
import torch

import curvlab as cl
from curvlab.claims import check
from curvlab.cli import main
from curvlab.report import report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = cl.problems.mlp((64, 8, 10))
        L = cl.Objective(model, "squared_error", cl.problems.digits(64)[0])
        folder = tmp_path_factory.mktemp("runs") / f"<seed & {seed}>"
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        names = ["loss", "sharpness", "instability", ("hessian_eigenvalues", {"k": 2})]
        every = {"hessian_eigenvalues": 2, "instability": 5}
        for _ in cl.train(
            L, sgd, cl.Batches(64, 64, 6), diagnostics=names, every=every, run=folder, config={"note": "<b>"}
        ):
            pass
        made.append(cl.Run(folder))
    return made


def test_the_report_holds_everything_and_loads_nothing(runs, tmp_path):
    path = report(runs[0])
    assert path == runs[0].path / "report.html"
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 2  # edge of stability, quantities
    assert not re.findall(r'(?:src|href)="(?!data:image/png)', page)
    assert "<script" not in page
    for verdict in check(runs[0]):
        assert verdict.claim in page
        assert f"<td>{verdict.decision}</td>" in page
    provenance = runs[0].config["provenance"]["versions"]["torch"]
    assert f"<td>provenance.versions.torch</td><td>{provenance}</td>" in page
    assert "<td>training.optimizer.name</td><td>SGD</td>" in page


def test_the_costs_are_those_of_the_log(runs):
    page = report(runs[0]).read_text()
    found = [
        r["measurements"]["hessian_eigenvalues"] for r in runs[0].records if "hessian_eigenvalues" in r["measurements"]
    ]
    row = re.search(r"<tr><td>hessian_eigenvalues</td>(.*?)</tr>", page)[1]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[0] == "3"
    assert float(cells[1]) == pytest.approx(sum(m["matvecs"] for m in found) / 3, rel=1e-2)
    assert float(cells[3]) == pytest.approx(sum(m["seconds"] for m in found), rel=1e-2)
    assert "6 records" in page


def test_what_users_wrote_is_text(runs, tmp_path):
    page = report(runs, tmp_path / "new" / "both.html").read_text()
    assert "&lt;seed &amp; 1&gt;" in page
    assert "<seed" not in page
    assert "<td>note</td><td>&lt;b&gt;</td>" in page


def test_commands(runs, tmp_path, capsys):
    assert main(["report", *(str(run.path) for run in runs), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").stat().st_size > 10_000
    assert main(["compare", *(str(run.path) for run in runs), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "compare.png").exists()
    assert capsys.readouterr().out.split() == [str(tmp_path / "r.html"), str(tmp_path / "compare.png")]
    assert cl.plots.common(runs) == ["loss", "sharpness", "instability"]
    assert main(["compare", str(runs[0].path)]) == 2
    assert "is one run; name at least two to compare" in capsys.readouterr().err


def test_nothing_to_report(tmp_path):
    empty = cl.Run.create(tmp_path / "empty", {"training": {}})
    with pytest.raises(ValueError, match="nothing to draw: no run has measurements"):
        report(empty)
    assert not (tmp_path / "empty" / "report.html").exists()
