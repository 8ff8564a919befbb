"""`curvlab bench hvp`: which engine of Hessian-vector products is fastest for a model of one's own, a run, an example."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from .points import Point, Settings, Source, ask, heading, of_model, of_run, one_source
from .text import table

if TYPE_CHECKING:
    from ..throughput import Speed


def bench_command(arguments: list[str]) -> int:
    def options(
        source: tyro.conf.OmitArgPrefixes[Source],
        settings: tyro.conf.OmitArgPrefixes[Settings],
        problem: str = "",
        n: int | None = None,
        engines: tuple[str, ...] = (),
        compile: bool = False,
        products: int = 20,
        points: int = 1,
        rounds: int | None = None,
        json: bool = False,
        figure: Path | None = None,
    ) -> dict[str, Any]:
        """Time Hessian-vector products by every engine, and say which one to take.

        Everything is in gradients of the same data, medians with quartiles of interleaved rounds. On one thread of a CPU
        times are of the process, which others on the machine disturb little; otherwise they are by the clock.

        Args:
            problem: Instead of a run or a model: mlp, mlp_300k, cnn6, resnet18, gpt or vit, with a few examples.
            n: With --problem: how many examples.
            engines: Which engines; default all that need no compiling.
            compile: Also the compiled engine, which takes 10-150 s before its first product.
            products: How many products at each point the recommendation is for.
            points: At how many points, such as the measured steps of a run.
            rounds: How often everything is repeated; default as often as half a minute allows, 3 to 30 times.
            json: Print JSON.
            figure: Draw bars to this file.
        """
        return locals()

    if arguments[:1] != ["hvp"] and not {"-h", "--help"} & set(arguments):
        raise ValueError("bench measures hvp, Hessian-vector products: curvlab bench hvp --problem mlp")
    asked = ask(options, arguments[arguments[:1] == ["hvp"] :], "bench hvp")
    at = _point(asked)
    from ..throughput import EAGER, recommended, throughput

    engines = asked["engines"] or EAGER
    engines = (*engines, *(("compiled",) if asked["compile"] and "compiled" not in engines else ()))
    speeds = throughput(at.objective, at.w, engines=engines, rounds=asked["rounds"])
    best = recommended(speeds, products=asked["products"], points=asked["points"])
    if asked["json"]:
        print(_json(at, speeds, best, asked))
    else:
        print(f"{heading(at)}\n{_table(speeds)}\n\n{_advice(speeds, best, asked)}")
    if asked["figure"]:
        from .. import plots

        plots.throughput({heading(at): speeds}).savefig(asked["figure"], dpi=150)
    return 0


def _point(asked: dict[str, Any]) -> Point:
    """What was asked for: a problem by name, a run, or a model."""
    if not asked["problem"]:
        if asked["n"]:
            raise ValueError("--n is of --problem; data of one's own, and runs, have their number of examples")
        if not asked["run"] and not asked["model"]:
            raise ValueError(
                "bench hvp takes a run, a model or a problem: curvlab bench hvp RUN, curvlab bench hvp --problem mlp, or "
                "curvlab bench hvp --model package.module:make_model --data package.module:make_data"
            )
        one_source(asked, "bench hvp")
        return of_run(asked) if asked["run"] else of_model(asked)
    odd = [name for name in ("run", "model", "data", "loss", "checkpoint") if asked[name]]
    if odd:
        raise ValueError(f"--problem {asked['problem']} is a model with data and loss; leave out {', '.join(odd)}")
    from ..objective import Objective
    from ..problems import timed_problem
    from .own import as_taken

    model, loss, data = timed_problem(asked["problem"], asked["n"])
    names = ("parameters", "device", "dtype", "chunk_size", "memory")
    given = as_taken(**{name: asked[name] for name in names if asked[name] not in (None, ())})
    return Point(asked["problem"], Objective(model, loss, data, **given))


def _table(speeds: list[Speed]) -> str:
    head = (
        "engine",
        "used",
        "first, ms",
        "in gradients",
        "product, ms",
        "in gradients",
        "products/s",
        "kept",
        "once, s",
    )
    rows = []
    for s in speeds:
        if s.first is None or s.product is None or s.setup is None or s.nbytes is None:
            rows.append((s.name, "none", *[""] * 7, s.note))
            continue
        milliseconds = [f"{1e3 * spread.median:.2f}" for spread in (s.first, s.product)]
        rows.append((
            s.name, str(s.used), milliseconds[0], str(s.first_ratio), milliseconds[1], str(s.product_ratio),
            f"{s.per_second:.4g}", f"{s.nbytes / 2**20:.1f} MiB", f"{s.setup:.2f}", s.note,
        ))  # fmt: skip
    return table((*head, "note"), rows)


def _advice(speeds: list[Speed], best: Speed, asked: dict[str, Any]) -> str:
    """The engine to pass, and what the others would take."""
    count = asked["products"], asked["points"]
    others = [
        f"{s.name} {s.seconds(*count):.3g} s"
        for s in speeds
        if s.first is not None and s is not best and s.used == s.name
    ]
    points = "one point" if count[1] == 1 else f"each of {count[1]} points"
    default = ", which is the default" if best.name == "graph" else ""
    return (
        f'For {count[0]} products at {points}: engine="{best.name}"{default}, {best.seconds(*count):.3g} s'
        + (f" ({', '.join(others)})" if others else "")
        + f'\ncl.hessian(L, engine="{best.name}"); also of cl.train, cl.Monitor and cl.gradient_flow'
    )


def _json(at: Point, speeds: list[Speed], best: Speed, asked: dict[str, Any]) -> str:
    return json.dumps(
        {
            "objective": at.objective.describe(),
            "speeds": [asdict(speed) | {"per_second": speed.per_second} for speed in speeds],
            "recommendation": {
                "engine": best.name,
                "products": asked["products"],
                "points": asked["points"],
                "seconds": best.seconds(asked["products"], asked["points"]),
            },
        },
        indent=2,
    )
