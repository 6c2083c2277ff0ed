"""Which kernel and tile a launch uses: the shipped choice, or with ``FASTRES_AUTOTUNE=1`` a
measured one.

Shipped is the default: a first call then takes no minute, sums are added in the same order in every
process (same bits), and a launch may be captured into a CUDA graph at once. Measuring runs on
outputs of its own, and its results are kept in Triton's cache on disk.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import configs
from .configs import Problem, Tile

_lock = threading.Lock()
_measured: dict[tuple, tuple[int, Tile]] = {}


class Way(NamedTuple):
    """A kernel that computes a problem, in one of ``tiles``."""

    kernel: object
    problem: Problem
    launch: Callable[..., object]
    tiles: tuple[Tile, ...]


def choose(
    ways: Sequence[Way], key: tuple, like: Tensor, measure: Callable[[Way, object], object],
    tile: Tile | None = None,
) -> tuple[Way, Tile]:  # fmt: skip
    """The way to compute a problem and its tile, ``tile`` where it is given. The first way's launch
    takes all tiles but those on descriptors, which are not shipped.

    ``measure(way, tuner)`` launches ``tuner``, which stands for the way's kernel without a tile, on
    fresh outputs; ``key`` tells launches apart that differ in more than the problem.
    """
    if tile is not None:
        return ways[-1 if tile.descriptors else 0], tile
    tiles = tuple(tile for way in ways for tile in way.tiles if not tile.descriptors)
    shipped = ways[0], configs.shipped(ways[0].problem, tiles)
    if os.environ.get("FASTRES_AUTOTUNE", "0") != "1":
        return shipped
    key = (ways[0].kernel, ways[0].problem, len(ways), key, like.dtype, like.device)
    if key not in _measured:
        if not _measurable(like):
            return shipped
        with _lock:  # the tuner keeps its best configuration in an attribute
            _measured[key] = _fastest(ways, measure)
    index, tile = _measured[key]
    return ways[index], tile


def _fastest(ways: Sequence[Way], measure) -> tuple[int, Tile]:
    """Index of the way, and its tile."""
    found = []
    for index, way in enumerate(ways):
        if not way.tiles:
            continue
        tuner = tuner_of(way.kernel, way.problem, way.tiles)
        measure(way, tuner)
        best = tuner.best_config.all_kwargs()
        tile = next(t for t in way.tiles if all(best[k] == v for k, v in t.keywords.items()))
        if len(ways) == 1:
            return index, tile
        timings = getattr(tuner, "configs_timings", None)
        if timings:
            median, *_ = timings[tuner.best_config]
        else:  # of a single tile, which a tuner does not time: with what else the way launches
            median, *_ = tuner.do_bench(
                functools.partial(measure, way, tuner), quantiles=(0.5, 0.2, 0.8)
            )
        found.append((median, index, tile))
    return min(found)[1:]


def _measurable(like: Tensor) -> bool:
    """Not while a graph is traced or captured."""
    if like.device.type != "cuda" or type(like) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch.cuda.is_current_stream_capturing()


@functools.cache
def tuner_of(kernel, problem: Problem, tiles: tuple[Tile, ...], do_bench=None):
    """``problem`` belongs to the key by way of what is cached here: its tiles are pruned for it, so
    every problem has a tuner, and a file on disk, of its own."""
    pruned = [
        triton.Config(
            {name: value for name, value in tile.keywords.items() if not name.startswith("num_")},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for tile in tiles
    ]
    sizes = [name for name in kernel.arg_names if name in _SIZES]
    return triton.autotune(pruned, key=sizes, cache_results=True, do_bench=do_bench)(kernel)


# Arguments that change how long a tile takes; Triton adds the dtypes.
_SIZES = {
    "images", "pixels", "rows", "columns", "height", "width", "channels", "filters", "out_height",
    "out_width", "group_channels", "stride_h", "stride_w", "dilation_h", "dilation_w", "step_h",
    "step_w", "R", "S", "STRIDE_H", "STRIDE_W", "RELU", "PLAIN", "FLAT", "PADDED", "PRECISION",
    "MERGED",
}  # fmt: skip
