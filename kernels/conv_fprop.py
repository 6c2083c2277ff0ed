"""Convolution forward: implicit GEMM with a prologue on what it loads and an epilogue on its sums."""

import triton
import triton.language as tl

from .conv_tile import accumulate, place_of, unravel


@triton.jit
def fprop_kernel(
    x,  # (N, H, W, C)
    w,  # (K, R, S, C / groups)
    y,  # (N, P, Q, K)
    scale,  # (K,) or None
    shift,  # (K,) or None
    residual,  # (N, P, Q, K) or None
    x_mean,  # (C,) or None
    x_scale,  # (C,) or None
    x_shift,  # (C,) or None
    means,  # (tiles of pixels, K) or None
    squares,  # (tiles of pixels, K) or None
    pixels,  # N * P * Q
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
    RELU: tl.constexpr,
    PLAIN: tl.constexpr,
    FLAT: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``act(conv(prologue(x), w) * scale + shift + residual)``.

    ``means`` and ``squares`` get the mean of a tile's pixels and the sum of squared deviations from
    it, of the fp32 sums after scale and shift, before they are rounded. ``PLAIN`` (1x1, stride 1,
    no padding) needs no image coordinates.
    """
    groups = channels // group_channels
    tiles = tl.cdiv(group_filters, BLOCK_N)
    m, n = place_of(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tiles * groups, GROUP_M)
    group = n // tiles
    pixel = m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    out = n % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    out_known = out < group_filters
    if PLAIN:
        image = tl.full([BLOCK_M], 0, tl.int32)
        row = image
        column = pixel
    else:
        image, row, column = unravel(pixel, out_height, out_width)
        row = row * stride_h - padding_h
        column = column * stride_w - padding_w
    acc = accumulate(
        x, w + group * group_filters * (R * S * group_channels), x_mean, x_scale, x_shift,
        image, row, column, inside, out, out_known,
        height, width, channels, group * group_channels, group_channels, dilation_h, dilation_w,
        S * group_channels, group_channels, 1, R * S * group_channels,
        R, S, FLAT, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    k = group * group_filters + out
    if scale is not None:
        acc *= tl.load(scale + k, mask=out_known, other=0).to(tl.float32)[None, :]
    if shift is not None:
        acc += tl.load(shift + k, mask=out_known, other=0).to(tl.float32)[None, :]
    if means is not None:
        count = tl.minimum(pixels - m * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.sum(tl.where(inside[:, None], acc, 0), 0) / count
        deviation = tl.where(inside[:, None], acc - mean[None, :], 0)
        # a second look, not a sum of squares: a mean of 1e4 would drown a deviation of 1
        square = tl.sum(deviation * deviation, 0)
        tl.store(means + m * filters + k, mean, mask=out_known)
        tl.store(squares + m * filters + k, square, mask=out_known)
    place = pixel.to(tl.int64)[:, None] * filters + k[None, :]
    known = inside[:, None] & out_known[None, :]
    if residual is not None:
        acc += tl.load(residual + place, mask=known, other=0).to(tl.float32)
    if RELU:
        acc = tl.where(acc <= 0, 0, acc)  # NaN stays
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=known)
