"""Which section runs when and how long, so that all of them end within the time there is."""

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

REPORT_SECONDS = 8  # kept for what is written at the end


class Section(NamedTuple):
    """``least`` seconds are kept for it; ``most`` it may use where earlier ones needed less."""

    name: str
    least: float
    most: float
    where: str  # "module:function" of this package

    def load(self) -> Callable:
        module, function = self.where.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)


@dataclass
class Outcome:
    """What became of a section."""

    name: str
    state: str  # "done", "failed", "timed out" or "no time left"
    seconds: float
    rows: list[dict] = field(default_factory=list)
    tail: str = ""  # of what it printed

    @property
    def fine(self) -> bool:
        return self.state == "done" and not any(row.get("bad") for row in self.rows)

    @property
    def line(self) -> str:
        bad = sum(bool(row.get("bad")) for row in self.rows)
        return (
            f"{self.name}: {self.state}, {self.seconds:.0f} s, {len(self.rows)} results"
            + (f", {bad} of them bad" if bad else "")
        )


class Budget:
    """Seconds that a section may still use."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def share(self, things: Sequence) -> "Shares":
        return Shares(self, things)


class Shares:
    """``things`` one by one, each with its part of the time that is left; when there is none, the
    others are in ``left_out``."""

    def __init__(self, budget: Budget, things: Sequence):
        self._budget, self._things, self.left_out = budget, list(things), []

    def __iter__(self):
        for index, thing in enumerate(self._things):
            if self._budget.left <= 0:
                self.left_out = self._things[index:]
                return
            yield thing, self._budget.left / (len(self._things) - index)


def run(
    sections: Sequence[Section], seconds: float, start: Callable, finished: Callable,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:  # fmt: skip
    """``start(section, limit)`` runs one and gives its Outcome; ``finished`` gets those so far."""
    whole = Budget(seconds - REPORT_SECONDS, clock)
    outcomes = []
    for index, section in enumerate(sections):
        kept = sum(later.least for later in sections[index + 1 :])
        limit = min(section.most, max(whole.left - kept, section.least), whole.left)
        if limit < section.least / 2:
            outcome = Outcome(section.name, "no time left", 0)
        else:
            outcome = start(section, limit)
        outcomes.append(outcome)
        finished(outcomes)
    return outcomes
