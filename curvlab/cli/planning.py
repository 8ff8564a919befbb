"""`curvlab plan`: what a measurement takes of each of several devices, before there are any."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import tyro

from .points import PLAIN, Point, Settings, Source, ask, of_model, of_run, one_source
from .text import table

if TYPE_CHECKING:
    from ..planning import Plan

OF_A_MODEL = ("checkpoint", "data", "loss", "parameters", "population_size", "device")  # which sizes alone do not have


def plan_command(arguments: list[str]) -> int:
    def options(
        source: tyro.conf.OmitArgPrefixes[Source],
        settings: tyro.conf.OmitArgPrefixes[Settings],
        diagnostics: tuple[str, ...] = PLAIN,
        batch_size: tuple[int, ...] = (),
        lr: float | None = None,
        k: int | None = None,
        params: float | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        activations: str | None = None,
        ranks: int = 1,
        device_memory: str | None = None,
        flops: float | None = None,
        bandwidth: float | None = None,
        json: bool = False,
    ) -> dict[str, Any]:
        """Products, memory, messages and time of a measurement, before it is paid for.

        Some of it is rehearsed here: on the end of a run or a model of one's own, as `curvlab measure` takes them, or on a
        small net where only sizes are given (--params 7e9 --tokens 2048 --examples 1024). The exit status is 1 if it does
        not fit.

        Args:
            diagnostics: What to measure (see `curvlab list`).
            batch_size: b of S_b.
            lr: Learning rate, for what depends on a step.
            k: How many eigenpairs, of the diagnostics that have this option.
            params: Number of parameters; default that of the run or model.
            examples: How many; default those of the run or model.
            tokens: Of each example, of a transformer.
            activations: Bytes that the graph of an example's gradient keeps, such as 2GiB; default as found on the run or
                model, or that of a transformer.
            ranks: Devices that share the examples.
            device_memory: Of each device, such as 80GiB; default of the one here.
            flops: Operations a second that a device reaches in a gradient; default what is reached here.
            bandwidth: Bytes a second from each device to the others.
            json: Print JSON.
        """
        return locals()

    asked = ask(options, arguments, "plan")
    at = _point(asked)
    import torch

    from ..diagnostics import DIAGNOSTICS
    from ..planning import plan

    given = ("params", "examples", "tokens", "activations", "ranks", "device_memory", "flops", "bandwidth", "seed")
    k, names = asked["k"], asked["diagnostics"]
    own = {name for name in names if k is not None and name in DIAGNOSTICS and "k" in DIAGNOSTICS[name].options}
    sizes, lr = asked["batch_size"], asked["lr"]
    if at is not None:
        sizes, lr = sizes or at.batch_size, at.lr if lr is None else lr
    made = plan(
        None if at is None else at.objective, [(name, {"k": k} if name in own else {}) for name in names],
        w=None if at is None else at.w, test=None if at is None else at.test, batch_size=sizes or None, lr=lr,
        dtype=getattr(torch, asked["dtype"] or "float32"), chunk_size=asked["chunk_size"], memory=asked["memory"],
        **{name: asked[name] for name in given},
    )  # fmt: skip
    print(_json(made) if asked["json"] else f"{_heading(made)}\n{_table(made)}\n\n{made}")
    return int(not made.fits)


def _point(asked: dict[str, Any]) -> Point | None:
    """The run or the model that was asked for; None for sizes alone."""
    if asked["run"] or asked["model"]:
        one_source(asked, "plan")
        return of_run(asked) if asked["run"] else of_model(asked)
    if odd := [name for name in OF_A_MODEL if asked[name]]:
        listing = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise ValueError(f"{listing}: of a model of one's own; add --model package.module:make_model, or leave them out")
    return None


def _heading(made: Plan) -> str:
    s = made.size
    return f"P = {s.params:.4g}, N = {s.examples}, {s.ranks} {'ranks' if s.ranks > 1 else 'rank'} of {s.share} examples"


def _table(made: Plan) -> str:
    from ..cost import duration
    from ..memory import readable

    rows = [
        (name or "in all", str(c.products), f"{c.gradients:.3g}", f"{c.vectors:.0f}", readable(c.bytes), readable(c.sent),
         duration(c.seconds))
        for name, c in made.costs.items()
    ]  # fmt: skip
    return table(("quantity", "products", "gradients", "vectors", "peak", "sent", "computing"), rows)


def _json(made: Plan) -> str:
    derived = ("bytes", "fits", "sent_by_product", "seconds")
    return json.dumps(asdict(made) | {name: getattr(made, name) for name in derived}, indent=2)
