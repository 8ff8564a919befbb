"""`curvlab measure` and `curvlab landscape`: the final point of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from .text import table


def measure_command(arguments: list[str]) -> int:
    def options(
        run: Annotated[Path, tyro.conf.Positional],
        diagnostics: tuple[str, ...] = ("loss", "gradient_norm", "sharpness", "interaction_sharpness", "instability"),
        batch_size: tuple[int, ...] = (),
        seed: int = 0,
        json: bool = False,
        figure: Path | None = None,
    ) -> dict[str, Any]:
        """Measure the final point of a run that `curvlab run` made.

        Args:
            run: Folder of the run.
            diagnostics: What to measure (see `curvlab list`).
            batch_size: b of S_b; several give a curve; default that of training.
            seed: Of the random probes.
            json: Print JSON.
            figure: Draw what has an axis (spectra, layers, curves) to this file.
        """
        return locals()

    asked = tyro.cli(options, args=arguments, prog="curvlab measure")
    from ..point import measure
    from ..problems.experiments import final_point

    end = final_point(asked["run"])
    experiment, L = end.experiment, end.problem.objective
    sizes = asked["batch_size"]
    size = (sizes if len(sizes) > 1 else sizes[0]) if sizes else end.batch_size
    found = measure(
        L, asked["diagnostics"], w=end.w, batch_size=size, replacement=experiment.replacement, lr=experiment.lr,
        test=end.problem.test, seed=asked["seed"],
    )  # fmt: skip
    if asked["json"]:
        measured = {name: m.to_dict() for name, m in found.items()}
        print(json.dumps({"step": end.step, "measurements": measured}, indent=2))
    else:
        print(
            f"{asked['run']}, step {end.step}, N = {L.size}, P = {L.num_params}, b = {size}, 2/lr = {2 / experiment.lr:.5g}"
        )
        print(_measurement_table(found))
    if asked["figure"]:
        from .. import plots

        plots.measurements(found, title=f"{asked['run'].name}, step {end.step}").savefig(asked["figure"], dpi=150)
    return 0


def _measurement_table(found: dict[str, Any]) -> str:
    rows = []
    for name, m in found.items():
        cost = (m.kind, str(m.matvecs), f"{m.seconds:.3f}", m.note or "")
        points = [(name, m)]
        if m.axis and len(m.axis[1]) <= 12:
            points = [(f"{name}  {m.axis[0]}={c}", m.select(**{m.axis[0]: c})) for c in m.axis[1]]
        rows += [
            (label, str(point), *(cost if i == 0 else (m.kind, "", "", ""))) for i, (label, point) in enumerate(points)
        ]
    return table(("quantity", "value ± error", "kind", "products", "seconds", "note"), rows)


def landscape_command(arguments: list[str]) -> int:
    def options(
        run: Annotated[Path, tyro.conf.Positional], radius: float = 1.0, points: int = 25, out: Path | None = None
    ) -> dict[str, Any]:
        """Draw the loss around the final point of a run: along q_1, q_2 and the step, and over the planes they span.

        Args:
            run: Folder of the run.
            radius: How far to each side, in the unit of the parameters.
            points: On each side of a plane.
            out: Folder of the figures; default that of the run.
        """
        return locals()

    asked = tyro.cli(options, args=arguments, prog="curvlab landscape")
    from .. import landscape, plots
    from ..problems.experiments import final_point

    end = final_point(asked["run"])
    L, w, given = end.problem.objective, end.w, {"radius": asked["radius"]}
    step = -end.experiment.lr * L.gradient(w)
    figures = {
        "landscape_lines": plots.lines(landscape.top_lines(L, w, step=step, **given)),
        "landscape_q1_q2": plots.plane(landscape.top_plane(L, w, points=asked["points"], **given)),
        "landscape_q1_step": plots.plane(landscape.top_plane(L, w, step=step, points=asked["points"], **given)),
    }
    for path in plots.save({(asked["out"] or asked["run"]) / name: figure for name, figure in figures.items()}):
        print(path)
    return 0
