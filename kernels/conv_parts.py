"""A convolution whose depth is split over programs: the parts' sums, added in their order, finished.

Of few pixels a convolution has few tiles and a long depth. ResNet-50's 3x3 of 512 channels on a single
7x7 map is 8 tiles of 64x64 and 72 steps of 16 KB each: 8 of an H200's 132 multiprocessors would load
for 72 * 16 KB / (55 bytes a ns) = 21 us. 15 parts of 5 steps are 120 programs of 1.5 us. Their sums,
15 * 49 * 512 * 4 bytes = 1.5 MB, stay in L2.

The kernel that adds them costs a launch, about 1 us in a CUDA graph, and 1.5 us of its own. The last
program of a tile could do it instead; but it would have to be told by a counter, which a launch must
set to 0 and which orders the memory of programs that run at once, and one program would read what 132
read here. No atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_epilogue import finish
from .conv_operands import grid

# A warp's 128 values are 16 bytes a thread and load, and one warp may use 64 registers without being
# fewer on a multiprocessor: so the compiler lets 8 parts be loaded before the first is waited for. Of
# 4 warps it loads some, adds them, and loads the next. 49 x 512 values are 208 programs.
BLOCK_M, BLOCK_N, TOGETHER = 4, 32, 8


@triton.jit
def finish_parts_kernel(
    sums,  # (parts, N * P * Q, K)
    y,  # (N, P, Q, K)
    bias,  # (K,) or None
    mean,  # (K,) or None
    variance,  # (K,) or None
    scale,  # (K,) or None
    shift,  # (K,) or None
    residual,  # (N, P, Q, K) or None
    means,  # (tiles of pixels, K) or None
    squares,  # (tiles of pixels, K) or None
    counts,  # (tiles of pixels,) or None
    parts,
    pixels,  # N * P * Q
    filters,
    eps,
    RELU: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``act(norm(sum of the parts + bias) + residual)`` and statistics, as ``fprop_kernel``'s."""
    tiles = tl.cdiv(filters, BLOCK_N)
    m = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k_known = k < filters
    pixel = m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    known = inside[:, None] & k_known[None, :]
    place = sums + pixel.to(tl.int64)[:, None] * filters + k[None, :]
    size = tl.cast(pixels, tl.int64) * filters
    acc = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    for first in range(0, parts, TOGETHER):
        for i in tl.static_range(TOGETHER):  # in as many loads at once
            part = first + i
            acc += tl.load(place + part * size, mask=known & (part < parts), other=0)
    finish(
        acc, y, bias, mean, variance, scale, shift, residual, means, squares, counts,
        m, pixel, inside, tl.minimum(pixels - m * BLOCK_M, BLOCK_M),
        k, k_known, filters, eps, RELU,
    )  # fmt: skip


def room_for(parts: int, y: Tensor) -> Tensor:
    """For the sums of so many parts of ``y``."""
    n, filters, p, q = y.shape
    return y.new_empty(parts, n * p * q, filters, dtype=torch.float32)


def finish_parts(sums: Tensor, y: Tensor, epilogue, moments, eps: float, relu: bool, wrap) -> None:
    """``epilogue``: the kernel's arguments from bias to residual; ``moments``: room for them."""
    parts, pixels, filters = sums.shape
    wrap(finish_parts_kernel)[grid(pixels, 1, filters)](
        sums, y, *epilogue, *moments, parts, pixels, filters, eps,
        RELU=relu, TOGETHER=TOGETHER, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=1,
    )  # fmt: skip
