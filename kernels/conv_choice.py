"""Which convolutions Triton's kernels serve, and which the vendor's, as data.

The kernels of this package stand around the vendor's convolutions too (statistics, normalisation,
addition, ReLU), so that either way the numbers are the operator's.
"""

import contextlib

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import configs
from .conv_class import class_of
from .conv_shape import MOST_PIXELS

# What a convolution is asked for:
PASSES = (
    "conv",  # the output alone
    "eval",  # with batch norm, addition and ReLU in its epilogue
    "eval, one image",
    "training",  # with the batch's statistics in its epilogue
    "dgrad",
    "wgrad",
    # of a convolution of relu(batch_norm(x)) in training, x being what is in memory:
    "bn_relu_conv",  # with the batch's statistics in its epilogue
    "bn_relu_conv_dgrad",  # through the ReLU, with batch norm's sums
    "bn_relu_conv_wgrad",
)

# By (architecture, precision) and pass the classes of shape, as class_of names them, that Triton's
# kernels serve on a GPU. Only what was measured to be faster there than the vendor's belongs here;
# nothing has been measured yet, so the vendor's serve everything. `make gpu` measures, and writes
# what to put here to bench/results/<device>/conv_choice.py.
SERVED: dict[tuple[int, str], dict[str, frozenset[str]]] = {}


def serves(
    what: str, activation: Tensor, weight_size, stride, dilation, groups: int, *,
    last: bool, most_pixels: int, allow_tf32: bool,
) -> bool:  # fmt: skip
    """Whether Triton's kernels serve the pass ``what``. ``last``: its result is channels_last,
    ``most_pixels``: the larger of its two maps, all images together."""
    if not last or activation.dtype == torch.float64 or most_pixels > MOST_PIXELS:
        return False
    if activation.device.type != "cuda":  # Triton's interpreter, which multiplies bf16's bits
        return activation.dtype != torch.bfloat16
    half = activation.dtype != torch.float32
    precision = "half" if half else "tf32" if allow_tf32 else "ieee"
    served = SERVED.get((configs.architecture(activation.device), precision), {})
    return class_of(weight_size, stride, dilation, groups) in served.get(what, ())


def is_last(*tensors: Tensor) -> bool:
    """Whether any is channels_last: then so is what a convolution of them gives."""
    return torch.channels_last in [suggest_memory_format(tensor) for tensor in tensors]


@contextlib.contextmanager
def serving(table: dict[tuple[int, str], dict[str, frozenset[str]]]):
    """Inside, ``table`` stands for ``SERVED``: to measure or test what it does not hold yet."""
    global SERVED
    before, SERVED = SERVED, table
    try:
        yield
    finally:
        SERVED = before
