"""SIGINT and SIGTERM as a wish that is granted at the end of a step."""

import signal
from types import FrameType
from typing import Self


class Interrupts:
    """Context in which the first signal is noted in ``number``; a second one acts as it always did.

    Only the main thread can set handlers; in others nothing is noted.
    """

    def __init__(self):
        self.number = 0
        self._before: dict = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread
            self._before.clear()
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
