"""The convolution's gradient of its weight: a GEMM whose depth is the pixels of the batch.

Few tiles and a depth of up to millions: the pixels are split, every part writes its own sums, and
``merge_sums_kernel`` adds the parts in their order. No atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, tuning
from .configs import Tile
from .conv_operands import Affine, empty_last, few, grid, last, on, precision
from .conv_shape import Shape, flat_channels, merged, split_groups
from .conv_tile import activated, place_of, unravel
from .segments import merge_sums
from .tuning import Way


@triton.jit
def wgrad_kernel(
    dy,  # (N, P, Q, K)
    x,  # (N, H, W, C)
    dw,  # (splits, K, R, S, C / groups)
    x_mean,  # (C,) or None
    x_scale,  # (C,) or None
    x_shift,  # (C,) or None
    pixels,  # N * P * Q
    split_pixels,
    height,
    width,
    channels,
    filters,
    out_height,
    out_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    group_channels,
    group_filters,
    R: tl.constexpr,
    S: tl.constexpr,
    PLAIN: tl.constexpr,
    FLAT: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``dw[k, r, s, c] = sum(dy[pixel, k] * prologue(x)[pixel under tap (r, s), c])``.

    A tile is BLOCK_M filters by BLOCK_N channels of one tap, or with ``FLAT``, where channels are
    few (FLAT of them), BLOCK_N of the taps times channels; BLOCK_K pixels a step.
    """
    groups = channels // group_channels
    k_tiles = tl.cdiv(group_filters, BLOCK_M)
    if FLAT:
        depth = R * S * FLAT
        tap_tiles = tl.cdiv(depth, BLOCK_N)
        tiles = tap_tiles
    else:
        depth = R * S * group_channels
        tap_tiles = tl.cdiv(group_channels, BLOCK_N)
        tiles = tap_tiles * (R * S)
    m, n = place_of(tl.program_id(0), k_tiles, tiles * groups, GROUP_M)
    split = tl.program_id(1)
    group = n // tiles
    k = m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_known = k < group_filters
    if FLAT:
        j = n % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        j_known = j < depth
        tap = j // FLAT
        channel = j % FLAT
    else:
        tap = n % tiles // tap_tiles
        c = n % tap_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        j = tap * group_channels + c
        j_known = c < group_channels
        channel = group * group_channels + c
    down = tap // S * dilation_h
    right = tap % S * dilation_w
    acc = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    begin = split * split_pixels
    end = tl.minimum(begin + split_pixels, pixels)
    for first in range(begin, end, BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        inside = pixel < end
        if PLAIN:
            place = pixel.to(tl.int64)
        else:
            image, row, column = unravel(pixel, out_height, out_width)
            row = row * stride_h - padding_h
            column = column * stride_w - padding_w
            place = (image.to(tl.int64) * height + row) * width + column
        known = inside[:, None] & j_known[None, :]
        if FLAT:
            if PADDED:
                y = row[:, None] + down[None, :]
                z = column[:, None] + right[None, :]
                known &= (y >= 0) & (y < height) & (z >= 0) & (z < width)
            away = (down * width + right) * FLAT + channel
            b = tl.load(x + (place * FLAT)[:, None] + away[None, :], mask=known, other=0)
        else:
            if PADDED:
                y = row + down
                z = column + right
                here = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
                known = here[:, None] & j_known[None, :]
            place += down * width + right
            b = tl.load(x + (place * channels)[:, None] + channel[None, :], mask=known, other=0)
        if x_scale is not None:
            b = activated(b, known, x_mean, x_scale, x_shift, channel, j_known)
        a = tl.load(
            dy + (pixel.to(tl.int64) * filters + group * group_filters)[:, None] + k[None, :],
            mask=inside[:, None] & k_known[None, :],
            other=0,
        )
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    line = split.to(tl.int64) * filters + group * group_filters + k
    tl.store(
        dw + line[:, None] * depth + j[None, :],
        acc.to(dw.dtype.element_ty),
        mask=k_known[:, None] & j_known[None, :],
    )


# --- launcher ------------------------------------------------------------------------------------


def wgrad(
    dy: Tensor, x: Tensor, weight_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    groups: int = 1, *, prologue: Affine | None = None, dtype: torch.dtype | None = None,
    allow_tf32: bool = False, tile: Tile | None = None, wrap=lambda kernel: kernel,
) -> Tensor:  # fmt: skip
    """The gradient of the weight, for an input of ``prologue(x)``, in ``dtype`` (x's)."""
    dtype = dtype or x.dtype
    shape = Shape.of(x.shape, weight_size, stride, padding, dilation, groups)
    if not shape.pixels or not shape.filters:
        return empty_last(x, weight_size, dtype).zero_()
    flat = flat_channels(groups, shape.channels)
    dy, x, prologue = last(dy), few(x, flat), few(prologue, flat)
    shape = shape._replace(input=tuple(x.shape))
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    groups //= merge
    group_channels, group_filters = shape.channels // groups, shape.filters // groups
    taps = shape.taps[0] * shape.taps[1]
    columns = group_channels * taps if flat else group_channels
    problem = configs.problem("wgrad", x, allow_tf32, groups, group_filters, columns, shape.pixels)
    mean, x_scale, x_shift = prologue or (None, None, None)
    tiles = grid(group_filters, groups * (1 if flat else taps), columns)

    def launch(kernel, tile, **keywords):
        splits, each = _splits(
            shape.pixels, *tiles(tile.keywords), problem.multiprocessors, tile.BLOCK_K
        )
        straight = splits == 1 and merge == 1  # else the result is rounded last
        parts = x.new_empty(
            splits, shape.filters * taps * group_channels,
            dtype=dtype if straight else torch.float32,
        )  # fmt: skip

        kernel[lambda meta: (*tiles(meta), splits)](
            dy, x, parts, mean, x_scale, x_shift,
            shape.pixels, each, *shape.input[2:], shape.channels, shape.filters,
            *shape.output[2:], *stride, *padding, *dilation, group_channels, group_filters,
            R=shape.taps[0], S=shape.taps[1], PLAIN=shape.pointwise, FLAT=flat,
            PADDED=shape.padded, PRECISION=precision(allow_tf32), **keywords,
        )  # fmt: skip
        return parts

    def measure(way: Way, tuner):
        way.launch(tuner, configs.shipped(problem))

    with on(x):
        key = (shape.taps, prologue is None)
        way = Way(wgrad_kernel, problem, launch, configs.candidates(problem))
        _, tile = tuning.choose([way], key, x, measure, tile)
        parts = launch(wrap(wgrad_kernel), tile, **tile.keywords)
        if parts.shape[0] > 1:
            parts = merge_sums(parts, 1, dtype, wrap)
        return split_groups(parts, weight_size, groups, merge).to(dtype)


def _splits(pixels: int, programs: int, multiprocessors: int, block: int) -> tuple[int, int]:
    """How many parts of how many pixels: two programs a multiprocessor, but no part so short that
    writing and adding its sums takes longer than finding them."""
    steps = triton.cdiv(pixels, block)
    wanted = max(1, min(triton.cdiv(2 * multiprocessors, programs), steps // 8))
    parts, each = configs.equal_parts(steps, wanted)
    return parts, each * block
