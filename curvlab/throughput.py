"""How fast Hessian-vector products are on this machine: engines, and other ways to compute them, timed side by side."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from .hvp import ENGINES, KEEP_NOTHING, Engine, HessianProducts
from .linalg.probes import generator, normal
from .objective import Objective
from .timing import Spread, Stages, column, one_stage, synchronize, timed

PRODUCTS = 3  # timed at a point, one after another
SECONDS = 30.0  # that a comparison may take where the number of rounds is not given
ROUNDS = (3, 30)
EAGER: tuple[Engine, ...] = tuple(engine for engine in ENGINES if engine != "compiled")

Product = Callable[[Tensor], Tensor]
Start = Callable[[], Product]


@dataclass(frozen=True)
class Speed:
    """Of one way to compute H v. What could not be measured is None, and `note` says why.

    Attributes:
        name: what was asked for.
        used: what it was in fact, such as another engine that it fell back to.
        first: seconds of all that comes before the products at a new point, with loss and gradient.
        product: seconds of one product, the vector's and the result's form included.
        first_ratio, product_ratio: the same, in gradients of the same data and round.
        setup: seconds that only the very first product took, such as for recording or compiling.
        nbytes: what is kept at a point for its products.
        difference: of its product from the first candidate's, relative.
    """

    name: str
    used: str | None = None
    first: Spread | None = None
    product: Spread | None = None
    first_ratio: Spread | None = None
    product_ratio: Spread | None = None
    setup: float | None = None
    nbytes: int | None = None
    difference: float | None = None
    note: str = ""

    @property
    def per_second(self) -> float | None:
        return None if self.product is None else 1 / self.product.median

    def seconds(self, products: int, points: int) -> float:
        """What so many products at each of so many points take, with what comes before them."""
        assert self.first is not None
        assert self.product is not None
        assert self.setup is not None
        return self.setup + points * (self.first.median + products * self.product.median)


def throughput(
    L: Objective, w: Tensor | None = None, *, engines: Sequence[Engine] = EAGER, rounds: int | None = None
) -> list[Speed]:
    """Every engine on an objective, against `L.gradient`; medians and quartiles over rounds.

    Args:
        w: (P,) where; default the model's current parameters.
        engines: which; "compiled" takes 10-150 s before the first product.
        rounds: how often everything is repeated; default as often as half a minute allows, 3 to 30 times.

    Raises:
        ValueError: an unknown engine, no engine, or less than one round.

    Example:
        >>> import torch
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> L = Objective(torch.nn.Linear(3, 1), "squared_error", (x, y))
        >>> [speed.used for speed in throughput(L, engines=["graph", "double_backward"], rounds=2)]
        ['graph', 'double_backward']
    """
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise ValueError(f"engines are {tuple(engines)}; expected some of {ENGINES}")
    w = L.point(w)
    made: dict[str, tuple[str, int, str]] = {}
    starts: dict[str, Start] = {engine: engine_start(L, w, engine, made) for engine in engines}
    v = probe(L)
    with suppress(ValueError):  # no second derivative, or a wrong one
        HessianProducts(L, w, engine="double_backward").matmat(v[:, None])  # what torch sets up once is no engine's
    _ = L.graph_bytes
    with _notes() as log:
        found = compare(lambda: L.gradient(w), starts, v, rounds=rounds, log=log)
    return [_described(speed, *made[speed.name]) if speed.first else speed for speed in found]


def compare(
    gradient: Callable[[], object],
    starts: Mapping[str, Start],
    v: Tensor,
    *,
    rounds: int | None = None,
    log: list[str] | None = None,
) -> list[Speed]:
    """Any ways to compute products, each a function that does what comes first at a point and gives H.

    Args:
        gradient: what ratios are to.
        v: (P,) that all are multiplied with.
        log: where a candidate writes lines that become its `note`.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    device, log = v.device, [] if log is None else log
    gradient()
    tried: dict[str, Speed] = {}
    reference, spent = None, 0.0
    for name, start in starts.items():
        log.clear()
        try:
            cold, result = _once(start, v)
            warm, _ = _once(start, v)
        except Exception as error:  # whatever a model, a loss or another library raises
            tried[name] = Speed(name, note=_line(error))
            continue
        reference = result if reference is None else reference
        difference = float((result - reference).double().norm() / reference.double().norm().clamp(min=1e-300))
        tried[name] = Speed(name, name, setup=max(0.0, cold - warm), difference=difference, note="; ".join(log))
        spent += PRODUCTS * warm
    working = [name for name, speed in tried.items() if speed.used]
    if working:
        count = rounds or int(np.clip(SECONDS / max(spent, 1e-9), *ROUNDS))
        stages = [one_stage(gradient, PRODUCTS), *(_stages(starts[name], v) for name in working)]
        seconds = timed(stages, count, device=device, warm_up=1)[:, :, column(device)]
        seconds[:, [0, *range(2, seconds.shape[1], 2)]] /= PRODUCTS
        ratios = seconds / seconds[:, :1]
        for i, name in enumerate(working):
            first, product = 1 + 2 * i, 2 + 2 * i
            tried[name] = replace(
                tried[name],
                first=Spread.of(seconds[:, first]),
                product=Spread.of(seconds[:, product]),
                first_ratio=Spread.of(ratios[:, first]),
                product_ratio=Spread.of(ratios[:, product]),
            )
    return list(tried.values())


def recommended(speeds: Sequence[Speed], *, products: int = 20, points: int = 1) -> Speed:
    """The engine that takes least time for so many products at each of so many points, with what comes before them.

    Differences, which are approximate, only where nothing else works.

    Raises:
        ValueError: none of them works.
    """
    working = [speed for speed in speeds if speed.first is not None and speed.used == speed.name]
    if not working:
        raise ValueError(f"no engine works: {'; '.join(f'{s.name}: {s.note}' for s in speeds)}")
    exact = [speed for speed in working if speed.name != "differences"]
    return min(exact or working, key=lambda speed: speed.seconds(products, points))


def probe(L: Objective) -> Tensor:
    """The vector that is multiplied, (P,)."""
    return normal((L.num_params,), L.params(), generator=generator("throughput"))


def engine_start(L: Objective, w: Tensor, engine: Engine, made: dict[str, tuple[str, int, str]] | None = None) -> Start:
    """What an engine does first at a point; in `made`, the engine that it is in fact, bytes kept, and a note."""
    own = copy.copy(L)
    vars(own).pop("_recordings", None)  # each engine makes its own, so that each pays for it

    def start() -> Product:
        products = HessianProducts(own, w, engine=engine)
        products.value_and_gradient()
        kept, chunks = products.kept, len(products.chunks)
        note = "" if kept == chunks or engine in KEEP_NOTHING else f"keeps {kept} of {chunks} chunks"
        if made is not None:
            made[engine] = products.engine, products.nbytes, "approximate" if engine == "differences" else note
        return lambda v: products.matmat(v[:, None])[:, 0]

    return start


def _described(speed: Speed, used: str, nbytes: int, kept: str) -> Speed:
    return replace(speed, used=used, nbytes=nbytes, note="; ".join(filter(None, (speed.note, kept))))


def _once(start: Start, v: Tensor) -> tuple[float, Tensor]:
    synchronize(v.device)
    clock = time.perf_counter()
    result = start()(v)
    synchronize(v.device)
    return time.perf_counter() - clock, result


def _stages(start: Start, v: Tensor) -> Stages:
    def stages() -> Iterator[None]:
        product = start()
        yield
        for _ in range(PRODUCTS):
            product(v)
        yield

    return stages


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextmanager
def _notes() -> Iterator[list[str]]:
    """The lines that the package logs meanwhile, instead of being printed."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("curvlab")
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
