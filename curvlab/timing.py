"""Timing candidates side by side: interleaved, in an order drawn anew, so that what disturbs the machine disturbs all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

WARM_UP = 2
Stages = Callable[[], Iterator[None]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Spread:
        low, median, high = (float(q) for q in np.quantile(samples, [0.25, 0.5, 0.75]))
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def timed(
    candidates: Sequence[Stages], rounds: int, *, device: torch.device | str = "cpu", warm_up: int = WARM_UP
) -> np.ndarray:
    """Seconds of every stage of every candidate in every round, (rounds, stages, 2): CPU time of the process, and the clock.

    A candidate is a function that yields at the end of each of its stages; what it holds is freed at its end. A round runs
    each candidate once, in an order drawn anew, without collection of garbage, and on a GPU waits for it at the end of each
    stage. Others on a machine disturb CPU time less than the clock; with several threads or a GPU only the clock counts.
    """
    device = torch.device(device)

    def run(candidate: Stages) -> list[tuple[float, float]]:
        synchronize(device)
        cpu, clock, spent = time.process_time(), time.perf_counter(), []
        for _ in candidate():
            synchronize(device)
            now = time.process_time(), time.perf_counter()
            spent.append((now[0] - cpu, now[1] - clock))
            cpu, clock = now
        return spent

    counts = [len([run(candidate) for _ in range(max(1, warm_up))][-1]) for candidate in candidates]
    ends = np.cumsum(counts)
    rng, seconds = np.random.default_rng(0), np.empty((rounds, int(ends[-1]), 2))
    gc.collect()
    gc.freeze()  # what is there is not looked through in every round
    try:
        for row in seconds:
            gc.collect()
            gc.disable()  # so that no candidate pays for another's rubbish
            for i in rng.permutation(len(candidates)):
                row[ends[i] - counts[i] : ends[i]] = run(candidates[i])
            gc.enable()
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


def one_stage(step: Callable[[], object], repeats: int = 1) -> Stages:
    """A candidate of a single stage: a function, called so many times."""

    def stages() -> Iterator[None]:
        for _ in range(repeats):
            step()
        yield

    return stages


def column(device: torch.device | str) -> int:
    """Which of the two times counts: CPU time for one thread of a CPU, otherwise the clock."""
    return 0 if torch.device(device).type == "cpu" and torch.get_num_threads() == 1 else 1


def synchronize(device: torch.device) -> None:
    """Wait for what a device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
