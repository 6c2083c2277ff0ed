"""Convolution forward: implicit GEMM with a prologue on what it loads and an epilogue on its sums."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, conv_descriptors, conv_parts, tuning
from .configs import Tile
from .conv_boxes import tiles_of
from .conv_epilogue import finish
from .conv_operands import Affine, Norm, empty_last, few, grid, last, on, precision
from .conv_shape import Shape, flat_channels, merge_groups, merged
from .conv_tile import accumulate_merged, place_of, unravel
from .segments import Moments, merge_moments
from .tuning import Way


@triton.jit
def fprop_kernel(
    x,  # (N, H, W, C)
    w,  # (K, R, S, C / groups)
    sums,  # (parts, N * P * Q, K) or None: what a part of the depth gives, for conv_parts
    y,  # (N, P, Q, K) or None, as all that follows up to residual, where sums are
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
        MERGED, R, S, sums is not None, FLAT, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    k = group * group_filters + out
    if sums is not None:
        line = tl.program_id(1).to(tl.int64) * pixels + pixel
        known = inside[:, None] & out_known[None, :]
        tl.store(sums + line[:, None] * filters + k[None, :], acc, mask=known)
    else:
        finish(
            acc, y, bias, mean, variance, scale, shift, residual, means, squares, counts,
            m, pixel, inside, tl.minimum(pixels - m * BLOCK_M, BLOCK_M),
            k, out_known, filters, eps, RELU,
        )  # fmt: skip


# --- launcher ------------------------------------------------------------------------------------


class _Operands(NamedTuple):
    """Of every launch of a convolution, all channels_last."""

    shape: Shape
    groups: int
    merged: int  # groups computed as one
    flat: int
    x: Tensor
    w: Tensor
    prologue: tuple[Tensor | None, ...]
    epilogue: tuple[Tensor | None, ...]  # from bias to residual
    eps: float
    relu: bool
    statistics: bool
    precision: str

    def by_pointers(self, kernel, tile: Tile, y: Tensor, wrap, **keywords):
        """Its moments, or Nones."""
        if tile.parts > 1:
            return self._in_parts(kernel, tile, y, wrap, **keywords)
        moments = self._moments(triton.cdiv(self.shape.pixels, tile.BLOCK_M))
        self._launch(kernel, 1, None, y, self.epilogue, moments, RELU=self.relu, **keywords)
        return moments

    def _in_parts(self, kernel, tile: Tile, y: Tensor, wrap, **keywords):
        sums = conv_parts.room_for(tile.parts, y)
        moments = self._moments(triton.cdiv(self.shape.pixels, conv_parts.BLOCK_M))
        nothing = (None,) * len(self.epilogue), (None,) * len(moments)
        self._launch(kernel, tile.parts, sums, None, *nothing, RELU=False, **keywords)
        conv_parts.finish_parts(sums, y, self.epilogue, moments, self.eps, self.relu, wrap)
        return moments

    def _launch(self, kernel, parts: int, sums, y, epilogue, moments, **keywords) -> None:
        shape, groups = self.shape, self.groups
        tiles = grid(shape.pixels, groups, shape.filters // groups)
        kernel[lambda meta: (*tiles(meta), parts)](
            self.x, self.w, sums, y, *epilogue, *self.prologue, *moments,
            shape.pixels, *shape.input[2:], shape.channels, shape.filters, *shape.output[2:],
            *shape.stride, *shape.padding, *shape.dilation,
            shape.channels // groups, shape.filters // groups, self.eps,
            MERGED=self.merged, R=shape.taps[0], S=shape.taps[1], PLAIN=shape.pointwise,
            FLAT=self.flat, PADDED=shape.padded, PRECISION=self.precision, **keywords,
        )  # fmt: skip

    def on_descriptors(self, kernel, tile: Tile, y: Tensor, wrap, **keywords):
        extent = conv_descriptors.output_extent(self.shape)
        moments = self._moments(tiles_of(extent, tile.BLOCK_M))
        conv_descriptors.launch_fprop(
            kernel, self.shape, self.x, self.w, y, *self.epilogue, *moments,
            eps=self.eps, RELU=self.relu, **keywords,
        )  # fmt: skip
        return moments

    def _moments(self, tiles: int):
        if not self.statistics:
            return None, None, None
        return Moments.empty(self.x, tiles, self.shape.filters)


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
    y = empty_last(x, shape.output)
    if not y.numel():
        return y, Moments.empty(x, 0, shape.filters) if statistics else None
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    *normal, eps = norm or (None, None, None, None, 0.0)
    operands = _Operands(
        shape, groups // merge, merge, flat, x, merge_groups(w, groups, merge),
        prologue or (None, None, None), (bias, *normal, residual), eps, relu, statistics,
        precision(allow_tf32),
    )  # fmt: skip
    with on(x):
        obstacle = conv_descriptors.fprop_obstacle(shape, groups, prologue, x, w)
        way, tile = _choose(operands, obstacle, y, allow_tf32, tile)
        kernel = way.kernel if tile.descriptors else wrap(way.kernel)
        moments = way.launch(kernel, tile, y, wrap, **tile.keywords)
        return y, merge_moments(moments, wrap) if statistics else None


def _choose(
    operands: _Operands, obstacle: str | None, y: Tensor, allow_tf32: bool, tile: Tile | None
) -> tuple[Way, Tile]:
    shape, groups, flat = operands.shape, operands.groups, operands.flat
    prologue, statistics = operands.prologue[1] is not None, operands.statistics
    kind = "flat" if flat else "prologue" if prologue else "statistics" if statistics else "plain"
    taps, depth = shape.taps[0] * shape.taps[1], shape.channels // groups
    problem = configs.problem(
        kind, y, allow_tf32, groups, shape.pixels, shape.filters // groups,
        *((depth * taps, 1) if flat else (depth, taps)),
    )  # fmt: skip
    launch = operands.by_pointers
    ways = [Way(fprop_kernel, problem, launch, configs.candidates(problem))]
    if not flat:
        split = configs.split_candidates(problem)
        ways += [Way(fprop_kernel, problem, launch, (each,)) for each in split]
    elif tile and tile.parts > 1:
        raise ValueError("tile: no parts of a convolution of so few channels")
    if obstacle is None:
        problem = problem._replace(kind="descriptors")
        kernel, launch = conv_descriptors.fprop_descriptors_kernel, operands.on_descriptors
        ways.append(Way(kernel, problem, launch, configs.candidates(problem)))
    elif tile and tile.descriptors:
        raise ValueError(f"tile: no tensor descriptors for a convolution with {obstacle}")

    def measure(way: Way, tuner):
        lowest = min(way.tiles, key=lambda tile: tile.BLOCK_M)  # needs the most room for its sums
        way.launch(tuner, lowest, torch.empty_like(y), lambda kernel: kernel)

    residual = operands.epilogue[-1]
    key = (shape.taps, shape.stride, statistics, prologue, residual is None)
    return tuning.choose(ways, key, y, measure, tile)
