"""`curvlab measure` and `curvlab landscape`: the final point of a run, or a model of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .text import table

if TYPE_CHECKING:
    from torch import Tensor

    from ..objective import Objective

PLAIN, INTERACTION = ("loss", "gradient_norm", "sharpness"), ("interaction_sharpness", "instability")
OWN = ("parameters", "population_size", "device", "dtype", "chunk_size", "memory")  # settings of `Objective`


@dataclass(frozen=True)
class Point:
    """What is measured, and what is known of the training there."""

    name: str
    objective: Objective
    w: Tensor | None = None
    step: int | None = None
    batch_size: int | None = None
    replacement: bool = False
    lr: float | None = None
    test: Objective | None = None


@dataclass(frozen=True)
class Source:
    """The end of a run that `curvlab run` made, or a model of one's own.

    Attributes:
        run: Folder of the run.
        model: Instead of a run: package.module:make_model, a function that returns the nn.Module, or the module itself.
            The current directory is importable.
        data: With --model: package.module:make_data, a function that returns (inputs, targets), a Dataset, a DataLoader,
            or a list of batches; or one of these.
        checkpoint: With --model: a state dict that torch.save wrote, also inside a training checkpoint; or final.pt of
            a run of curvlab.train. Default: the parameters that the model has.
        loss: With --model: cross_entropy (the default), squared_error, binary_cross_entropy, token, next_token, or
            package.module:loss, such as torch.nn:CrossEntropyLoss.
        seed: Of the random probes, and with --model of what the functions draw.
        parameters: With --model: names or patterns of the parameters that are measured, such as 'head.*'; default all.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    model: str = ""
    data: str = ""
    checkpoint: Path | None = None
    loss: str = ""
    seed: int = 0
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How a model that is no run is measured.

    Attributes:
        population_size: With --model: how many examples training has, where the data are a sample of them.
        device: Where to measure; default where the model is.
        dtype: Precision of measuring; default that of the model.
        chunk_size: Examples evaluated at once; default what fits in memory.
        memory: Budget for kept graphs, such as 2GiB.
    """

    population_size: int | None = None
    device: str | None = None
    dtype: Literal["float32", "float64"] | None = None
    chunk_size: int | None = None
    memory: str | None = None


def ask(options: Callable[..., dict[str, Any]], arguments: list[str], command: str) -> dict[str, Any]:
    """What a command was asked for, by name; those of `Source` and `Settings` among the others."""
    asked = tyro.cli(options, args=arguments, prog=f"curvlab {command}")
    groups = [name for name, value in asked.items() if isinstance(value, Source | Settings)]
    for name in groups:
        asked |= vars(asked.pop(name))
    return asked


def measure_command(arguments: list[str]) -> int:
    def options(
        source: tyro.conf.OmitArgPrefixes[Source],
        settings: tyro.conf.OmitArgPrefixes[Settings],
        diagnostics: tuple[str, ...] = (),
        batch_size: tuple[int, ...] = (),
        lr: float | None = None,
        json: bool = False,
        figure: Path | None = None,
    ) -> dict[str, Any]:
        """Measure the final point of a run that `curvlab run` made, or a model of one's own.

        Args:
            diagnostics: What to measure (see `curvlab list`); default loss, gradient_norm, sharpness, and where b is known
                interaction_sharpness and instability.
            batch_size: b of S_b; several give a curve; default that of the run.
            lr: Learning rate, for what depends on a step; default that of the run.
            json: Print JSON.
            figure: Draw what has an axis (spectra, layers, curves) to this file.
        """
        return locals()

    asked = ask(options, arguments, "measure")
    one_source(asked)
    from ..point import measure

    at = of_run(asked) if asked["run"] else of_model(asked)
    sizes = asked["batch_size"] or (() if at.batch_size is None else (at.batch_size,))
    lr = at.lr if asked["lr"] is None else asked["lr"]
    names = asked["diagnostics"] or (*PLAIN, *(INTERACTION if sizes else ()))
    found = measure(
        at.objective, names, w=at.w, batch_size=sizes if len(sizes) > 1 else sizes[0] if sizes else None,
        replacement=at.replacement, lr=lr, test=at.test, seed=asked["seed"],
    )  # fmt: skip
    if asked["json"]:
        measured = {name: m.to_dict() for name, m in found.items()}
        print(json.dumps({"step": at.step, "measurements": measured}, indent=2))
    else:
        print(heading(at, sizes, lr))
        print(_measurement_table(found))
    if asked["figure"]:
        from .. import plots

        title = Path(at.name).name + ("" if at.step is None else f", step {at.step}")
        plots.measurements(found, title=title).savefig(asked["figure"], dpi=150)
    return 0


def one_source(asked: dict[str, Any], command: str = "measure") -> None:
    """Refuse both a run and a model, neither of them, and settings that the other would have."""
    if bool(asked["run"]) == bool(asked["model"]):
        raise ValueError(
            f"{command} takes a run or a model: curvlab {command} RUN, or curvlab {command} --model "
            "package.module:make_model --data package.module:make_data --checkpoint weights.pt"
        )
    if asked["model"] and not asked["data"]:
        raise ValueError(f"--model {asked['model']} needs data: add --data package.module:make_data")
    own = ("data", "loss", "checkpoint", *OWN)
    odd = [name for name in own if asked["run"] and asked.get(name) not in (None, "", ())]
    if odd:
        listing = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise ValueError(f"{listing}: settings of a model of one's own (--model); a run states its own, leave them out")


def of_run(asked: dict[str, Any]) -> Point:
    """The end of the run that was asked for."""
    from ..problems.experiments import final_point

    end = final_point(asked["run"])
    return Point(
        str(asked["run"]), end.problem.objective, end.w, end.step, end.batch_size, end.experiment.replacement,
        end.experiment.lr, end.problem.test,
    )  # fmt: skip


def of_model(asked: dict[str, Any]) -> Point:
    """The model, data, loss and settings that were asked for."""
    from .own import objective

    given = {name: asked[name] for name in OWN if asked.get(name) not in (None, ())}
    L, step = objective(
        asked["model"],
        asked["data"],
        asked["loss"] or "cross_entropy",
        seed=asked["seed"],
        checkpoint=asked["checkpoint"],
        **given,
    )
    return Point(str(asked["checkpoint"] or asked["model"]), L, step=step)


def heading(at: Point, sizes: tuple[int, ...] = (), lr: float | None = None) -> str:
    """What is measured, in a line."""
    L = at.objective
    parts = [at.name, "" if at.step is None else f"step {at.step}", f"N = {L.size}", f"P = {L.num_params}"]
    parts += [f"b = {', '.join(map(str, sizes))}" if sizes else "", f"2/lr = {2 / lr:.5g}" if lr else ""]
    return ", ".join(part for part in parts if part)


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
