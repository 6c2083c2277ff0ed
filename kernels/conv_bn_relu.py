"""Convolution, batch norm, optional residual, optional ReLU, in eval and in training.

``wrap`` is applied to every kernel: ``torch.library.wrap_triton`` makes the launch visible to a
graph that is being traced.
"""

import torch
from torch import Tensor

from .bn_relu import bn_relu, finish_moments, normalise
from .conv import allows_tf32, serves_forward
from .conv_fprop import fprop
from .conv_operands import Norm


def conv_bn_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor, running_var: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    stride, padding, dilation, groups: int, eps: float, relu: bool, wrap=lambda kernel: kernel,
) -> Tensor:  # fmt: skip
    """``act(batch_norm(conv2d(input, weight, bias)) + residual)`` with the running statistics, all
    of it in the convolution's epilogue where Triton's kernel serves."""
    window = (stride, padding, dilation, groups)
    weight = weight.to(input.dtype)  # under autocast
    bias = None if bias is None else bias.to(input.dtype)
    what = "eval, one image" if input.shape[0] == 1 else "eval"
    if not serves_forward(what, input, weight, *window):
        convolved = torch.nn.functional.conv2d(input, weight, bias, *window)
        return bn_relu(
            convolved, residual, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps,
            relu, wrap,
        )[0]  # fmt: skip
    return fprop(
        input, weight, *window, bias=bias, residual=residual, relu=relu,
        norm=Norm(running_mean, running_var, bn_weight, bn_bias, eps),
        allow_tf32=allows_tf32(input), wrap=wrap,
    )[0]  # fmt: skip


def conv_bn_relu_training(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None,
    stride, padding, dilation, groups: int, momentum: float, eps: float, relu: bool,
    wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``output, convolved, mean, invstd``: with the batch's statistics, which Triton's convolution
    takes from its fp32 sums; the running ones are updated."""
    window = (stride, padding, dilation, groups)
    if not serves_forward("training", input, weight, *window):
        convolved = torch.nn.functional.conv2d(input, weight, bias, *window)
        output, mean, invstd = bn_relu(
            convolved, residual, running_mean, running_var, bn_weight, bn_bias, True, momentum,
            eps, relu, wrap,
        )  # fmt: skip
        return output, convolved, mean, invstd
    convolved, moments = fprop(
        input, weight, *window, bias=bias, statistics=True, allow_tf32=allows_tf32(input), wrap=wrap
    )
    output = torch.empty_like(convolved)
    mean, invstd = finish_moments(moments, running_mean, running_var, momentum, eps, wrap)
    normalise(convolved, residual, output, mean, invstd, bn_weight, bn_bias, relu, wrap)
    return output, convolved, mean, invstd
