"""1x1 convolutions of stride 1 as a matrix product on tensor descriptors: Hopper's and Blackwell's
way of copying tiles into shared memory (TMA), without an address a thread.

A grid of as many programs as there are multiprocessors walks over all tiles, so that the next
tile's copies begin while the last one's sums are stored. Not the shipped choice: ``tuning`` may
choose it where it was measured to be faster. Other filters stay with ``conv_fprop``: Triton's
descriptors know neither padding within a map nor strides.
"""

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_epilogue import finish
from .conv_shape import Shape
from .conv_tile import place_of
from .layout import multiprocessors

_ALIGNMENT = 16  # bytes, of every row of a matrix that a descriptor describes


@triton.jit
def pointwise_kernel(
    x,  # (pixels, C)
    w,  # (K, C)
    y,  # (pixels, K)
    bias,  # (K,) or None
    mean,  # (K,) or None
    variance,  # (K,) or None
    scale,  # (K,) or None
    shift,  # (K,) or None
    residual,  # (pixels, K) or None
    means,  # (tiles of pixels, K) or None
    squares,  # (tiles of pixels, K) or None
    pixels,
    channels,
    filters,
    eps,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As ``fprop_kernel``, see there. What a tile reads beyond the last row or column is 0."""
    activations = tl.make_tensor_descriptor(
        x, [pixels, channels], [channels, 1], [BLOCK_M, BLOCK_K]
    )
    weights = tl.make_tensor_descriptor(w, [filters, channels], [channels, 1], [BLOCK_N, BLOCK_K])
    row_tiles = tl.cdiv(pixels, BLOCK_M)
    column_tiles = tl.cdiv(filters, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        m, n = place_of(tile, row_tiles, column_tiles, GROUP_M)
        acc = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
        for first in range(0, channels, BLOCK_K):
            a = activations.load([m * BLOCK_M, first])
            b = weights.load([n * BLOCK_N, first])
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        k = n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish(
            acc, y, bias, mean, variance, scale, shift, residual, means, squares,
            m, m * BLOCK_M + tl.arange(0, BLOCK_M), k, k < filters, pixels, filters, eps,
            RELU, BLOCK_M,
        )  # fmt: skip


def fits(shape: Shape, groups: int, x: Tensor, w: Tensor) -> bool:
    """Whether the kernel computes such a convolution. Not while a graph is traced: a graph would
    have to know of the memory that descriptors need."""
    if not shape.pointwise or groups > 1 or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    places = (shape.channels * x.element_size(), x.data_ptr(), w.data_ptr())
    return all(place % _ALIGNMENT == 0 for place in places)


def launch(kernel, shape: Shape, x: Tensor, *operands, **keywords) -> None:
    """``operands``: the kernel's others up to ``squares``; ``keywords`` has eps and the constants."""

    def programs(meta):
        tiles = triton.cdiv(shape.pixels, meta["BLOCK_M"])
        tiles *= triton.cdiv(shape.filters, meta["BLOCK_N"])
        return (min(tiles, multiprocessors(x.device)),)

    def run():
        triton.set_allocator(lambda size, alignment, stream: x.new_empty(size, dtype=torch.int8))
        kernel[programs](
            x, *operands, shape.pixels, shape.channels, shape.filters, **keywords
        )  # fmt: skip

    # the allocator is Triton's for the context: the caller's stays what it was
    contextvars.copy_context().run(run)
