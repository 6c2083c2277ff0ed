"""The custom autograd functions of the fused operators.

They only save and route tensors; the maths is in the operators of :mod:`fastres.ops`, backward in
those of the backend that served forward. A gradient that nobody needs is neither computed nor kept
alive for. When a graph of the backward is asked for (``create_graph=True``), the backward is
spelled in PyTorch's own differentiable operators.

``csrc/autograd.cpp`` does the same for CPU tensors, in less time. Here is what serves other
devices and compilers, which cannot look into an extension.
"""

import torch
from torch import Tensor

from . import ops, reference


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors must be recorded by autograd."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class AddReLU(torch.autograd.Function):
    """``relu(input + residual)``; both gradients are ``grad * [output > 0]``."""

    @staticmethod
    def forward(ctx, input, residual, backend):
        output = ops.OPERATORS[backend].add_relu(input, residual)
        ctx.save_for_backward(output)
        ctx.backend = backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = torch.where(output <= 0, 0, grad_output)
        else:
            grad = ops.OPERATORS[ctx.backend].add_relu_backward(grad_output, output)
        return tuple(grad if needed else None for needed in ctx.needs_input_grad)


class BNReLU(torch.autograd.Function):
    """``act(batch_norm(input) + residual)``, see ``fastres::bn_relu``.

    Saved are the input, the per-channel vectors and, only with a residual, the output: without one
    the ReLU's mask is recomputed from the input, which the backward reads anyway.
    """

    @staticmethod
    def forward(
        ctx, input, residual, running_mean, running_var, weight, bias,
        training, momentum, eps, relu, backend,
    ):  # fmt: skip
        output, mean, invstd = ops.OPERATORS[backend].bn_relu(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
        masked = output if relu and residual is not None else None
        ctx.save_for_backward(input, masked, weight, bias, mean, invstd)
        ctx.training, ctx.eps, ctx.relu, ctx.backend = training, eps, relu, backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, output, weight, bias, mean, invstd = ctx.saved_tensors
        need_input, need_residual, _, _, need_weight, need_bias = ctx.needs_input_grad[:6]
        mask = [need_input, need_residual, need_weight or need_bias]
        operands = (grad_output, input, output, weight, bias, mean, invstd, ctx.training)
        if torch.is_grad_enabled():
            gradients = bn_relu_gradients(*operands, ctx.eps, ctx.relu, mask)
        else:
            gradients = ops.OPERATORS[ctx.backend].bn_relu_backward(*operands, ctx.relu, mask)
        grad_input, grad_residual, grad_weight, grad_bias = gradients
        return (
            grad_input if need_input else None,
            grad_residual if need_residual else None,
            None,
            None,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            *(None,) * 5,
        )


def bn_relu_gradients(
    grad_output, input, output, weight, bias, mean, invstd, training, eps, relu, mask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastres::bn_relu_backward``, differentiable: the batch's statistics are made of the input
    again."""
    if training:
        mean, invstd = reference.batch_statistics(input, eps)
    return reference.bn_relu_backward(
        grad_output, input, output, weight, bias, mean, invstd, training, relu, mask
    )


def bn_relu_output(input, weight, bias, mean, invstd, training, eps) -> Tensor:
    """The output of a ``bn_relu`` without residual once more, differentiable."""
    if training:
        mean, invstd = reference.batch_statistics(input, eps)
    return reference.bn_relu_apply(input, None, mean, invstd, weight, bias, True)


class ConvBNReLUTraining(torch.autograd.Function):
    """``act(batch_norm(conv2d(input, weight, bias)) + residual)`` with the batch's statistics, see
    ``fastres::conv_bn_relu_training``: :class:`BNReLU` behind :class:`Conv`, and as much is saved.
    """

    @staticmethod
    def forward(
        ctx, input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
        geometry, momentum, eps, relu, backend,
    ):  # fmt: skip
        output, convolved, mean, invstd = ops.OPERATORS[backend].conv_bn_relu_training(
            input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
            *geometry, momentum, eps, relu,
        )  # fmt: skip
        masked = output if relu and residual is not None else None
        ctx.save_for_backward(
            input, weight, bias, convolved, masked, bn_weight, bn_bias, mean, invstd
        )
        ctx.geometry, ctx.eps, ctx.relu, ctx.backend = geometry, eps, relu, backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, convolved, masked, bn_weight, bn_bias, mean, invstd = ctx.saved_tensors
        need_input, need_weight, need_bias, need_residual, _, _, need_scale, need_shift = (
            ctx.needs_input_grad[:8]
        )
        need_convolved = need_input or need_weight or need_bias
        operators = ops.OPERATORS[ctx.backend]
        mask = [need_convolved, need_residual, need_scale or need_shift]
        if torch.is_grad_enabled():
            convolved = torch.nn.functional.conv2d(input, weight, bias, *ctx.geometry)
        operands = (grad_output, convolved, masked, bn_weight, bn_bias, mean, invstd, True)
        if torch.is_grad_enabled():
            gradients = bn_relu_gradients(*operands, ctx.eps, ctx.relu, mask)
        else:
            gradients = operators.bn_relu_backward(*operands, ctx.relu, mask)
        grad, grad_residual, grad_scale, grad_shift = gradients
        return (
            *conv_backward(
                operators, grad, input, weight, ctx.geometry, [need_input, need_weight, need_bias]
            ),
            grad_residual if need_residual else None,
            None,
            None,
            grad_scale.to(bn_weight.dtype) if need_scale else None,
            grad_shift.to(bn_bias.dtype) if need_shift else None,
            *(None,) * 5,
        )


class Conv(torch.autograd.Function):
    """``F.conv2d``."""

    @staticmethod
    def forward(ctx, input, weight, bias, geometry, backend):
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.backend = geometry, backend
        return ops.OPERATORS[backend].conv(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        operators = ops.OPERATORS[ctx.backend]
        needed = list(ctx.needs_input_grad[:3])
        gradients = conv_backward(operators, grad_output, input, weight, ctx.geometry, needed)
        return *gradients, None, None


def conv_backward(operators, grad_output, input, weight, geometry, needed: list[bool]):
    """The gradients of input, weight and bias that are needed; None for the others."""
    operands = (grad_output, input, weight, *geometry)
    if torch.is_grad_enabled():
        return reference.conv_gradients(*operands, needed)
    need_input, need_weight, need_bias = needed
    grad_input = operators.conv_dgrad(*operands) if need_input else None
    grad_weight = grad_bias = None
    if need_weight or need_bias:
        grad_weight, grad_bias = operators.conv_wgrad(*operands, [need_weight, need_bias])
    return (
        grad_input,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
    )


def conv_bn_relu_training(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    geometry, momentum, eps, relu, backend,
) -> Tensor:  # fmt: skip
    operands = (
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    )  # fmt: skip
    if needs_graph(input, weight, bias, residual, bn_weight, bn_bias):
        return ConvBNReLUTraining.apply(*operands, geometry, momentum, eps, relu, backend)
    operator = ops.OPERATORS[backend].conv_bn_relu_training
    return operator(*operands, *geometry, momentum, eps, relu)[0]


def conv(input, weight, bias, geometry, backend) -> Tensor:
    if needs_graph(input, weight, bias):
        return Conv.apply(input, weight, bias, geometry, backend)
    return ops.OPERATORS[backend].conv(input, weight, bias, *geometry)


def add_relu(input: Tensor, residual: Tensor, backend: str) -> Tensor:
    if needs_graph(input, residual):
        return AddReLU.apply(input, residual, backend)
    return ops.OPERATORS[backend].add_relu(input, residual)


def bn_relu(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu, backend
) -> Tensor:
    if not training and torch.compiler.is_compiling():
        # the schema allows the operator to write them: copies keep the traced graph free of
        # buffer mutations that eval does not have
        running_mean, running_var = running_mean.clone(), running_var.clone()
    arguments = (
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu,
    )  # fmt: skip
    if needs_graph(input, residual, weight, bias):
        return BNReLU.apply(*arguments, backend)
    return ops.OPERATORS[backend].bn_relu(*arguments)[0]
