"""The convolution's gradient of its input: implicit GEMM over the taps that touch a pixel.

With stride (u, v) only every u-th tap touches a given row of x, and which ones depends on the row
modulo u. So the pixels of x fall into u * v classes, and a launch treats one class: a convolution
of dy with stride 1 over the taps of that class, no product with a zero that striding left behind.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, conv_boxes, conv_descriptors, tuning
from .configs import Tile
from .conv_epilogue import finish_gradient
from .conv_operands import Affine, empty_last, grid, last, on, precision, vectors
from .conv_shape import Shape, merge_groups, merged, taps_by_class
from .conv_tile import accumulate_merged, place_of, unravel
from .segments import MANY, merge_sums
from .tuning import Way


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
    MERGED: tl.constexpr,
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
    g * (behind - mean), see ``conv_epilogue``.

    R and S are the taps of the class; with none, dx is the residual.
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
    acc = accumulate_merged(
        dy, w + group * group_filters * w_filter, None, None, None,
        image, row, column, inside, out, out_known,
        out_height, out_width, filters, group * group_filters, group_filters, group_channels,
        step_h, step_w, w_row, w_column, w_filter, 1,
        MERGED, R, S, False, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish_gradient(
        acc, dx, residual, behind, mean, scale, shift, output, sums_g, sums_gx,
        m, place, inside, group * group_channels + out, out_known, channels, RELU,
    )  # fmt: skip


# --- launcher ------------------------------------------------------------------------------------


class Behind(NamedTuple):
    """The BN and ReLU whose output was a convolution's input: BN's input and coefficients, and the
    ReLU's output if it was kept (it is recomputed otherwise)."""

    input: Tensor  # (N, C, H, W)
    affine: Affine
    output: Tensor | None = None  # (N, C, H, W)


def dgrad(
    dy: Tensor, w: Tensor, input_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    groups: int = 1, *, residual: Tensor | None = None, behind: Behind | None = None,
    allow_tf32: bool = False, tile: Tile | None = None, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``g``, ``sums_g``, ``sums_gx``: the gradient of the input plus ``residual``, another gradient
    of it; with ``behind`` masked by that ReLU, and per segment and channel the sums of g and of
    ``g * (behind.input - mean)``, for ``finish_sums_kernel``."""
    dy, w, residual = last(dy), last(w), last(residual)
    shape = Shape.of(input_size, w.shape, stride, padding, dilation, groups)
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    dx = empty_last(dy, shape.input)
    if not dx.numel():
        sums = vectors(dy, 2, 0, shape.channels) if behind else (None, None)
        return dx, *sums
    classes = taps_by_class(shape, w.shape[1] * merge)
    obstacle = conv_descriptors.dgrad_obstacle(groups, classes, dy, w)
    w = merge_groups(w, groups, merge)
    groups //= merge
    problem = configs.problem(
        "masked" if behind else "plain", dy, allow_tf32, groups, max(c.pixels for c in classes),
        shape.channels // groups, shape.filters // groups,
    )  # fmt: skip
    source, affine, output = behind or (None, (None, None, None), None)
    source, output = last(source), last(output)

    def operands(part, dx):
        """Those from w on, of a class."""
        first = part.first_pixel * shape.channels
        dx, *others = (
            t if t is None else _elements(t)[first:] for t in (dx, residual, source, output)
        )
        return _elements(w)[part.first_weight :], dx, others[0], others[1], *affine, others[2]

    def launch(kernel, part, sums, dx=dx, **keywords):
        kernel[grid(part.pixels, groups, shape.channels // groups)](
            dy, *operands(part, dx), *sums,
            part.pixels, *part.grid, *shape.input[2:], shape.channels, shape.filters,
            *shape.output[2:], *stride, *part.offset, *part.step, *part.w_steps,
            w[0].numel(), shape.channels // groups, shape.filters // groups,
            MERGED=merge, R=part.taps[0], S=part.taps[1], RELU=behind is not None,
            PLAIN=shape.pointwise, PADDED=not shape.pointwise, PRECISION=precision(allow_tf32),
            **keywords,
        )  # fmt: skip

    def launch_descriptors(kernel, part, sums, dx=dx, **keywords):
        conv_descriptors.launch_dgrad(
            kernel, shape, part, dy, *operands(part, dx), *sums,
            RELU=behind is not None, **keywords,
        )  # fmt: skip

    ways = [Way(dgrad_kernel, problem, launch)]
    if obstacle is None:
        problem = problem._replace(kind="descriptors")
        ways.append(Way(conv_descriptors.dgrad_descriptors_kernel, problem, launch_descriptors))
    elif tile and tile.descriptors:
        raise ValueError(f"tile: no tensor descriptors for a gradient with {obstacle}")

    def tiles_of(part, tile) -> int:
        if tile.descriptors:
            extent = conv_descriptors.class_extent(shape, part)
            return conv_boxes.tiles_of(extent, tile.BLOCK_M)
        return triton.cdiv(part.pixels, tile.BLOCK_M)

    def measure(way: Way, tuner):
        most = max(classes, key=lambda part: part.taps[0] * part.taps[1])
        sums = (None, None)
        if behind:
            lowest = min(configs.candidates(way.problem), key=lambda tile: tile.BLOCK_M)
            tiles = tiles_of(most, lowest)
            sums = vectors(dy, 2, tiles, shape.channels)
        way.launch(tuner, most, sums, torch.empty_like(dx))

    with on(dy):
        key = (shape.taps, shape.stride, residual is None, output is None)
        way, tile = tuning.choose(ways, key, dy, measure, tile)
        kernel = way.kernel if tile.descriptors else wrap(way.kernel)
        tiles = [tiles_of(part, tile) for part in classes]
        sums = vectors(dy, 2, sum(tiles), shape.channels) if behind else (None, None)
        for i, part in enumerate(classes):
            own = [s if s is None else s[sum(tiles[:i]) :] for s in sums]
            way.launch(kernel, part, own, **tile.keywords)
        if behind and sum(tiles) > MANY:
            sums = [merge_sums(s, MANY, s.dtype, wrap) for s in sums]
    return dx, *sums


def _elements(tensor: Tensor) -> Tensor:
    """Of a channels_last tensor, in the order of memory."""
    return tensor.permute(0, 2, 3, 1).reshape(-1)
