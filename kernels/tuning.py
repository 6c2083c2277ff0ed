"""Which tile a launch uses: the shipped choice, or with ``FASTRES_AUTOTUNE=1`` a measured one.

Shipped is the default: a first call then takes no minute, sums are added in the same order in every
process (same bits), and a launch may be captured into a CUDA graph at once. Measuring runs on
outputs of its own, and its results are kept in Triton's cache on disk.
"""

import functools
import os
import threading
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from . import configs
from .configs import Problem, Tile

_lock = threading.Lock()
_measured: dict[tuple, Tile] = {}


def choose(
    kernel, problem: Problem, key: tuple, like: Tensor, measure: Callable[..., object]
) -> Tile:
    """The tile for ``kernel`` on ``problem``. ``measure(tuner)`` launches ``tuner``, which stands
    for the kernel without a tile, on fresh outputs; ``key`` tells launches apart that differ in
    more than the problem."""
    shipped = configs.shipped(problem)
    if os.environ.get("FASTRES_AUTOTUNE", "0") != "1":
        return shipped
    key = (kernel, problem, key, like.dtype, like.device)
    tile = _measured.get(key)
    if tile is None:
        if not _measurable(like):
            return shipped
        with _lock:  # the tuner keeps its best configuration in an attribute
            tuner = tuner_of(kernel, problem)
            measure(tuner)
            best = tuner.best_config.all_kwargs()
        tile = Tile(**{name: best[name] for name in Tile._fields})
        _measured[key] = tile
    return tile


def _measurable(like: Tensor) -> bool:
    """Not while a graph is traced or captured."""
    if like.device.type != "cuda" or type(like) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch.cuda.is_current_stream_capturing()


@functools.cache
def tuner_of(kernel, problem: Problem, do_bench=None):
    """``problem`` belongs to the key by way of what is cached here: the candidates are pruned for
    it, so every problem has a tuner, and a file on disk, of its own."""
    pruned = [
        triton.Config(
            {name: value for name, value in tile._asdict().items() if not name.startswith("num_")},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for tile in configs.candidates(problem)
    ]
    sizes = [name for name in kernel.arg_names if name in _SIZES]
    return triton.autotune(pruned, key=sizes, cache_results=True, do_bench=do_bench)(kernel)


# Arguments that change how long a tile takes; Triton adds the dtypes.
_SIZES = {
    "pixels", "height", "width", "channels", "filters", "out_height", "out_width", "group_channels",
    "stride_h", "stride_w", "dilation_h", "dilation_w", "step_h", "step_w", "R", "S", "RELU",
    "PLAIN", "FLAT", "PADDED", "PRECISION",
}  # fmt: skip
