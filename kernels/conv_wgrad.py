"""The convolution's gradient of its weight: a GEMM whose depth is the pixels of the batch.

Few tiles and a depth of up to millions: the pixels are split, every part writes its own sums, and
``merge_sums_kernel`` adds the parts in their order. No atomics, so two runs give the same bits.
"""

import triton
import triton.language as tl

from .conv_tile import activated, place_of, unravel


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
        down = tap // S * dilation_h
        right = tap % S * dilation_w
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
