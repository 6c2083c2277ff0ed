"""Tiles on tensor descriptors: Hopper's and Blackwell's way of copying them into shared memory
(TMA), without an address a thread.

A tile is a box of output pixels: some images, rows and columns. What a tap of the filter makes of it
is a box of the input, moved by the tap; what lies outside the map reads as 0, which is the padding.

A grid of as many programs as there are multiprocessors walks over all tiles, in a loop that is one
with that over the depth: the next tile's copies begin before the last one's sums are stored.
"""

import contextvars
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import multiprocessors

Extent = tuple[int, int, int]  # images, rows, columns

# --- choice ---------------------------------------------------------------------------------------


@functools.cache
def box_of(extent: Extent, pixels: int) -> Extent:
    """Images, rows and columns, powers of 2, of the box of ``pixels`` that cuts such maps into the
    fewest; of several the one that is nearest to a square, whose taps read most from L2."""
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (p * q), p, q) for p in powers for q in powers if p * q <= pixels]
    return min(boxes, key=lambda box: (_count(extent, box), 1 / box[1] + 1 / box[2]))


def tiles_of(extent: Extent, pixels: int) -> int:
    """How many tiles of ``pixels`` such maps take."""
    return _count(extent, box_of(extent, pixels))


def _count(extent: Extent, box: Extent) -> int:
    return math.prod(triton.cdiv(length, side) for length, side in zip(extent, box, strict=True))


def boxed(rows: str, columns: str):
    """Gives a kernel of BLOCK_M pixels its BOX, by its arguments ``images``, ``rows``, ``columns``."""

    def box(given: dict) -> Extent:
        return box_of((given["images"], given[rows], given[columns]), given["BLOCK_M"])

    return triton.heuristics({"BOX": box})


# --- on the device --------------------------------------------------------------------------------


@triton.jit
def boxes_of(
    x, images, height, width, channels,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BOX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``x`` (N, H, W, C) as it is read in boxes of every STRIDE_H-th row and STRIDE_W-th column.

    Pixel (h, w) is (h // STRIDE_H, w // STRIDE_W) of those that leave the same remainders, which
    are one more axis: every tap of a box reads neighbours then, and 0 outside the map, which the
    strides must divide.
    """
    line = tl.cast(width, tl.int64) * channels
    return tl.make_tensor_descriptor(
        x,
        [
            images, height // STRIDE_H, width // STRIDE_W,
            (STRIDE_H - 1) * width + STRIDE_W, channels,
        ],
        [height * line, STRIDE_H * line, STRIDE_W * channels, channels, 1],
        [BOX[0], BOX[1], BOX[2], 1, BLOCK_K],
    )  # fmt: skip


@triton.jit
def corner_of(m, rows, columns, BOX: tl.constexpr):
    """First image, row and column of tile ``m`` of pixels."""
    down = tl.cdiv(rows, BOX[1])
    across = tl.cdiv(columns, BOX[2])
    return m // (down * across) * BOX[0], m // across % down * BOX[1], m % across * BOX[2]


@triton.jit
def pixels_of(image, row, column, images, rows, columns, BOX: tl.constexpr):
    """Image, row and column of a tile's pixels, and which of them there are."""
    i = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    n = image + i // (BOX[1] * BOX[2])
    p = row + i // BOX[2] % BOX[1]
    q = column + i % BOX[2]
    return n, p, q, (n < images) & (p < rows) & (q < columns)


@triton.jit
def accumulate_boxes(
    x,  # boxes_of
    w,  # (taps down, taps across, K, C), or with TURNED (.., C, K)
    image,  # of x, under the first tap of the tile's first pixel
    row,  # in steps of STRIDE_H, as column in steps of STRIDE_W
    column,
    out,  # first output channel
    width,
    channels,
    lift_h,  # rows of x, before they are divided by STRIDE_H
    lift_w,
    step_h,  # rows of x from one tap to the next
    step_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile's fp32 sums (BLOCK_M, BLOCK_N).

    The product is ``filters @ pixels``: Hopper's takes its first operand through registers unless
    that is used as it was copied, and boxes are reshaped.
    """
    acc = tl.full([BLOCK_N, BLOCK_M], 0, tl.float32)
    blocks = tl.cdiv(channels, BLOCK_K)
    for step in range(R * S * blocks):
        r = step // blocks // S
        s = step // blocks % S
        channel = step % blocks * BLOCK_K
        h = r * step_h + lift_h
        v = s * step_w + lift_w
        remainder = h % STRIDE_H * width + v % STRIDE_W
        box = x.load([image, row + h // STRIDE_H, column + v // STRIDE_W, remainder, channel])
        if TURNED:
            filters = tl.reshape(w.load([r, s, channel, out]), [BLOCK_K, BLOCK_N]).T
        else:
            filters = tl.reshape(w.load([r, s, out, channel]), [BLOCK_N, BLOCK_K])
        acc = tl.dot(filters, tl.reshape(box, [BLOCK_M, BLOCK_K]).T, acc)
    return acc.T


# --- launch ---------------------------------------------------------------------------------------

_ALIGNMENT = 16  # bytes, of a descriptor's tensor and of all its strides


def obstacle(*tensors: Tensor) -> str | None:
    """What keeps descriptors from describing channels_last maps or filters, if anything."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return "a graph that is traced: it would have to know of the memory that they need"
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            return str(tensor.dtype)
        if tensor.shape[1] * tensor.element_size() % _ALIGNMENT or tensor.data_ptr() % _ALIGNMENT:
            return f"pixels or addresses that are no multiples of {_ALIGNMENT} bytes"
    return None


def launch(kernel, extent: Extent, columns: int, x: Tensor, *operands, **keywords) -> None:
    """``kernel(x, *operands)`` over tiles of the output's pixels and ``columns``."""

    def programs(meta):
        tiles = tiles_of(extent, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"])
        return (min(tiles, multiprocessors(x.device)),)

    def run():
        triton.set_allocator(lambda size, alignment, stream: x.new_empty(size, dtype=torch.int8))
        kernel[programs](x, *operands, **keywords)

    # the allocator is Triton's for the context: the caller's stays what it was
    contextvars.copy_context().run(run)
