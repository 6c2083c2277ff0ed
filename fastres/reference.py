"""Eager PyTorch maths of every operator: the ground truth, the fallback and the documentation.

The public functions have the names and signatures of :mod:`fastres.functional` and are
differentiable as often as PyTorch's own operators are. ``bn_relu_forward`` and ``bn_relu_backward``
spell out, in PyTorch, what the fused kernels compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .arguments import accumulation_dtype


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """``relu(input + residual)``."""
    return F.relu(input + residual)


def bn_relu(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(F.batch_norm(input, ...))``."""
    return F.relu(
        F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    )


def bn_add_relu(
    input: Tensor, residual: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(F.batch_norm(input, ...) + residual)``."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.relu(output + residual)


def conv_bn(
    input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride=1, padding=0, dilation=1, groups: int = 1,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    bn_weight: Tensor | None = None, bn_bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``F.batch_norm(F.conv2d(input, ...), ...)``."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.batch_norm(
        output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps
    )


def conv_bn_relu(input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """``relu(conv_bn(input, ...))``; arguments as :func:`conv_bn`."""
    return F.relu(conv_bn(input, weight, *args, **kwargs))


def conv_bn_add_relu(input: Tensor, residual: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """``relu(conv_bn(input, ...) + residual)``; arguments as :func:`conv_bn`."""
    return F.relu(conv_bn(input, weight, *args, **kwargs) + residual)


def conv_bn_relu_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int,
    running_mean: Tensor, running_var: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    eps: float, pool_kernel, pool_stride, pool_padding,
) -> Tensor:  # fmt: skip
    """``F.max_pool2d(conv_bn_relu(input, ...), pool_kernel, ...)`` in eval."""
    output = conv_bn_relu(
        input, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, eps=eps,
    )  # fmt: skip
    return F.max_pool2d(output, pool_kernel, pool_stride, pool_padding)


def mean_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(input.mean((2, 3)), weight, bias)``."""
    return F.linear(input.mean((2, 3)), weight, bias)


def bn_relu_forward(
    input: Tensor, residual: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``fastres::bn_relu``: ``act(xhat * weight + bias + residual)`` with
    ``xhat = (input - mean) * invstd``, and the ``mean`` and ``invstd`` that were used.

    Ioffe & Szegedy 2015, algorithms 1 and 2; running statistics as ``torch.nn.BatchNorm2d``
    (the variance's running estimate is the unbiased one).
    """
    if training:
        mean, invstd = bn_relu_moments(input, running_mean, running_var, momentum, eps)
    else:
        dtype = accumulation_dtype(input.dtype)
        mean = running_mean.to(dtype, copy=True)
        invstd = (running_var.to(dtype) + eps).rsqrt()
    return bn_relu_apply(input, residual, mean, invstd, weight, bias, relu), mean, invstd


def bn_relu_moments(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator ``fastres::bn_relu_moments``: ``mean`` and ``invstd = (var + eps) ** -0.5`` over
    N, H and W; updates the running statistics."""
    x = _widen(input)
    # not var_mean: its running mean turns an Inf into NaN
    variance, mean = torch.var(x, (0, 2, 3), correction=0), x.mean((0, 2, 3))
    count = input.numel() // input.shape[1]
    for running, value in (
        (running_mean, mean),
        (running_var, variance * (count / (count - 1) if count > 1 else float("nan"))),
    ):
        if running is not None:
            running.lerp_(value.to(running.dtype), momentum)
    return mean, (variance + eps).rsqrt()


def bn_relu_apply(
    input: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    """The operator ``fastres::bn_relu_apply``: ``act(xhat * weight + bias + residual)``."""
    x = _widen(input)
    output = _normalise(x, mean, invstd, weight, bias)
    if residual is not None:
        output = output + residual.to(x.dtype)
    return _cast(F.relu(output) if relu else output, input)


def bn_relu_backward(
    grad_output: Tensor, input: Tensor, output: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, save_mean: Tensor, save_invstd: Tensor,
    training: bool, relu: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``fastres::bn_relu_backward``. With ``g = grad_output * [output > 0]``, sums
    over N, H, W of m values a channel::

        grad_bias     = sum(g)            grad_residual = g
        grad_weight   = sum(g * xhat)
        grad_input    = weight * invstd * (g - grad_bias / m - xhat * grad_weight / m)

    In eval (``training=False``) the statistics are constants: ``grad_input = weight * invstd * g``.
    Gradients that ``output_mask`` (input, residual, parameters) does not ask for are empty tensors.
    """
    want_input, want_residual, want_parameters = output_mask
    x = input.to(save_mean.dtype)
    grad = grad_output.to(save_mean.dtype)
    if relu:
        if output is None:
            output = _cast(_normalise(x, save_mean, save_invstd, weight, bias), input)
        grad = torch.where(output <= 0, 0, grad)
    xhat = (x - _per_channel(save_mean)) * _per_channel(save_invstd)
    grad_bias, grad_weight = grad.sum((0, 2, 3)), (grad * xhat).sum((0, 2, 3))
    grad_input = grad
    if training:
        count = input.numel() // input.shape[1]
        grad_input = (
            grad - _per_channel(grad_bias / count) - xhat * _per_channel(grad_weight / count)
        )
    scale = save_invstd if weight is None else save_invstd * weight
    nothing = save_mean.new_empty(0)
    return (
        _cast(grad_input * _per_channel(scale), input) if want_input else input.new_empty(0),
        _cast(grad, input) if want_residual else input.new_empty(0),
        grad_weight if want_parameters else nothing,
        grad_bias if want_parameters else nothing.clone(),
    )


def conv_gradients(grad_output, input, weight, stride, padding, dilation, groups, mask):
    """PyTorch's own gradients of input, weight and bias, those that ``mask`` asks for;
    differentiable."""
    bias_size = [weight.shape[0]] if mask[2] else None
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, bias_size, stride, padding, dilation, False, [0, 0], groups,
        mask,
    )  # fmt: skip


def batch_statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``mean`` and ``invstd = (var + eps) ** -0.5`` over N, H and W, differentiable."""
    variance, mean = torch.var_mean(_widen(input), (0, 2, 3), correction=0)
    return mean, (variance + eps).rsqrt()


def _widen(input: Tensor) -> Tensor:
    return input if input.dtype == torch.float64 else input.float()


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _normalise(x, mean, invstd, weight, bias) -> Tensor:
    y = (x - _per_channel(mean)) * _per_channel(invstd)
    if weight is not None:
        y = y * _per_channel(weight)
    if bias is not None:
        y = y + _per_channel(bias)
    return y


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype and memory format of ``like``."""
    return value.to(like.dtype).contiguous(memory_format=suggest_memory_format(like))
