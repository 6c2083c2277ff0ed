"""The convolution's gradient of its input: implicit GEMM over the taps that touch a pixel.

With stride (u, v) only every u-th tap touches a given row of x, and which ones depends on the row
modulo u. So the pixels of x fall into u * v classes, and a launch treats one class: a convolution
of dy with stride 1 over the taps of that class, no product with a zero that striding left behind.
"""

import triton
import triton.language as tl

from .conv_tile import accumulate, place_of, unravel


@triton.jit
def dgrad_kernel(
    dy,  # (N, P, Q, K)
    w,  # (K, R, S, C / groups), from the first tap of the class
    dx,  # (N, H, W, C), from the first pixel of the class
    residual,  # (N, H, W, C) or None, likewise
    behind,  # (N, H, W, C) or None, likewise: what the BN behind normalised, or with
    mean,  # (C,) or None
    scale,  # (C,) or None
    shift,  # (C,) or None
    output,  # (N, H, W, C) or None: what the ReLU behind gave, likewise
    sums_g,  # (tiles of pixels, C) or None
    sums_gx,  # (tiles of pixels, C) or None
    pixels,  # of the class: N * rows * columns
    rows,
    columns,
    height,
    width,
    channels,
    filters,
    out_height,
    out_width,
    stride_h,
    stride_w,
    offset_h,  # row of dy that the first tap reaches from the first row of the class
    offset_w,
    step_h,  # and how far the next tap is
    step_w,
    w_row,
    w_column,
    w_filter,
    group_channels,
    group_filters,
    R: tl.constexpr,
    S: tl.constexpr,
    RELU: tl.constexpr,
    PLAIN: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``g = mask(conv_transpose(dy, w) + residual)``, and per tile the sums of g and of
    g * (behind - mean).

    With ``RELU`` the gradient is 0 where the ReLU behind gave 0: where ``output`` says so, else
    where ``(behind - mean) * scale + shift``, rounded as that was, does. R and S are the taps of
    the class; with none, dx is the residual.
    """
    groups = channels // group_channels
    tiles = tl.cdiv(group_channels, BLOCK_N)
    m, n = place_of(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tiles * groups, GROUP_M)
    group = n // tiles
    pixel = m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    out = n % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    out_known = out < group_channels
    if PLAIN:
        image = tl.full([BLOCK_M], 0, tl.int32)
        row = image
        column = pixel
        place = pixel.to(tl.int64)
    else:
        image, row, column = unravel(pixel, rows, columns)
        place = (image.to(tl.int64) * height + row * stride_h) * width + column * stride_w
        row += offset_h
        column += offset_w
    acc = accumulate(
        dy, w + group * group_filters * w_filter, None, None, None,
        image, row, column, inside, out, out_known,
        out_height, out_width, filters, group * group_filters, group_filters, step_h, step_w,
        w_row, w_column, w_filter, 1,
        R, S, False, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    c = group * group_channels + out
    place = place[:, None] * channels + c[None, :]
    known = inside[:, None] & out_known[None, :]
    if residual is not None:
        acc += tl.load(residual + place, mask=known, other=0).to(tl.float32)
    if behind is not None:
        x = tl.load(behind + place, mask=known, other=0)
        centred = x.to(tl.float32) - _row(mean, c, out_known)
        if RELU and output is None:
            before = tl.fma(centred, _row(scale, c, out_known), _row(shift, c, out_known))
            acc = tl.where(before.to(x.dtype).to(tl.float32) <= 0, 0, acc)
    if RELU and output is not None:
        y = tl.load(output + place, mask=known, other=0)
        acc = tl.where(y.to(tl.float32) <= 0, 0, acc)
    if sums_g is not None:
        g = tl.where(known, acc, 0)
        tl.store(sums_g + m * channels + c, tl.sum(g, 0), mask=out_known)
        tl.store(
            sums_gx + m * channels + c,
            tl.sum(tl.where(known, g * centred, 0), 0),
            mask=out_known,
        )
    tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=known)


@triton.jit
def _row(vector, c, known):
    return tl.load(vector + c, mask=known, other=0).to(tl.float32)[None, :]
