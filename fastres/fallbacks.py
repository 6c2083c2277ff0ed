"""Fallbacks of the operators, by name: the eager maths of :mod:`fastres.reference` behind the checks.

They serve wherever no compiled kernel is registered for a tensor's device.
"""

import torch
from torch import Tensor

from . import checks, reference
from .arguments import accumulation_dtype


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    checks.add_relu(input, residual)
    return reference.add_relu(input, residual)


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad_output, output, 0)


def bn_relu(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
):
    checks.bn_relu(input, residual, running_mean, running_var, weight, bias, training, eps)
    return reference.bn_relu_forward(
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
    )


def bn_relu_backward(*args):
    return reference.bn_relu_backward(*args)


def bn_relu_moments(input, running_mean, running_var, momentum, eps):
    checks.bn_relu(input, None, running_mean, running_var, None, None, True, eps)
    return reference.bn_relu_moments(input, running_mean, running_var, momentum, eps)


def bn_relu_apply(input, residual, mean, invstd, weight, bias, relu):
    checks.bn_relu_apply(input, residual, mean, invstd, weight, bias)
    return reference.bn_relu_apply(input, residual, mean, invstd, weight, bias, relu)


def bn_relu_conv(
    input, mean, invstd, bn_weight, bn_bias, weight, bias, running_mean, running_var,
    stride, padding, dilation, groups, momentum, eps, statistics,
):  # fmt: skip
    checks.conv(input, weight, bias, stride, padding, dilation, groups)
    if mean is not None:
        input = bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias, True)
    output = conv(input, weight, bias, stride, padding, dilation, groups)
    if not statistics:
        nothing = output.new_empty(0, dtype=accumulation_dtype(output.dtype))
        return output, nothing, nothing.clone()
    return output, *bn_relu_moments(output, running_mean, running_var, momentum, eps)


def bn_relu_conv_backward(
    grad_output, input, mean, invstd, bn_weight, bn_bias, weight,
    stride, padding, dilation, groups, output_mask,
):  # fmt: skip
    want_input, want_bn, want_weight, want_bias = output_mask
    window = (stride, padding, dilation, groups)
    activation = bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias, True)
    gradients = conv_wgrad(grad_output, activation, weight, *window, [want_weight, want_bias])
    if not (want_input or want_bn):
        return input.new_empty(0), mean.new_empty(0), mean.new_empty(0), *gradients
    grad = conv_dgrad(grad_output, activation, weight, *window)
    grad_input, _, grad_bn_weight, grad_bn_bias = bn_relu_backward(
        grad, input, activation, bn_weight, bn_bias, mean, invstd, True, True,
        [want_input, False, want_bn],
    )  # fmt: skip
    return grad_input, grad_bn_weight, grad_bn_bias, *gradients


def conv(input, weight, bias, stride, padding, dilation, groups):
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_dgrad(grad_output, input, weight, stride, padding, dilation, groups):
    return reference.conv_gradients(
        grad_output, input, weight, stride, padding, dilation, groups, [True, False, False]
    )[0]


def conv_wgrad(grad_output, input, weight, stride, padding, dilation, groups, output_mask):
    _, grad_weight, grad_bias = reference.conv_gradients(
        grad_output, input, weight, stride, padding, dilation, groups, [False, *output_mask]
    )
    nothing = weight.new_empty(0)
    return (
        nothing if grad_weight is None else grad_weight,
        nothing.clone() if grad_bias is None else grad_bias,
    )


def conv_bn_relu(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, relu,
):  # fmt: skip
    checks.conv_bn_relu(
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, False, eps,
    )  # fmt: skip
    output = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return reference.bn_relu_forward(
        output, residual, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps, relu
    )[0]


def conv_bn_relu_(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, relu,
):  # fmt: skip
    residual.copy_(
        conv_bn_relu(
            input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
            stride, padding, dilation, groups, eps, relu,
        )
    )  # fmt: skip


def conv_bn_relu_training(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, momentum, eps, relu,
):  # fmt: skip
    checks.conv_bn_relu(
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, True, eps,
    )  # fmt: skip
    convolved = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output, mean, invstd = reference.bn_relu_forward(
        convolved, residual, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps,
        relu,
    )  # fmt: skip
    return output, convolved, mean, invstd


def conv_bn_relu_pool(
    input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, pool_kernel, pool_stride, pool_padding,
):  # fmt: skip
    output = conv_bn_relu(
        input, weight, bias, None, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, eps, True,
    )  # fmt: skip
    return torch.nn.functional.max_pool2d(output, pool_kernel, pool_stride, pool_padding)


def mean_linear(input, weight, bias):
    checks.mean_linear(input, weight, bias)
    return reference.mean_linear(input, weight, bias)
