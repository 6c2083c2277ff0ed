"""What the convolution kernels share: a tile's place, its pixels, and the implicit GEMM itself.

A convolution is a matrix product of pixels (rows, BLOCK_M) and output channels (columns, BLOCK_N)
over filter taps times input channels (depth, BLOCK_K). The matrix of patches is never written: a
step loads the activations that its tap touches, zeros where the tap hangs over the edge.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(program, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column of a program's tile. Programs that run together share GROUP_M rows of tiles,
    so that what they load comes from L2 once it has come from memory."""
    together = GROUP_M * column_tiles
    first = program // together * GROUP_M
    rows = tl.minimum(row_tiles - first, GROUP_M)
    within = program % together
    return first + within % rows, within // rows


@triton.jit
def unravel(pixel, height, width):
    """Image, row and column of pixels that are numbered through all images."""
    line = pixel // width
    return line // height, line % height, pixel % width


@triton.jit
def activated(
    x,
    known,
    mean,  # (C,) or None
    scale,  # (C,)
    shift,  # (C,)
    channel,
    channel_known,
):
    """``relu((x - mean) * scale + shift)`` in x's dtype, and 0 where x is not ``known``: padding
    is zeros after the activation, and 0 * scale + shift is not 0."""
    a = x.to(tl.float32)
    if mean is not None:
        a -= tl.load(mean + channel, mask=channel_known, other=0).to(tl.float32)[None, :]
    factor = tl.load(scale + channel, mask=channel_known, other=0).to(tl.float32)[None, :]
    offset = tl.load(shift + channel, mask=channel_known, other=0).to(tl.float32)[None, :]
    # as bn_relu computes it, and as dgrad recomputes it: the same bits, the same mask
    a = tl.fma(a, factor, offset)
    return tl.where(known & ~(a <= 0), a, 0).to(x.dtype)  # NaN stays


@triton.jit
def accumulate(
    x,  # (N, H, W, C)
    w,  # of this group and first tap; strides w_row, w_column (taps), w_in, w_out (channels)
    x_mean,  # (C,) or None
    x_scale,  # (C,) or None: the prologue
    x_shift,  # (C,) or None
    image,  # (BLOCK_M,)
    row,  # (BLOCK_M,) of x, under the first tap
    column,  # (BLOCK_M,) likewise
    inside,  # (BLOCK_M,) whether there is such a pixel
    out,  # (BLOCK_N,) output channels in the group
    out_known,  # (BLOCK_N,)
    height,
    width,
    channels,
    first_channel,  # of the group, in x
    group_channels,
    low,  # of the group's channels, the first and the one behind the last that count; None: all do
    high,
    step_h,  # rows of x from one tap to the next: dilation, negative in dgrad
    step_w,
    w_row,
    w_column,
    w_in,
    w_out,
    R: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    FLAT: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile's fp32 sums; with ``SPLIT`` this program's part of them, by the grid's axis 1.

    ``FLAT`` runs over taps and channels as one axis, for inputs whose few
    channels would leave most of a step empty: it is their number, a power of 2 that the compiler
    knows, so that they are loaded together. w must be dense then. Without ``PADDED`` no tap leaves
    x."""
    # only what a tile begins with needs 64 bits; steps inside an image are small
    pixel = (image.to(tl.int64) * height + row) * width + column
    if FLAT:
        pixels = x + (pixel * FLAT)[:, None]
    else:
        pixels = x + (pixel * channels + first_channel)[:, None]
    filters = w + (out * w_out)[None, :]
    acc = tl.full([BLOCK_M, BLOCK_N], 0, tl.float32)
    if FLAT:
        depth = R * S * FLAT
        for first in range(0, depth, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_known = k < depth
            tap = k // FLAT
            channel = k % FLAT
            down = tap // S * step_h
            right = tap % S * step_w
            known = inside[:, None] & k_known[None, :]
            if PADDED:
                y = row[:, None] + down[None, :]
                z = column[:, None] + right[None, :]
                known &= (y >= 0) & (y < height) & (z >= 0) & (z < width)
            a = tl.load(
                pixels + ((down * width + right) * FLAT + channel)[None, :], mask=known, other=0
            )
            if x_scale is not None:
                a = activated(a, known, x_mean, x_scale, x_shift, channel, k_known)
            b = tl.load(
                filters + (k * w_in)[:, None], mask=k_known[:, None] & out_known[None, :], other=0
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif R * S > 0:  # in dgrad a pixel between strides may have no tap
        blocks = tl.cdiv(group_channels, BLOCK_K)
        begin = 0
        end = R * S * blocks
        if SPLIT:
            each = tl.cdiv(end, tl.num_programs(1))
            begin = tl.program_id(1) * each
            end = tl.minimum(begin + each, end)
        for step in range(begin, end):
            tap = step // blocks
            r = tap // S
            s = tap % S
            channel = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
            channel_known = channel < group_channels
            if low is not None:
                channel_known &= (channel >= low) & (channel < high)
            here = inside
            if PADDED:
                y = row + r * step_h
                z = column + s * step_w
                here &= (y >= 0) & (y < height) & (z >= 0) & (z < width)
            known = here[:, None] & channel_known[None, :]
            # 64 bits here too: on maps of many channels a dilated tap is far away
            away = (r * step_h * width + s * step_w).to(tl.int64) * channels
            a = tl.load(pixels + away + channel[None, :], mask=known, other=0)
            if x_scale is not None:
                a = activated(
                    a, known, x_mean, x_scale, x_shift, first_channel + channel, channel_known
                )
            b = tl.load(
                filters + (r * w_row + s * w_column) + (channel * w_in)[:, None],
                mask=channel_known[:, None] & out_known[None, :],
                other=0,
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def accumulate_merged(
    x, w, x_mean, x_scale, x_shift, image, row, column, inside, out, out_known,
    height, width, channels, first_channel, group_channels, group_out, step_h, step_w,
    w_row, w_column, w_in, w_out,
    MERGED: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SPLIT: tl.constexpr,
    FLAT: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """:func:`accumulate` where ``MERGED`` groups are computed as one, with zeros between them.

    0 * Inf is NaN: one group's would reach the others. So a tile that holds a NaN is computed
    again, each group with nothing but its own channels.
    """
    acc = accumulate(
        x, w, x_mean, x_scale, x_shift, image, row, column, inside, out, out_known,
        height, width, channels, first_channel, group_channels, None, None, step_h, step_w,
        w_row, w_column, w_in, w_out,
        R, S, SPLIT, FLAT, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if MERGED > 1:
        own_in = group_channels // MERGED
        own_out = group_out // MERGED
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:  # noqa: PLR0124 - NaN
            for member in range(MERGED):
                own = accumulate(
                    x, w, x_mean, x_scale, x_shift, image, row, column, inside, out, out_known,
                    height, width, channels, first_channel, group_channels,
                    member * own_in, (member + 1) * own_in, step_h, step_w,
                    w_row, w_column, w_in, w_out,
                    R, S, SPLIT, FLAT, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = tl.where((out // own_out == member)[None, :], own, acc)
    return acc
