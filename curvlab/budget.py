"""What measuring may cost of the training time, and how far apart it has to be for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

STRIDE = 3  # spacings are powers of it: nested, so that what is measured rarely meets what is measured often; and odd,
# because dynamics at the edge of stability have period 2
MARGIN = 0.9  # of the budget is planned: costs vary
WIDEST = 12  # powers at most: one measurement in half a million


@dataclass
class Budget:
    """A share of the training time, and the spacing of each item that keeps to it.

    An item is measured at each 3^l-th of the steps at which it is due, with the least levels l for which

        Σ_items seconds / (steps between two measurements) ≤ share · seconds of a step of training.

    Whatever costs most per step is spaced first. The first measurement of an item is a loan, because its cost is not known
    before; half of the income repays loans. Beyond that nothing is measured while more than the share has been spent.

    Attributes:
        share: of the training time; 0.1 for a tenth.
        levels: l by item.
        seconds: what an item costs on its own, by an exponential average.
        trained, spent, loan: seconds so far; `spent` has the loans in it, `loan` is what is left of them.
        apart: seconds that what was measured together would have cost each on its own.
        steps: of training so far.
    """

    share: float
    levels: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    trained: float = 0.0
    spent: float = 0.0
    loan: float = 0.0
    apart: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"budget is {self.share}; expected a share of the training time, such as 0.1 for a tenth")

    def train(self, seconds: float, steps: int) -> None:
        """So much time went into so many steps of training."""
        self.trained += seconds
        self.steps += steps
        self.loan -= min(self.loan, self.share * seconds / 2)

    def pay(self, alone: Mapping[str, float], total: float) -> None:
        """So much was spent in all on items that would have cost so much each on its own."""
        self.spent += total
        self.apart += max(total, sum(alone.values()))
        if new := [item for item in alone if item not in self.seconds]:
            self.loan += total * sum(alone[item] for item in new) / (sum(alone.values()) or 1.0)
        for item, cost in alone.items():
            # a third at first: what the first measurement finds is where later ones start, and those cost less
            self.seconds[item] = (self.seconds[item] + cost) / 2 if item in self.seconds else cost / 3

    @property
    def in_debt(self) -> bool:
        """Whether more than the share of the training time has been spent, loans aside."""
        return self.spent - self.loan > self.share * self.trained

    def on(self, item: str, count: int) -> bool:
        """Whether the `count`-th time that an item is due, from 0, is one at which it is measured."""
        return item not in self.seconds or (count % STRIDE ** self.levels.get(item, 0) == 0 and not self.in_debt)

    def plan(self, spacing: Mapping[str, float], updates: Iterable[str] = ()) -> None:
        """Choose the levels anew, for items that are due every so many steps; `updates` get the rest, a third at least."""
        if not self.steps:
            return
        income = MARGIN * self.share * self.trained / self.steps * (0.5 if self.loan else 1.0)
        sharing = self.spent / self.apart if self.apart else 1.0
        rates = {i: sharing * self.seconds[i] / spacing[i] for i in spacing if i in self.seconds}
        levels = {item: 0 for item in rates if item not in updates}

        def rate(item: str) -> float:
            return rates[item] / STRIDE ** levels[item]

        waiting = [item for item in updates if item in rates]
        for_main = income * (2 / 3 if waiting else 1.0)
        while levels and sum(map(rate, levels)) > for_main and min(levels.values()) < WIDEST:
            levels[max((i for i in levels if levels[i] < WIDEST), key=rate)] += 1
        left = income - sum(map(rate, levels))
        for item in waiting:
            levels[item] = 0
            while rate(item) > left / len(waiting) and levels[item] < WIDEST:
                levels[item] += 1
        self.levels = levels
