"""Convolutions on tensor descriptors: Hopper's and Blackwell's way of copying tiles into shared
memory (TMA), without an address a thread.

A tile is a box of output pixels: some images, rows and columns. What a tap of the filter makes of it
is a box of the input, moved by the tap; what lies outside the map reads as 0, which is the padding.

A grid of as many programs as there are multiprocessors walks over all tiles, so that the next
tile's copies begin while the last one's sums are stored. Not the shipped choice: ``tuning`` may
choose it where it was measured to be faster.
"""

import contextvars
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_epilogue import finish
from .conv_operands import Affine
from .conv_shape import Shape, flat_channels
from .conv_tile import place_of
from .layout import multiprocessors

_ALIGNMENT = 16  # bytes, of a descriptor's tensor and of all its strides


@functools.cache
def box_of(images: int, rows: int, columns: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns, powers of 2, of the box of ``pixels`` that cuts such maps into the
    fewest; of several the one that is nearest to a square, whose taps read most from L2."""
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (p * q), p, q) for p in powers for q in powers if p * q <= pixels]
    extent = images, rows, columns
    return min(boxes, key=lambda box: (_boxes(extent, box), 1 / box[1] + 1 / box[2]))


def _boxes(extent: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    """How many it takes."""
    return math.prod(triton.cdiv(length, side) for length, side in zip(extent, box, strict=True))


def _box_of_launch(given: dict) -> tuple[int, int, int]:
    return box_of(*(given[name] for name in ("images", "out_height", "out_width", "BLOCK_M")))


@triton.heuristics({"BOX": _box_of_launch})
@triton.jit
def descriptors_kernel(
    x,  # (N, H, W, C)
    w,  # (K, R, S, C)
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
    images,
    height,
    width,
    channels,
    filters,
    out_height,
    out_width,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    eps,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RELU: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As ``fprop_kernel``, see there.

    Input pixel (h, w) is (h // STRIDE_H, w // STRIDE_W) of those that leave the same remainders, and
    one step further in memory for each of these: every tap of a box reads neighbours then, and 0
    outside the map, which the strides must divide.

    The product is ``filters @ pixels``: Hopper's takes its first operand through registers unless
    that comes as it was copied, and boxes are reshaped.
    """
    line = tl.cast(width, tl.int64) * channels
    activations = tl.make_tensor_descriptor(
        x,
        [
            images, height // STRIDE_H, width // STRIDE_W,
            (STRIDE_H - 1) * width + STRIDE_W, channels,
        ],
        [height * line, STRIDE_H * line, STRIDE_W * channels, channels, 1],
        [BOX[0], BOX[1], BOX[2], 1, BLOCK_K],
    )  # fmt: skip
    weights = tl.make_tensor_descriptor(
        w, [R * S, filters, channels], [channels, R * S * channels, 1], [1, BLOCK_N, BLOCK_K]
    )
    down = tl.cdiv(out_height, BOX[1])
    across = tl.cdiv(out_width, BOX[2])
    row_tiles = tl.cdiv(images, BOX[0]) * down * across
    column_tiles = tl.cdiv(filters, BLOCK_N)
    blocks = tl.cdiv(channels, BLOCK_K)
    within = tl.arange(0, BLOCK_M)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True
    ):
        m, n = place_of(tile, row_tiles, column_tiles, GROUP_M)
        image = m // (down * across) * BOX[0]
        row = m // across % down * BOX[1]
        column = m % across * BOX[2]
        acc = tl.full([BLOCK_N, BLOCK_M], 0, tl.float32)
        for step in range(R * S * blocks):
            tap = step // blocks
            channel = step % blocks * BLOCK_K
            # of the padding (h, w) all strides' worth is added and taken off behind the division
            h = tap // S * dilation_h + (STRIDE_H - 1) * padding_h
            v = tap % S * dilation_w + (STRIDE_W - 1) * padding_w
            a = activations.load(
                [
                    image, row + h // STRIDE_H - padding_h, column + v // STRIDE_W - padding_w,
                    h % STRIDE_H * width + v % STRIDE_W, channel,
                ]
            )  # fmt: skip
            b = weights.load([tap, n * BLOCK_N, channel])
            acc = tl.dot(
                tl.reshape(b, [BLOCK_N, BLOCK_K]), tl.reshape(a, [BLOCK_M, BLOCK_K]).T, acc
            )
        i = image + within // (BOX[1] * BOX[2])
        p = row + within // BOX[2] % BOX[1]
        q = column + within % BOX[2]
        count = tl.minimum(images - image, BOX[0])
        count *= tl.minimum(out_height - row, BOX[1]) * tl.minimum(out_width - column, BOX[2])
        k = n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish(
            acc.T, y, bias, mean, variance, scale, shift, residual, means, squares, counts,
            m, (i * out_height + p) * out_width + q,
            (i < images) & (p < out_height) & (q < out_width), count,
            k, k < filters, filters, eps, RELU,
        )  # fmt: skip


def obstacle(
    shape: Shape, groups: int, prologue: Affine | None, x: Tensor, w: Tensor
) -> str | None:
    """What keeps the kernel from computing such a convolution, if anything."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        return "a graph being traced, which would have to know of the memory that descriptors need"
    if prologue:
        return "a prologue"
    if groups > 1:
        return "groups"
    if flat_channels(groups, shape.channels):
        return "so few channels that they and the taps are one axis"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype}"
    if any(size % stride for size, stride in zip(shape.input[2:], shape.stride, strict=True)):
        return f"a map of {shape.input[2]}x{shape.input[3]} that its stride does not divide"
    places = (shape.channels * x.element_size(), x.data_ptr(), w.data_ptr())
    if any(place % _ALIGNMENT for place in places):
        return f"pixels or addresses that are no multiples of {_ALIGNMENT} bytes"
    return None


def tiles_of(shape: Shape, block_m: int) -> int:
    """How many tiles of pixels the kernel has."""
    extent = _extent(shape, shape.output)
    return _boxes(extent, box_of(*extent, block_m))


def _extent(shape: Shape, of: tuple[int, ...]) -> tuple[int, int, int]:
    """Images, rows and columns of the input or the output; of a plain matrix product one row of all
    pixels, which boxes cut without waste."""
    return (1, 1, shape.pixels) if shape.pointwise else (of[0], *of[2:])


def launch(kernel, shape: Shape, x: Tensor, *operands, **keywords) -> None:
    """``operands``: the kernel's others up to ``counts``; ``keywords`` has eps and the constants."""

    def programs(meta):
        tiles = tiles_of(shape, meta["BLOCK_M"]) * triton.cdiv(shape.filters, meta["BLOCK_N"])
        return (min(tiles, multiprocessors(x.device)),)

    def run():
        triton.set_allocator(lambda size, alignment, stream: x.new_empty(size, dtype=torch.int8))
        kernel[programs](
            x, *operands, *_extent(shape, shape.input), shape.channels, shape.filters,
            *_extent(shape, shape.output)[1:], *shape.padding, *shape.dilation,
            R=shape.taps[0], S=shape.taps[1], STRIDE_H=shape.stride[0], STRIDE_W=shape.stride[1],
            **keywords,
        )  # fmt: skip

    # the allocator is Triton's for the context: the caller's stays what it was
    contextvars.copy_context().run(run)
