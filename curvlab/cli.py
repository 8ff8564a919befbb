"""The command line: run a preset, measure a saved run, judge it, draw it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .problems.presets import ABOUT, PRESETS, Experiment
from .runs import Run

if TYPE_CHECKING:
    from .claims import Verdict

USAGE = """usage: curvlab COMMAND ...

  run [PRESET] [options]    train, measure every step, judge and draw; default preset: edge-of-stability
  measure RUN [options]     measure the final point of a run
  landscape RUN [options]   draw the loss around the final point of a run
  claims RUN ... [--json]   what runs say about the papers' claims
  plot RUN ...              draw the figures of runs
  list                      presets, diagnostics and claims

`curvlab COMMAND --help` lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "run": _run,
        "measure": _measure,
        "landscape": _landscape,
        "claims": _claims,
        "plot": _plot,
        "list": _list,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] not in commands:
        print(f"curvlab: there is no command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return commands[arguments[0]](arguments[1:])
    except (ValueError, FileNotFoundError, FileExistsError, KeyError) as error:
        print(f"curvlab: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    name = "edge-of-stability"
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")

    @dataclasses.dataclass(frozen=True)
    class Options:
        experiment: Annotated[Experiment, tyro.conf.OmitArgPrefixes] = PRESETS[name]
        out: Path | None = None
        """Folder of the run; default runs/PRESET-TIME."""

    options = tyro.cli(Options, args=arguments, prog=f"curvlab run {name}", description=ABOUT[name])
    folder = options.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs, interrupted = _train_all(options.experiment, folder)
    if runs:
        print(_verdict_table(_check(runs)))
        for path in _draw(runs, folder):
            print(f"figure: {path}")
    print(f"run:    {folder}")
    return 130 if interrupted else 0


def _train_all(experiment: Experiment, folder: Path) -> tuple[list[Run], bool]:
    from .problems.presets import build
    from .trainer import train

    runs: list[Run] = []
    several = len(experiment.batch_size) > 1
    for b in experiment.batch_size:
        place = folder / f"b{b or experiment.n}" if several else folder
        L, test, optimizer, batches = build(experiment, b)
        config = {"experiment": dataclasses.asdict(experiment), "run_batch_size": b}
        snapshots = train(
            L, optimizer, batches, diagnostics=experiment.diagnostics, every=experiment.every, run=place, config=config,
            test=test, seed=experiment.probe_seed,
        )  # fmt: skip
        runs.append(Run(place))
        if _follow(snapshots, experiment, f"b={batches.batch_size}" if several else ""):
            print(f"interrupted; what was measured is in {place}", file=sys.stderr)
            return [run for run in runs if run.records], True
    return runs, False


def _follow(snapshots: Any, experiment: Experiment, label: str) -> bool:
    """Train with a progress bar that shows the live numbers; True if it was interrupted."""
    from tqdm import tqdm

    shown = {"loss": "loss", "sharpness": "‖H‖", "interaction_sharpness": "‖H‖_S", "test_accuracy": "acc"}
    bar = tqdm(total=experiment.steps, desc=label or "training", unit="step", mininterval=0.2)
    bar.set_postfix({"2/lr": f"{2 / experiment.lr:.4g}"})
    try:
        for at in snapshots:
            bar.update()
            live = {s: str(at.measurements[n]).split(" ")[0] for n, s in shown.items() if n in at.measurements}
            if live:
                bar.set_postfix({"2/lr": f"{2 / experiment.lr:.4g}", **live}, refresh=False)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        snapshots.close()  # saves the parameters and closes the log
        bar.close()


def _measure(arguments: list[str]) -> int:
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
    from .point import measure

    experiment, L, test, b, final = _final_point(asked["run"])
    sizes = asked["batch_size"]
    size = (sizes if len(sizes) > 1 else sizes[0]) if sizes else b
    found = measure(
        L, asked["diagnostics"], w=final["params"], batch_size=size, replacement=experiment.replacement, lr=experiment.lr,
        test=test, seed=asked["seed"],
    )  # fmt: skip
    if asked["json"]:
        measured = {name: m.to_dict() for name, m in found.items()}
        print(json.dumps({"step": final["step"], "measurements": measured}, indent=2))
    else:
        print(
            f"{asked['run']}, step {final['step']}, N = {L.size}, P = {L.num_params}, b = {size}, "
            f"2/lr = {2 / experiment.lr:.5g}"
        )
        print(_measurement_table(found))
    if asked["figure"]:
        from . import plots

        plots.measurements(found, title=f"{asked['run'].name}, step {final['step']}").savefig(asked["figure"], dpi=150)
    return 0


def _final_point(path: Path) -> tuple[Experiment, Any, Any, int, dict[str, Any]]:
    """Experiment, training and test objective, batch size and saved tensors of a run that `curvlab run` made."""
    from .problems.presets import build, from_config

    run = Run(path)
    experiment, b = from_config(run.config)
    L, test, _, batches = build(experiment, b)
    final = run.load("final")
    L.model.load_state_dict(final["buffers"], strict=False)
    return experiment, L, test, batches.batch_size, final


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
    return _table(("quantity", "value ± error", "kind", "products", "seconds", "note"), rows)


def _landscape(arguments: list[str]) -> int:
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
    from . import landscape, plots

    experiment, L, _, _, final = _final_point(asked["run"])
    w, given = final["params"], {"radius": asked["radius"]}
    step = -experiment.lr * L.gradient(w)
    figures = {
        "landscape_lines": plots.lines(landscape.top_lines(L, w, step=step, **given)),
        "landscape_q1_q2": plots.plane(landscape.top_plane(L, w, points=asked["points"], **given)),
        "landscape_q1_step": plots.plane(landscape.top_plane(L, w, step=step, points=asked["points"], **given)),
    }
    for path in plots.save({(asked["out"] or asked["run"]) / name: figure for name, figure in figures.items()}):
        print(path)
    return 0


def _claims(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional], json: bool = False
    ) -> tuple[tuple[Path, ...], bool]:
        """What runs say about the papers' claims; several runs are also judged together.

        Args:
            runs: Run folders, or folders of runs.
            json: Print JSON.
        """
        return runs, json

    paths, as_json = tyro.cli(options, args=arguments, prog="curvlab claims")
    verdicts = _check(_expand(paths))
    print(
        json.dumps([dataclasses.asdict(v) for v in verdicts], indent=2, default=float)
        if as_json
        else _verdict_table(verdicts)
    )
    return 0


def _plot(arguments: list[str]) -> int:
    def options(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None
    ) -> tuple[tuple[Path, ...], Path | None]:
        """Draw the figures of runs, as PNG and PDF.

        Args:
            runs: Run folders, or folders of runs.
            out: Folder of the figures; default that of the runs.
        """
        return runs, out

    paths, out = tyro.cli(options, args=arguments, prog="curvlab plot")
    for path in _draw(_expand(paths), out):
        print(path)
    return 0


def _list(arguments: list[str]) -> int:
    def options() -> None:
        """Presets, diagnostics and claims."""

    tyro.cli(options, args=arguments, prog="curvlab list")
    from .claims import CLAIMS
    from .diagnostics import DIAGNOSTICS

    print("presets\n" + _table(("name", "what it shows"), list(ABOUT.items())))
    rows = [(d.name, d.symbol, d.formula, d.kind, d.cost) for d in DIAGNOSTICS.values()]
    print("\ndiagnostics\n" + _table(("name", "symbol", "formula", "kind", "cost"), rows))
    print("\nclaims\n" + _table(("name", "source", "claim"), [(c.name, c.source, c.sentence) for c in CLAIMS.values()]))
    return 0


def _check(runs: list[Run]) -> list[Verdict]:
    from .claims import check

    return check(runs)


def _draw(runs: list[Run], folder: Path | None) -> list[Path]:
    from .plots import plot

    return plot(runs, folder)


def _expand(paths: Sequence[Path]) -> list[Run]:
    """Run folders, and the runs inside folders that are none."""
    found: list[Run] = []
    for path in paths:
        inside = sorted((p.parent for p in path.glob("*/config.json")), key=lambda p: (len(p.name), p.name))
        found += [Run(p) for p in inside] if inside and not (path / "config.json").exists() else [Run(path)]
    if not found:
        raise ValueError("name at least one run folder, such as runs/edge-of-stability-...")
    return found


def _verdict_table(verdicts: list[Verdict]) -> str:
    rows = []
    for v in verdicts:
        number = (
            ""
            if v.statistic is None or v.interval is None
            else f"{v.statistic:.3f} [{v.interval[0]:.3f}, {v.interval[1]:.3f}]"
        )
        rows.append((v.claim, v.run, v.decision, number, v.reason))
    return _table(("claim", "run", "verdict", "statistic, 95%", "why"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
