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
from .conv_shape import Class, Shape, merge_groups, merged, taps_by_class
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
        MERGED, R, S, False, False, PADDED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
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


class _Operands(NamedTuple):
    """Of every launch of a gradient, all channels_last."""

    shape: Shape
    groups: int
    merged: int  # groups computed as one
    dy: Tensor
    w: Tensor
    residual: Tensor | None
    behind: Behind | None
    precision: str

    def by_pointers(self, kernel, part: Class, dx: Tensor, sums, **tile) -> None:
        shape, groups = self.shape, self.groups
        kernel[grid(part.pixels, groups, shape.channels // groups)](
            *self._of_class(part, dx), *sums,
            part.pixels, *part.grid, *shape.input[2:], shape.channels, shape.filters,
            *shape.output[2:], *shape.stride, *part.offset, *part.step, *part.w_steps,
            self.w[0].numel(), shape.channels // groups, shape.filters // groups,
            MERGED=self.merged, R=part.taps[0], S=part.taps[1], RELU=self.behind is not None,
            PLAIN=shape.pointwise, PADDED=not shape.pointwise, PRECISION=self.precision, **tile,
        )  # fmt: skip

    def on_descriptors(self, kernel, part: Class, dx: Tensor, sums, **tile) -> None:
        conv_descriptors.launch_dgrad(
            kernel, self.shape, part, *self._of_class(part, dx), *sums,
            RELU=self.behind is not None, **tile,
        )  # fmt: skip

    def _of_class(self, part: Class, dx: Tensor):
        """The kernels' arguments from dy to output."""
        source, affine, output = self.behind or (None, (None, None, None), None)
        maps = (
            None if t is None else _elements(t)[part.first_pixel * self.shape.channels :]
            for t in (dx, self.residual, source, output)
        )
        dx, residual, source, output = maps
        weights = _elements(self.w)[part.first_weight :]
        return self.dy, weights, dx, residual, source, *affine, output

    def tiles(self, part: Class, tile: Tile) -> int:
        if tile.descriptors:
            extent = conv_descriptors.class_extent(self.shape, part)
            return conv_boxes.tiles_of(extent, tile.BLOCK_M)
        return triton.cdiv(part.pixels, tile.BLOCK_M)

    def sums(self, tiles: int):
        """Room for those of the batch norm behind."""
        return vectors(self.dy, 2, tiles, self.shape.channels) if self.behind else (None, None)


def _elements(tensor: Tensor) -> Tensor:
    """Of a channels_last tensor, in the order of memory."""
    return tensor.permute(0, 2, 3, 1).reshape(-1)


def dgrad(
    dy: Tensor, w: Tensor, input_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    groups: int = 1, *, residual: Tensor | None = None, behind: Behind | None = None,
    allow_tf32: bool = False, tile: Tile | None = None, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``g``, ``sums_g``, ``sums_gx``: the gradient of the input plus ``residual``, another gradient
    of it; with ``behind`` masked by that ReLU, and per segment and channel the sums of g and of
    ``g * (behind.input - mean)``, for ``finish_sums_kernel``."""
    dy, w, residual = last(dy), last(w), last(residual)
    if behind:
        behind = Behind(last(behind.input), behind.affine, last(behind.output))
    shape = Shape.of(input_size, w.shape, stride, padding, dilation, groups)
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    operands = _Operands(
        shape, groups // merge, merge, dy, merge_groups(w, groups, merge), residual, behind,
        precision(allow_tf32),
    )  # fmt: skip
    dx = empty_last(dy, shape.input)
    if not dx.numel():
        return dx, *operands.sums(0)
    classes = taps_by_class(shape, operands.w.shape[1])
    with on(dy):
        obstacle = conv_descriptors.dgrad_obstacle(groups, classes, dy, w)
        way, tile = _choose(operands, classes, obstacle, dx, allow_tf32, tile)
        kernel = way.kernel if tile.descriptors else wrap(way.kernel)
        tiles = [operands.tiles(part, tile) for part in classes]
        sums = operands.sums(sum(tiles))
        for i, part in enumerate(classes):
            own = [s if s is None else s[sum(tiles[:i]) :] for s in sums]
            way.launch(kernel, part, dx, own, **tile.keywords)
        if behind and sum(tiles) > MANY:
            sums = [merge_sums(s, MANY, s.dtype, wrap) for s in sums]
    return dx, *sums


def _choose(
    operands: _Operands, classes: list[Class], obstacle: str | None, dx: Tensor, allow_tf32: bool,
    tile: Tile | None,
) -> tuple[Way, Tile]:  # fmt: skip
    """Measured, if it is, on the class of most taps."""
    shape, groups, behind = operands.shape, operands.groups, operands.behind
    problem = configs.problem(
        "masked" if behind else "plain", dx, allow_tf32, groups,
        max(part.pixels for part in classes), shape.channels // groups, shape.filters // groups,
        max(1, *(part.taps[0] * part.taps[1] for part in classes)),
    )  # fmt: skip
    ways = [Way(dgrad_kernel, problem, operands.by_pointers, configs.candidates(problem))]
    if obstacle is None:
        problem = problem._replace(kind="descriptors")
        kernel = conv_descriptors.dgrad_descriptors_kernel
        ways.append(Way(kernel, problem, operands.on_descriptors, configs.candidates(problem)))
    elif tile and tile.descriptors:
        raise ValueError(f"tile: no tensor descriptors for a gradient with {obstacle}")

    def measure(way: Way, tuner):
        most = max(classes, key=lambda part: part.taps[0] * part.taps[1])
        lowest = min(way.tiles, key=lambda tile: tile.BLOCK_M)
        sums = operands.sums(operands.tiles(most, lowest))
        way.launch(tuner, most, torch.empty_like(dx), sums)

    output = behind and behind.output
    key = (shape.taps, shape.stride, operands.residual is None, output is None)
    return tuning.choose(ways, key, dx, measure, tile)
