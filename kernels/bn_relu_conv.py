"""A convolution of ``relu(batch_norm(x))`` in training, and its gradients: a link of a chain of
convolutions whose normalised activations are never written.

Triton's kernels normalise what they load. Around the vendor's convolution the activation is made in
a pass, and not kept. ``wrap`` is applied to every kernel: ``torch.library.wrap_triton`` makes the
launch visible to a graph that is being traced.
"""

import torch
from torch import Tensor

from . import conv_choice
from .bn_relu import (
    bn_relu_apply,
    bn_relu_backward,
    bn_relu_backward_of_sums,
    bn_relu_moments,
    finish_moments,
)
from .conv import allows_tf32, conv_dgrad, conv_wgrad, most_pixels, serves_forward, wgrad_of
from .conv_dgrad import Behind, dgrad
from .conv_fprop import fprop
from .conv_operands import Affine
from .conv_wgrad import wgrad
from .layout import accumulation_dtype


def bn_relu_conv(
    input: Tensor, mean: Tensor | None, invstd: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None,
    stride, padding, dilation, groups: int, momentum: float, eps: float, statistics: bool,
    wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``conv2d(relu(batch_norm(input)), weight, bias)``, without a mean ``conv2d(input, ...)``; with
    ``statistics`` also its own mean and invstd, and the running ones are updated."""
    window = (stride, padding, dilation, groups)
    nothing = input.new_empty(0, dtype=accumulation_dtype(input.dtype))
    what = "bn_relu_conv" if mean is not None else "training" if statistics else "conv"
    if not serves_forward(what, input, weight, *window):
        if mean is not None:
            input = bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias, True, wrap)
        output = torch.nn.functional.conv2d(input, weight, bias, *window)
        if not statistics:
            return output, nothing, nothing.clone()
        return output, *bn_relu_moments(output, running_mean, running_var, momentum, eps, wrap)
    prologue = None if mean is None else _affine(mean, invstd, bn_weight, bn_bias)
    output, moments = fprop(
        input, weight, *window, bias=bias, prologue=prologue, statistics=statistics,
        allow_tf32=allows_tf32(input), wrap=wrap,
    )  # fmt: skip
    if not statistics:
        return output, nothing, nothing.clone()
    return output, *finish_moments(moments, running_mean, running_var, momentum, eps, wrap)


def bn_relu_conv_backward(
    grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, bn_weight: Tensor | None,
    bn_bias: Tensor | None, weight: Tensor, stride, padding, dilation, groups: int,
    output_mask: list[bool], wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, bn_weight, bn_bias, weight and bias, the statistics being the batch's;
    those that are not wanted are empty."""
    want_input, want_bn, want_weight, want_bias = output_mask
    operands = (grad_output, input, mean, invstd, bn_weight, bn_bias, weight)
    window = (stride, padding, dilation, groups)
    filters = _wgrad(*operands, window, [want_weight, want_bias], wrap)
    if not (want_input or want_bn):
        return input.new_empty(0), mean.new_empty(0), mean.new_empty(0), *filters
    grad_input, *vectors = _dgrad(*operands, window, want_input, wrap)
    if not want_bn:
        vectors = mean.new_empty(0), mean.new_empty(0)
    return grad_input, *vectors, *filters


def _wgrad(grad_output, input, mean, invstd, bn_weight, bn_bias, weight, window, wanted, wrap):
    """Of weight and bias."""
    if not any(wanted):
        return weight.new_empty(0), weight.new_empty(0)
    if wanted[0] and _serves("bn_relu_conv_wgrad", input, grad_output, weight, window):
        found = wgrad(
            grad_output, input, weight.shape, *window, allow_tf32=allows_tf32(input), wrap=wrap,
            prologue=_affine(mean, invstd, bn_weight, bn_bias),
        )  # fmt: skip
        return wgrad_of(weight, found, grad_output, wanted[1])
    activation = bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias, True, wrap)
    return conv_wgrad(grad_output, activation, weight, *window, wanted, wrap)


def _dgrad(grad_output, input, mean, invstd, bn_weight, bn_bias, weight, window, want_input, wrap):
    """Of input, bn_weight and bn_bias."""
    if not _serves("bn_relu_conv_dgrad", input, grad_output, weight, window):
        grad = conv_dgrad(grad_output, input, weight, *window, wrap)
        grad_input, _, *vectors = bn_relu_backward(
            grad, input, None, bn_weight, bn_bias, mean, invstd, True, True,
            [want_input, False, True], wrap,
        )  # fmt: skip
        return grad_input, *vectors
    behind = Behind(input, _affine(mean, invstd, bn_weight, bn_bias))
    passed, *sums = dgrad(
        grad_output, weight, input.shape, *window, behind=behind, allow_tf32=allows_tf32(input),
        wrap=wrap,
    )  # fmt: skip
    x = input.contiguous(memory_format=torch.channels_last)
    return bn_relu_backward_of_sums(passed, x, *sums, bn_weight, mean, invstd, want_input, wrap)


def _serves(what: str, input: Tensor, grad_output: Tensor, weight: Tensor, window) -> bool:
    stride, _, dilation, groups = window
    return conv_choice.serves(
        what, input, weight.shape, stride, dilation, groups, last=conv_choice.is_last(input),
        most_pixels=most_pixels(input, grad_output), allow_tf32=allows_tf32(input),
    )  # fmt: skip


def _affine(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    """With the scale that bn_relu's kernels have, to the bit."""
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    return Affine(mean, scale, torch.zeros_like(mean) if bias is None else bias)
