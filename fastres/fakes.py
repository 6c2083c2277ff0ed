"""Fakes of the operators, by name: shapes, dtypes and strides without data."""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .arguments import accumulation_dtype, conv_output_size


def check_device(input: Tensor, *others: Tensor | None) -> None:
    """One tensor on "meta" brings a call here, whatever device the others are on."""
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"expected every tensor on {input.device}, got one on {other.device}"
            )


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    check_device(input, residual)
    return _like(input)


def add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    return _like(output)


def bn_relu(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
):
    check_device(input, residual, running_mean, running_var, weight, bias)
    statistics = input.new_empty(input.shape[1], dtype=accumulation_dtype(input.dtype))
    return _like(input), statistics, torch.empty_like(statistics)


def bn_relu_backward(
    grad_output, input, output, weight, bias, save_mean, save_invstd, training, relu, output_mask
):
    def wanted(which: bool, like: Tensor) -> Tensor:
        return _like(like) if which else like.new_empty(0)

    want_input, want_residual, want_parameters = output_mask
    return (
        wanted(want_input, input),
        wanted(want_residual, input),
        wanted(want_parameters, save_mean),
        wanted(want_parameters, save_mean),
    )


def conv_bn_relu(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, relu,
):  # fmt: skip
    check_device(input, residual, running_mean, running_var, bn_weight, bn_bias)
    return conv(input, weight, bias, stride, padding, dilation, groups)


def conv_bn_relu_(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, relu,
):  # fmt: skip
    pass


def conv_bn_relu_training(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, momentum, eps, relu,
):  # fmt: skip
    convolved = conv_bn_relu(
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, eps, relu,
    )  # fmt: skip
    statistics = input.new_empty(weight.shape[0], dtype=accumulation_dtype(input.dtype))
    return torch.empty_like(convolved), convolved, statistics, torch.empty_like(statistics)


def conv_dgrad(grad_output, input, weight, stride, padding, dilation, groups):
    check_device(input, grad_output, weight)
    return _like(input)


def conv_wgrad(grad_output, input, weight, stride, padding, dilation, groups, output_mask):
    check_device(input, grad_output, weight)
    want_weight, want_bias = output_mask
    return (
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def bn_relu_moments(input, running_mean, running_var, momentum, eps):
    check_device(input, running_mean, running_var)
    statistics = input.new_empty(input.shape[1], dtype=accumulation_dtype(input.dtype))
    return statistics, torch.empty_like(statistics)


def bn_relu_apply(input, residual, mean, invstd, weight, bias, relu):
    check_device(input, residual, mean, invstd, weight, bias)
    return _like(input)


def bn_relu_conv(
    input, mean, invstd, bn_weight, bn_bias, weight, bias, running_mean, running_var,
    stride, padding, dilation, groups, momentum, eps, statistics,
):  # fmt: skip
    check_device(input, mean, invstd, bn_weight, bn_bias, running_mean, running_var)
    output = conv(input, weight, bias, stride, padding, dilation, groups)
    channels = weight.shape[0] if statistics else 0
    vector = input.new_empty(channels, dtype=accumulation_dtype(input.dtype))
    return output, vector, torch.empty_like(vector)


def bn_relu_conv_backward(
    grad_output, input, mean, invstd, bn_weight, bn_bias, weight,
    stride, padding, dilation, groups, output_mask,
):  # fmt: skip
    want_input, want_bn, want_weight, want_bias = output_mask
    grad_input, _, *vectors = bn_relu_backward(
        grad_output, input, None, bn_weight, bn_bias, mean, invstd, True, True,
        [want_input, False, want_bn],
    )  # fmt: skip
    window = (stride, padding, dilation, groups)
    gradients = conv_wgrad(grad_output, input, weight, *window, [want_weight, want_bias])
    return grad_input, *vectors, *gradients


def conv_bn_relu_pool(
    input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, pool_kernel, pool_stride, pool_padding,
):  # fmt: skip
    convolved = conv_bn_relu(
        input, weight, bias, None, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, eps, True,
    )  # fmt: skip
    return torch.nn.functional.max_pool2d(convolved, pool_kernel, pool_stride, pool_padding)


def mean_linear(input, weight, bias):
    check_device(input, weight, bias)
    return input.new_empty((input.shape[0], weight.shape[0]))


def conv(input, weight, bias, stride, padding, dilation, groups):
    check_device(input, weight, bias)
    size = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    formats = (suggest_memory_format(input), suggest_memory_format(weight))
    channels_last = torch.channels_last in formats
    return input.new_empty(size).to(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
