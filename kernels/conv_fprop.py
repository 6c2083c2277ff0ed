"""Convolution forward: implicit GEMM with a prologue on what it loads and an epilogue on its sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, conv_descriptors, tuning
from .configs import Tile
from .conv_boxes import tiles_of
from .conv_epilogue import finish
from .conv_operands import (
    Affine,
    Norm,
    empty_last,
    few,
    grid,
    last,
    on,
    precision,
    smallest,
)
from .conv_shape import Shape, flat_channels, merge_groups, merged
from .conv_tile import accumulate_merged, place_of, unravel
from .segments import Moments, merge_moments
from .tuning import Way


@triton.jit
def fprop_kernel(
    x,  # (N, H, W, C)
    w,  # (K, R, S, C / groups)
    y,  # (N, P, Q, K)
    bias,  # (K,) or None
    mean,  # (K,) or None
    variance,  # (K,) or None
    scale,  # (K,) or None
    shift,  # (K,) or None
    residual,  # (N, P, Q, K) or None
    x_mean,  # (C,) or None
    x_scale,  # (C,) or None
    x_shift,  # (C,) or None
    means,  # (tiles of pixels, K) or None
    squares,  # (tiles of pixels, K) or None
    counts,  # (tiles of pixels,) or None
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
    eps,
    MERGED: tl.constexpr,
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
    """``act(norm(conv(prologue(x), w) + bias) + residual)``, norm being
    ``(. - mean) * scale / sqrt(variance + eps) + shift``.

    ``means``, ``squares`` and ``counts`` get statistics, see ``conv_epilogue``. ``PLAIN``
    (1x1, stride 1, no padding) needs no image coordinates; ``MERGED`` groups are computed as one.
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
    acc = accumulate_merged(
        x, w + group * group_filters * (R * S * group_channels), x_mean, x_scale, x_shift,
        image, row, column, inside, out, out_known,
        height, width, channels, group * group_channels, group_channels, group_filters,
        dilation_h, dilation_w, S * group_channels, group_channels, 1, R * S * group_channels,
        MERGED, R, S, FLAT, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish(
        acc, y, bias, mean, variance, scale, shift, residual, means, squares, counts,
        m, pixel, inside, tl.minimum(pixels - m * BLOCK_M, BLOCK_M),
        group * group_filters + out, out_known, filters, eps, RELU,
    )  # fmt: skip


# --- launcher ------------------------------------------------------------------------------------


def fprop(
    x: Tensor, w: Tensor, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups: int = 1, *,
    bias: Tensor | None = None, norm: Norm | None = None, residual: Tensor | None = None,
    relu: bool = False, prologue: Affine | None = None, statistics: bool = False,
    allow_tf32: bool = False, tile: Tile | None = None, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Moments | None]:  # fmt: skip
    """``act(norm(conv(prologue(x), w) + bias) + residual)``, prologue being affine and ReLU.

    ``statistics`` are of ``conv + bias`` before it is rounded, for ``finish_moments_kernel``.
    """
    Shape.of(x.shape, w.shape, stride, padding, dilation, groups)
    flat = flat_channels(groups, x.shape[1])
    x, w, residual, prologue = few(x, flat), few(w, flat), last(residual), few(prologue, flat)
    shape = Shape.of(x.shape, w.shape, stride, padding, dilation, groups)
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    y = empty_last(x, shape.output)
    if not y.numel():
        return y, Moments.empty(x, 0, shape.filters) if statistics else None
    obstacle = conv_descriptors.fprop_obstacle(shape, groups, prologue, x, w)
    w = merge_groups(w, groups, merge)
    groups //= merge
    kind = "flat" if flat else "prologue" if prologue else "statistics" if statistics else "plain"
    problem = configs.problem(
        kind, x, allow_tf32, groups, shape.pixels, shape.filters // groups, shape.channels // groups
    )
    *normal, eps = norm or (None, None, None, None, 0.0)

    def moments_of(tiles: int):
        return Moments.empty(x, tiles, shape.filters) if statistics else (None, None, None)

    def launch(kernel, block_m: int, y=y, **keywords):
        moments = moments_of(triton.cdiv(shape.pixels, block_m))
        kernel[grid(shape.pixels, groups, shape.filters // groups)](
            x, w, y, bias, *normal, residual, *(prologue or (None, None, None)), *moments,
            shape.pixels, *shape.input[2:], shape.channels, shape.filters, *shape.output[2:],
            *stride, *padding, *dilation, shape.channels // groups, shape.filters // groups, eps,
            MERGED=merge, R=shape.taps[0], S=shape.taps[1], RELU=relu, PLAIN=shape.pointwise,
            FLAT=flat, PADDED=shape.padded, PRECISION=precision(allow_tf32), **keywords,
        )  # fmt: skip
        return moments

    def launch_descriptors(kernel, block_m: int, y=y, **keywords):
        moments = moments_of(tiles_of(conv_descriptors.output_extent(shape), block_m))
        conv_descriptors.launch_fprop(
            kernel, shape, x, w, y, bias, *normal, residual, *moments,
            eps=eps, RELU=relu, **keywords,
        )  # fmt: skip
        return moments

    ways = [Way(fprop_kernel, problem, launch)]
    if obstacle is None:
        problem = problem._replace(kind="descriptors")
        ways.append(Way(conv_descriptors.fprop_descriptors_kernel, problem, launch_descriptors))
    elif tile and tile.descriptors:
        raise ValueError(f"tile: no tensor descriptors for a convolution with {obstacle}")

    def measure(way: Way, tuner):
        way.launch(tuner, smallest(way.problem), torch.empty_like(y))

    with on(x):
        key = (shape.taps, shape.stride, statistics, prologue is None, residual is None)
        way, tile = tuning.choose(ways, key, x, measure, tile)
        kernel = way.kernel if tile.descriptors else wrap(way.kernel)
        moments = way.launch(kernel, tile.BLOCK_M, **tile.keywords)
        return y, merge_moments(moments, wrap) if statistics else None
