"""The fused operators, differentiable, in the manner of ``torch.nn.functional``.

Arguments come in the order and spelling of ``F.conv2d``, then of ``F.batch_norm`` (whose ``weight``
and ``bias`` are called ``bn_weight`` and ``bn_bias`` beside a convolution's); a ``residual`` stands
right behind ``input``. Shapes: ``input`` (N, C, H, W), ``weight`` (K, C / groups, R, S), every
batch-norm argument (C,) or (K,), ``residual`` as the output. Dtypes: float32, float64, bfloat16 and
float16; batch-norm arguments may stay float32 beside narrower activations, and statistics and
accumulation are float32 (float64 for float64) whatever the activations are.

Raised, before anything runs: ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong
number of dimensions and for a single value per channel in training, ``RuntimeError`` for shapes,
devices or geometry that do not fit and for missing running statistics in eval.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, ops, reference
from .backend import serving


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """``relu(input + residual)``: the end of every residual block (He et al. 2015, section 3.1)."""
    checks.activation(input)
    checks.residual(residual, input.shape, input.dtype, input.device)
    if serving("add_relu", input.device) == "eager" or not input.numel():
        return reference.add_relu(input, residual)
    return autograd.add_relu(input, residual)


def bn_relu(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu((input - mean) / sqrt(var + eps) * weight + bias)`` per channel.

    ``mean`` and (biased) ``var`` are those of this batch over N, H, W when ``training``, and the
    running statistics then become ``(1 - momentum) * running + momentum * batch`` (with the
    unbiased variance); else they are the running statistics. Ioffe & Szegedy 2015, algorithm 1.
    """
    return batch_norm(
        input, None, running_mean, running_var, weight, bias, training, momentum, eps, True
    )


def bn_add_relu(
    input: Tensor, residual: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(input) + residual)``, batch norm as in :func:`bn_relu`."""
    return batch_norm(
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, True
    )


def conv_bn(
    input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride=1, padding=0, dilation=1, groups: int = 1,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    bn_weight: Tensor | None = None, bn_bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``batch_norm(conv2d(input, weight, bias))``: the projection shortcut (no ReLU behind it).

    In eval, where autograd has nothing to record, batch norm is folded into the convolution's
    weights: ``w' = w * bn_weight / sqrt(running_var + eps)`` (Jacob et al. 2018, section 3.2).
    """
    return _conv_bn(
        input, None, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, False,
    )  # fmt: skip


def conv_bn_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride=1, padding=0, dilation=1, groups: int = 1,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    bn_weight: Tensor | None = None, bn_bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(conv2d(input, weight, bias)))``, folded as in :func:`conv_bn`."""
    return _conv_bn(
        input, None, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, True,
    )  # fmt: skip


def conv_bn_add_relu(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride=1, padding=0, dilation=1, groups: int = 1,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    bn_weight: Tensor | None = None, bn_bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(conv2d(input, weight, bias)) + residual)``, as :func:`conv_bn_relu`."""
    return _conv_bn(
        input, residual, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, True,
    )  # fmt: skip


def batch_norm(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
) -> Tensor:
    """``act(batch_norm(input) + residual)``: what :func:`bn_relu`, :func:`bn_add_relu` and the
    training form of the convolutions share. ``residual`` may be None, ``relu`` False."""
    checks.activation(input)
    checks.batch_norm(
        input.shape, input.dtype, input.device, running_mean, running_var, weight, bias, training,
        eps,
    )  # fmt: skip
    if residual is not None:
        checks.residual(residual, input.shape, input.dtype, input.device)
    if serving("bn_relu", input.device) == "eager" or not input.numel():
        output = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        return _add_act(output, residual, relu)
    return autograd.bn_relu(
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
    )


def _conv_bn(
    input, residual, weight, bias, stride, padding, dilation, groups,
    running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu,
) -> Tensor:  # fmt: skip
    checks.activation(input)
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    padding = resolve_padding(padding, weight, stride, dilation)
    checks.convolution(input, weight, bias, stride, padding, dilation, groups)
    size = ops.conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    checks.output_map(size, weight.shape[2:], padding)
    dtype = compute_dtype(input)
    checks.same_dtype("weight", compute_dtype(weight), dtype)
    if bias is not None:
        checks.same_dtype("bias", compute_dtype(bias), dtype)
    checks.batch_norm(
        size, dtype, input.device, running_mean, running_var, bn_weight, bn_bias, training,
        eps, names=("bn_weight", "bn_bias"),
    )  # fmt: skip
    if residual is not None:
        checks.residual(residual, size, dtype, input.device)

    folded = not (
        training
        or autograd.needs_graph(input, residual, weight, bias, bn_weight, bn_bias)
        or serving("conv_bn_relu", input.device) == "eager"
    )
    if folded and input.numel():
        if input.dtype != dtype:
            input = input.to(dtype)
        return ops.conv_bn_relu(
            input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
            stride, padding, dilation, groups, eps, relu,
        )  # fmt: skip
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm(
        output, residual, running_mean, running_var, bn_weight, bn_bias,
        training, momentum, eps, relu,
    )  # fmt: skip


def _add_act(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output


def pair(name: str, value) -> tuple[int, int]:
    """``value`` for both map dimensions, as F.conv2d takes it: an int, or a sequence of 1 or 2."""
    if isinstance(value, int):
        return (value, value)
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected an int or a pair of them, got {value!r}")
    if len(value) not in (1, 2):
        raise RuntimeError(f"{name}: expected an int or a pair of them, got {tuple(value)}")
    return tuple(value) * (3 - len(value))


def resolve_padding(padding, weight: Tensor, stride, dilation) -> tuple[int, int]:
    """``padding`` as a pair; F.conv2d's "valid" and "same" are understood.

    "same" needs stride 1 and, here, an odd dilated extent (else the padding is not symmetric).
    """
    if not isinstance(padding, str):
        return pair("padding", padding)
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        raise ValueError(f"padding: expected numbers, 'valid' or 'same', got {padding!r}")
    if tuple(stride) != (1, 1):
        raise RuntimeError(f"padding: 'same' expects stride 1, got {tuple(stride)}")
    extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(extent % 2 for extent in extents):
        raise ValueError(
            "padding: 'same' expects an odd kernel extent, got kernel "
            f"{tuple(weight.shape[2:])} with dilation {tuple(dilation)}"
        )
    return (extents[0] // 2, extents[1] // 2)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype a convolution of ``input`` runs in: autocast's where it is on (never for fp64)."""
    kind = input.device.type
    floating = input.is_floating_point() and input.dtype != torch.float64
    if floating and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return input.dtype
