"""Batch norm, optional residual, optional ReLU: forward and backward.

Sums over a channel are taken in two levels. Each program reduces one segment of a block of
channels; a second kernel merges the segments in their order. No atomics, so two runs give the same
bits, and the number of segments is chosen to fill the chip whatever the shape.

Launchers run on the current device and stream. ``wrap`` is applied to every kernel:
``torch.library.wrap_triton`` makes the launch visible to a graph that is being traced.
"""

import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout, accumulation_dtype, per_channel, place, segment_of, step_of, steps
from .moments import finish_moments_kernel, frozen_moments_kernel, moments_kernel
from .segments import Moments

# --- forward --------------------------------------------------------------------------------------


@triton.jit
def apply_kernel(
    input, residual, output, mean, invstd, weight, bias, rows, columns, channels,
    RELU: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``act((x - mean) * weight * invstd + bias + residual)``."""
    acc = mean.dtype.element_ty
    offset, mask, channel, known = place(rows, columns, channels, LAST, BLOCK_R, BLOCK_L)
    centre, scale, shift = _coefficients(mean, invstd, weight, bias, channel, known)
    x = tl.load(input + offset, mask=mask, other=0).to(acc)
    y = tl.fma(x - centre, scale, shift)
    if residual is not None:
        y += tl.load(residual + offset, mask=mask, other=0).to(acc)
    if RELU:
        y = tl.where(y <= 0, 0, y)  # NaN stays
    tl.store(output + offset, y.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _coefficients(mean, invstd, weight, bias, channel, known):
    """Mean, ``weight * invstd`` and bias of each channel."""
    acc = mean.dtype.element_ty
    centre = tl.load(mean + channel, mask=known, other=0)
    scale = tl.load(invstd + channel, mask=known, other=0)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known, other=0).to(acc)
    shift = tl.zeros_like(centre)
    if bias is not None:
        shift = tl.load(bias + channel, mask=known, other=0).to(acc)
    return centre, scale, shift


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _masked_gradient(
    grad_output, input, output, offset, mask, centre, scale, shift, RELU: tl.constexpr
):
    """The gradient that ReLU let pass, and ``x - mean``. Without an output the mask is computed
    anew, by forward's operations and rounded as forward rounded."""
    acc = centre.dtype
    x = tl.load(input + offset, mask=mask, other=0)
    centred = tl.where(mask, x.to(acc) - centre, 0)
    g = tl.load(grad_output + offset, mask=mask, other=0).to(acc)
    if RELU:
        if output is not None:
            y = tl.load(output + offset, mask=mask, other=0)
        else:
            y = tl.fma(x.to(acc) - centre, scale, shift).to(x.dtype)
        g = tl.where(y.to(acc) <= 0, 0, g)
    return g, centred


@triton.jit
def backward_sums_kernel(
    grad_output, input, output, grad_residual, mean, invstd, weight, bias, sums_g, sums_gx,
    outer, inner, channels, segment_rows, segment_columns, across,
    RELU: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Per segment and channel the sums of g and of g * (x - mean), g being the masked gradient,
    which is also what the residual gets."""
    acc = sums_g.dtype.element_ty
    segment, channel, top, bottom, left, right, base = segment_of(
        outer, inner, channels, segment_rows, segment_columns, across, LAST, BLOCK_L
    )
    known = channel < channels
    pitch = tl.cast(inner, tl.int64) * channels  # of one image alone, it may pass 2^31
    centre, scale, shift = _coefficients(mean, invstd, weight, bias, channel, known)
    total_g = tl.zeros([BLOCK_R, BLOCK_L], acc)
    total_gx = tl.zeros([BLOCK_R, BLOCK_L], acc)
    for step in range(steps(top, bottom, left, right, LAST, BLOCK_R, BLOCK_L)):
        offset, mask = step_of(step, top, bottom, left, right, base, pitch, LAST, BLOCK_R, BLOCK_L)
        g, centred = _masked_gradient(
            grad_output, input, output, offset, mask, centre, scale, shift, RELU
        )
        if grad_residual is not None:
            tl.store(grad_residual + offset, g.to(grad_residual.dtype.element_ty), mask=mask)
        total_g += g
        total_gx += g * centred
    tl.store(sums_g + segment * channels + channel, per_channel(total_g, LAST), mask=known)
    tl.store(sums_gx + segment * channels + channel, per_channel(total_gx, LAST), mask=known)


@triton.jit
def finish_sums_kernel(
    sums_g, sums_gx, invstd, grad_weight, grad_bias, segments, channels,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    acc = sums_g.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    total_g = tl.zeros([BLOCK_C], acc)
    total_gx = tl.zeros([BLOCK_C], acc)
    for first in range(0, segments, BLOCK_S):
        segment = first + tl.arange(0, BLOCK_S)
        mask = (segment < segments)[:, None] & known[None, :]
        offset = segment[:, None] * channels + channel[None, :]
        total_g += tl.sum(tl.load(sums_g + offset, mask=mask, other=0), 0)
        total_gx += tl.sum(tl.load(sums_gx + offset, mask=mask, other=0), 0)
    tl.store(grad_bias + channel, total_g, mask=known)
    scale = tl.load(invstd + channel, mask=known, other=0)
    tl.store(grad_weight + channel, total_gx * scale, mask=known)


@triton.jit
def backward_apply_kernel(
    grad_output, input, output, grad_input, grad_residual, mean, invstd, weight, bias,
    grad_weight, grad_bias, rows, columns, channels, count,
    RELU: tl.constexpr, TRAINING: tl.constexpr, LAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``dx = scale * (g - mean(g) - xhat * mean(g * xhat))``; with frozen statistics
    ``scale * g``."""
    acc = mean.dtype.element_ty
    offset, mask, channel, known = place(rows, columns, channels, LAST, BLOCK_R, BLOCK_L)
    centre, scale, shift = _coefficients(mean, invstd, weight, bias, channel, known)
    g, centred = _masked_gradient(
        grad_output, input, output, offset, mask, centre, scale, shift, RELU
    )
    if grad_residual is not None:
        tl.store(grad_residual + offset, g.to(grad_residual.dtype.element_ty), mask=mask)
    if grad_input is not None:
        if TRAINING:
            n = tl.cast(count, acc)
            slope = tl.load(grad_weight + channel, mask=known, other=0) / n
            slope *= tl.load(invstd + channel, mask=known, other=0)
            g = g - tl.load(grad_bias + channel, mask=known, other=0) / n - centred * slope
        tl.store(grad_input + offset, (scale * g).to(grad_input.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------------

# A merging program looks at most segments at once, of few channels: then there are many programs.
_MERGE = {"BLOCK_S": 512, "BLOCK_C": 8}
_FROZEN_BLOCK = 128
# Sums of a whole tile stay in registers: with 4 warps too many for more than 8 warps to be resident.
_REDUCTION_WARPS = 8


def bn_relu(
    input: Tensor, residual: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, relu: bool, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``output, mean, invstd``; the running statistics are updated when ``training``."""
    layout = Layout.of(input)
    # all memory before anything is written: running statistics stay as they were where it lacks
    x, output = layout.dense(input), layout.empty(input)
    if training:
        mean, invstd = _moments(layout, x, running_mean, running_var, momentum, eps, wrap)
    else:
        channels = layout.channels
        mean, invstd = _statistics(input), _statistics(input)
        wrap(frozen_moments_kernel)[(triton.cdiv(channels, _FROZEN_BLOCK),)](
            running_mean, running_var, mean, invstd, channels, eps, BLOCK_C=_FROZEN_BLOCK
        )
    normalise(x, residual, output, mean, invstd, weight, bias, relu, wrap)
    return output, mean, invstd


def bn_relu_moments(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    eps: float, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``mean, invstd`` of the batch; the running statistics are updated."""
    layout = Layout.of(input)
    return _moments(layout, layout.dense(input), running_mean, running_var, momentum, eps, wrap)


def _moments(
    layout: Layout, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, eps: float, wrap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cut, tile = layout.segments(), layout.reduction_tile
    moments = Moments.empty(x, cut.count, layout.channels, accumulation_dtype(x.dtype))
    wrap(moments_kernel)[(cut.count * layout.channel_blocks,)](
        x, *moments,
        layout.outer, layout.inner, layout.channels, cut.rows, cut.columns, cut.across,
        LAST=layout.last, **tile._asdict(), num_warps=_REDUCTION_WARPS,
    )  # fmt: skip
    return finish_moments(moments, running_mean, running_var, momentum, eps, wrap)


def finish_moments(
    moments: Moments, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    eps: float, wrap,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``mean, invstd`` of the batch; the running statistics are updated."""
    segments, channels = moments.means.shape
    mean, invstd = (moments.means.new_empty(channels) for _ in range(2))
    wrap(finish_moments_kernel)[(triton.cdiv(channels, _MERGE["BLOCK_C"]),)](
        *moments, mean, invstd, running_mean, running_var, segments, channels, momentum, eps,
        **_MERGE,
    )  # fmt: skip
    return mean, invstd


def bn_relu_apply(
    input: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, relu: bool, wrap=lambda kernel: kernel,
) -> Tensor:  # fmt: skip
    """``act((input - mean) * invstd * weight + bias + residual)``."""
    layout = Layout.of(input)
    output = layout.empty(input)
    normalise(layout.dense(input), residual, output, mean, invstd, weight, bias, relu, wrap)
    return output


def normalise(
    input: Tensor, residual: Tensor | None, output: Tensor, mean: Tensor, invstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, relu: bool, wrap,
) -> None:  # fmt: skip
    """``output = act((input - mean) * invstd * weight + bias + residual)``; input and output are
    dense, in one format."""
    layout = Layout.of(input)
    wrap(apply_kernel)[layout.grid()](
        input, layout.dense(residual), output, mean, invstd, weight, bias,
        *layout.shape, layout.channels, RELU=relu, LAST=layout.last, **layout.tile._asdict(),
    )  # fmt: skip


def bn_relu_backward(
    grad_output: Tensor, input: Tensor, output: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, save_mean: Tensor, save_invstd: Tensor, training: bool, relu: bool,
    output_mask: list[bool], wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, residual, weight and bias; one that is not wanted is empty."""
    want_input, want_residual, want_parameters = output_mask
    layout = Layout.of(input)
    g, x, y = (layout.dense(tensor) for tensor in (grad_output, input, output))
    grad_input = layout.empty(input) if want_input else None
    grad_residual = layout.empty(input) if want_residual else None
    grad_weight = grad_bias = None
    vectors = (save_mean, save_invstd, weight, bias)
    if want_parameters or (training and want_input):
        grad_weight, grad_bias = _statistics(input), _statistics(input)
        cut, tile = layout.segments(), layout.reduction_tile
        sums_g, sums_gx = _statistics(input, cut.count), _statistics(input, cut.count)
        wrap(backward_sums_kernel)[(cut.count * layout.channel_blocks,)](
            g, x, y, grad_residual, *vectors, sums_g, sums_gx,
            layout.outer, layout.inner, layout.channels, cut.rows, cut.columns, cut.across,
            RELU=relu, LAST=layout.last, **tile._asdict(), num_warps=_REDUCTION_WARPS,
        )  # fmt: skip
        _finish_sums(sums_g, sums_gx, save_invstd, grad_weight, grad_bias, wrap)
        if want_residual:  # written there, and masked: what is left to do reads it instead
            g, y, relu, want_residual = grad_residual, None, False, False
    if want_input or want_residual:
        wrap(backward_apply_kernel)[layout.grid()](
            g, x, y, grad_input, grad_residual if want_residual else None,
            *vectors, grad_weight, grad_bias, *layout.shape, layout.channels,
            layout.outer * layout.inner, RELU=relu, TRAINING=training, LAST=layout.last,
            **layout.tile._asdict(),
        )  # fmt: skip
    if not want_parameters:
        grad_weight, grad_bias = save_mean.new_empty(0), save_mean.new_empty(0)
    return (
        input.new_empty(0) if grad_input is None else grad_input,
        input.new_empty(0) if grad_residual is None else grad_residual,
        grad_weight,
        grad_bias,
    )


def bn_relu_backward_of_sums(
    g: Tensor, input: Tensor, sums_g: Tensor, sums_gx: Tensor, weight: Tensor | None,
    save_mean: Tensor, save_invstd: Tensor, want_input: bool, wrap,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The training form, without a residual, of a gradient that is masked and whose sums
    (segments, C) are known: gradients of input, weight and bias. ``g`` and ``input`` are dense, in
    one format."""
    layout = Layout.of(input)
    grad_weight, grad_bias = _statistics(input), _statistics(input)
    _finish_sums(sums_g, sums_gx, save_invstd, grad_weight, grad_bias, wrap)
    if not want_input:
        return input.new_empty(0), grad_weight, grad_bias
    grad_input = layout.empty(input)
    wrap(backward_apply_kernel)[layout.grid()](
        g, input, None, grad_input, None, save_mean, save_invstd, weight, None, grad_weight, grad_bias,
        *layout.shape, layout.channels, layout.outer * layout.inner, RELU=False, TRAINING=True,
        LAST=layout.last, **layout.tile._asdict(),
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias


def _finish_sums(sums_g, sums_gx, save_invstd, grad_weight, grad_bias, wrap) -> None:
    segments, channels = sums_g.shape
    wrap(finish_sums_kernel)[(triton.cdiv(channels, _MERGE["BLOCK_C"]),)](
        sums_g, sums_gx, save_invstd, grad_weight, grad_bias, segments, channels, **_MERGE
    )


def _statistics(input: Tensor, *segments: int) -> Tensor:
    """Uninitialised (C,) or (segments, C), of the dtype that accumulates ``input``'s."""
    size = (*segments, input.shape[1])
    return input.new_empty(size, dtype=accumulation_dtype(input.dtype))
