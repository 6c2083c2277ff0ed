"""How far Winograd's convolutions may trade accuracy for speed on the CPU.

F(m x m, 3 x 3) computes tiles of m x m pixels with (m + 2)^2 multiplications instead of 9 m^2 and
rounds more the larger m is (Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural
Networks"). The choice is one for the process, as :class:`fastres.backend` is.
"""

import os
from typing import Self

from . import ops

ENVIRONMENT_VARIABLE = "FASTRES_WINOGRAD"
# the largest tile: what the extension's limit_winograd_tile takes
_TILES = {"auto": 1 << 32, "4": 4, "2": 2, "off": 0}


class winograd:
    """Context manager: the largest tile m that F(m x m, 3 x 3) may use inside.

    ``"auto"`` (what is fastest), 4, 2, or ``"off"`` (convolutions multiply as they are defined).

    >>> with fastres.winograd("off"):
    ...     careful = model(images)

    Raises ``ValueError`` for another choice.
    """

    def __init__(self, tile: str | int):
        _validate(tile, "tile")
        self.tile = str(tile)
        self._outer: list[str] = []  # a stack: the same object may be entered again inside itself

    def __enter__(self) -> Self:
        self._outer.append(_chosen)
        _choose(self.tile)
        return self

    def __exit__(self, *exception) -> None:
        _choose(self._outer.pop())


def _validate(tile: str | int, argument: str) -> None:
    if isinstance(tile, bool) or str(tile) not in _TILES:
        raise ValueError(f"{argument}: expected 'auto', 4, 2 or 'off', got {tile!r}")


def _choose(tile: str) -> None:
    global _chosen
    _chosen = tile
    if ops.extension is not None:  # PyTorch's own convolutions know no Winograd on a CPU
        ops.extension.limit_winograd_tile(_TILES[tile])


_chosen = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
_validate(_chosen, ENVIRONMENT_VARIABLE)
_choose(_chosen)
