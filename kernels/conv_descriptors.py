"""The convolution and its gradient of the input on tensor descriptors, see ``conv_boxes``.

Not the shipped choice: ``tuning`` may choose it where it was measured to be faster.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import conv_boxes
from .conv_boxes import Extent, accumulate_boxes, boxed, boxes_of, corner_of, pixels_of
from .conv_epilogue import finish, finish_gradient
from .conv_operands import Affine
from .conv_shape import Class, Shape, flat_channels
from .conv_tile import place_of

# --- forward --------------------------------------------------------------------------------------


@boxed("out_height", "out_width")
@triton.jit
def fprop_descriptors_kernel(
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
    """As ``fprop_kernel``, see there."""
    activations = boxes_of(x, images, height, width, channels, STRIDE_H, STRIDE_W, BOX, BLOCK_K)
    weights = tl.make_tensor_descriptor(
        w,
        [R, S, filters, channels],
        [S * channels, channels, R * S * channels, 1],
        [1, 1, BLOCK_N, BLOCK_K],
    )
    row_tiles = tl.cdiv(images, BOX[0]) * tl.cdiv(out_height, BOX[1]) * tl.cdiv(out_width, BOX[2])
    column_tiles = tl.cdiv(filters, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True
    ):
        m, n = place_of(tile, row_tiles, column_tiles, GROUP_M)
        image, row, column = corner_of(m, out_height, out_width, BOX)
        # to be divided by the stride, rows above the map are lifted by as many strides
        acc = accumulate_boxes(
            activations, weights, image, row - padding_h, column - padding_w, n * BLOCK_N,
            width, channels, (STRIDE_H - 1) * padding_h, (STRIDE_W - 1) * padding_w,
            dilation_h, dilation_w,
            R, S, STRIDE_H, STRIDE_W, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        i, p, q, inside = pixels_of(image, row, column, images, out_height, out_width, BOX)
        count = tl.minimum(images - image, BOX[0])
        count *= tl.minimum(out_height - row, BOX[1]) * tl.minimum(out_width - column, BOX[2])
        k = n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish(
            acc, y, bias, mean, variance, scale, shift, residual, means, squares, counts,
            m, (i * out_height + p) * out_width + q, inside, count,
            k, k < filters, filters, eps, RELU,
        )  # fmt: skip


def fprop_obstacle(
    shape: Shape, groups: int, prologue: Affine | None, x: Tensor, w: Tensor
) -> str | None:
    """What keeps the kernel from computing such a convolution, if anything."""
    # the operands first: of a graph that is traced sizes are not to be asked
    if obstacle := conv_boxes.obstacle(x, w):
        return obstacle
    if prologue:
        return "a prologue"
    if groups > 1:
        return "groups"
    if flat_channels(groups, shape.channels):
        return "so few channels that they and the taps are one axis"
    if any(size % stride for size, stride in zip(shape.input[2:], shape.stride, strict=True)):
        return f"a map of {shape.input[2]}x{shape.input[3]} that its stride does not divide"
    return None


def output_extent(shape: Shape) -> Extent:
    return _extent(shape, shape.output)


def _extent(shape: Shape, of: tuple[int, ...]) -> Extent:
    """Of the input or the output; of a plain matrix product one row of all pixels, which boxes cut
    without waste."""
    return (1, 1, shape.pixels) if shape.pointwise else (of[0], *of[2:])


def launch_fprop(kernel, shape: Shape, x: Tensor, *operands, **keywords) -> None:
    """``operands``: the kernel's others up to ``counts``; ``keywords`` has eps, RELU and the tile."""
    conv_boxes.launch(
        kernel, output_extent(shape), shape.filters, x, *operands,
        *_extent(shape, shape.input), shape.channels, shape.filters, *output_extent(shape)[1:],
        *shape.padding, *shape.dilation, R=shape.taps[0], S=shape.taps[1],
        STRIDE_H=shape.stride[0], STRIDE_W=shape.stride[1], **keywords,
    )  # fmt: skip


# --- backward -------------------------------------------------------------------------------------


@boxed("rows", "columns")
@triton.jit
def dgrad_descriptors_kernel(
    dy,  # (N, P, Q, K)
    w,  # (K, R, S, C), from the first tap of the class
    dx,  # (N, H, W, C), from the first pixel of the class
    residual,  # (N, H, W, C) or None, likewise
    behind,  # (N, H, W, C) or None, likewise
    mean,  # (C,) or None
    scale,  # (C,) or None
    shift,  # (C,) or None
    output,  # (N, H, W, C) or None, likewise
    sums_g,  # (tiles of pixels, C) or None
    sums_gx,  # (tiles of pixels, C) or None
    images,
    rows,  # of the class
    columns,
    height,
    width,
    channels,
    filters,
    out_height,
    out_width,
    stride_h,
    stride_w,
    offset_h,
    offset_w,
    step_h,
    step_w,
    w_row,
    w_column,
    w_filter,
    R: tl.constexpr,
    S: tl.constexpr,
    RELU: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As ``dgrad_kernel``, see there."""
    gradients = boxes_of(dy, images, out_height, out_width, filters, 1, 1, BOX, BLOCK_K)
    weights = tl.make_tensor_descriptor(
        w, [R, S, filters, channels], [w_row, w_column, w_filter, 1], [1, 1, BLOCK_K, BLOCK_N]
    )
    row_tiles = tl.cdiv(images, BOX[0]) * tl.cdiv(rows, BOX[1]) * tl.cdiv(columns, BOX[2])
    column_tiles = tl.cdiv(channels, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True
    ):
        m, n = place_of(tile, row_tiles, column_tiles, GROUP_M)
        image, row, column = corner_of(m, rows, columns, BOX)
        acc = accumulate_boxes(
            gradients, weights, image, row + offset_h, column + offset_w, n * BLOCK_N,
            out_width, filters, 0, 0, step_h, step_w,
            R, S, 1, 1, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        i, p, q, inside = pixels_of(image, row, column, images, rows, columns, BOX)
        place = (i.to(tl.int64) * height + p * stride_h) * width + q * stride_w
        c = n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish_gradient(
            acc, dx, residual, behind, mean, scale, shift, output, sums_g, sums_gx,
            m, place, inside, c, c < channels, channels, RELU,
        )  # fmt: skip


def dgrad_obstacle(groups: int, classes: list[Class], dy: Tensor, w: Tensor) -> str | None:
    """What keeps the kernel from computing such a gradient, if anything."""
    if obstacle := conv_boxes.obstacle(dy, w):
        return obstacle
    if groups > 1:
        return "groups"
    if not all(part.taps[0] for part in classes):
        return "a stride that leaves pixels without a tap"
    return None


def class_extent(shape: Shape, part: Class) -> Extent:
    return (1, 1, part.pixels) if shape.pointwise else (shape.input[0], *part.grid)


def launch_dgrad(
    kernel, shape: Shape, part: Class, dy: Tensor, w: Tensor, *operands, **keywords
) -> None:
    """``operands``: the kernel's others up to ``sums_gx``; ``keywords`` has RELU and the tile."""
    conv_boxes.launch(
        kernel, class_extent(shape, part), shape.channels, dy, w, *operands,
        *class_extent(shape, part), *_extent(shape, shape.input)[1:],
        shape.channels, shape.filters, *_extent(shape, shape.output)[1:],
        *shape.stride, *part.offset, *part.step, *part.w_steps,
        shape.taps[0] * shape.taps[1] * shape.channels,
        R=part.taps[0], S=part.taps[1], **keywords,
    )  # fmt: skip
