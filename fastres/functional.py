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

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, choice, ops, reference
from .arguments import compute_dtype, pair, resolve_padding
from .backend import extension_serves, serving

# What a call raises that refuses its arguments, before it has changed anything. A checkpoint that
# recomputes stops it with others, after batch norm has counted the batch.
REFUSED = (TypeError, ValueError, RuntimeError)
CPU_CONV_DTYPES = (torch.float32, torch.bfloat16)  # in others the CPU's convolutions are PyTorch's


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """``relu(input + residual)``: the end of every residual block (He et al. 2015, section 3.1)."""
    if extension_serves("add_relu"):
        output = ops.extension.add_relu(input, residual)
        if output is not None:
            return output
    return _serve(
        "add_relu",
        input,
        lambda backend: autograd.add_relu(input, residual, backend),
        lambda: checks.add_relu(input, residual),
        lambda: reference.add_relu(input, residual),
    )


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
    checks.tensor("residual", residual)
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
    checks.tensor("residual", residual)
    return _conv_bn(
        input, residual, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, True,
    )  # fmt: skip


def conv_bn_relu_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int,
    running_mean: Tensor, running_var: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    eps: float, pool_kernel, pool_stride, pool_padding,
) -> Tensor:  # fmt: skip
    """``max_pool2d(conv_bn_relu(input, ...), pool_kernel, pool_stride, pool_padding)`` in eval.

    The stem of a ResNet (He et al. 2015, table 1). The convolution's output, the network's largest
    map, is pooled band by band of its rows, while they are in the cache.
    """

    def in_steps() -> Tensor:
        output = conv_bn_relu(
            input, weight, bias, stride, padding, dilation, groups,
            running_mean, running_var, bn_weight, bn_bias, eps=eps,
        )  # fmt: skip
        return F.max_pool2d(output, pool_kernel, pool_stride, pool_padding)

    def served(backend: str) -> Tensor:
        graph = (input, weight, bias, bn_weight, bn_bias)
        if autograd.needs_graph(*graph) or torch.is_autocast_enabled("cpu"):
            return in_steps()
        if any(t is not None and t.dtype != input.dtype for t in (weight, bias)):
            check()  # the operator allows more than eager does
        return ops.OPERATORS[backend].conv_bn_relu_pool(
            input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
            stride, resolve_padding(padding, weight, stride, dilation), dilation, groups, eps,
            pool_kernel, pool_stride, pool_padding,
        )  # fmt: skip

    def check() -> None:
        checks.conv_bn_relu(
            input, weight, bias, None, running_mean, running_var, bn_weight, bn_bias,
            stride, padding, dilation, groups, False, eps,
        )  # fmt: skip

    return _serve("conv_bn_relu_pool", input, served, check, in_steps)


def mean_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(mean(input over H and W), weight, bias)``: a classifier's global average pooling and
    its last layer (Lin et al. 2014, section 3.2); ``weight`` (K, C), ``bias`` (K,), output (N, K).
    """

    def eager() -> Tensor:
        return reference.mean_linear(input, weight, bias)

    def served(backend: str) -> Tensor:
        operator = ops.OPERATORS[backend].mean_linear
        if autograd.needs_graph(input, weight, bias) or torch.is_autocast_enabled("cpu"):
            return eager()
        return operator(input, weight, bias)

    def check() -> None:
        checks.mean_linear(input, weight, bias)

    return _serve("mean_linear", input, served, check, eager)


def batch_norm(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
) -> Tensor:
    """``act(batch_norm(input) + residual)``: what :func:`bn_relu`, :func:`bn_add_relu` and the
    training form of the convolutions share. ``residual`` may be None, ``relu`` False."""

    arguments = (
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu,
    )  # fmt: skip
    if extension_serves("bn_relu"):
        output = ops.extension.bn_relu(*arguments)
        if output is not None:
            return output
    return _serve(
        "bn_relu",
        input,
        lambda backend: autograd.bn_relu(*arguments, backend),
        lambda: checks.bn_relu(
            input, residual, running_mean, running_var, weight, bias, training, eps
        ),
        lambda: _eager_batch_norm(*arguments),
    )


def _eager_batch_norm(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _add_act(output, residual, relu)


def _conv_bn(
    input, residual, weight, bias, stride, padding, dilation, groups,
    running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu,
) -> Tensor:  # fmt: skip
    if extension_serves("conv_bn_relu"):
        output = ops.extension.conv_bn_relu(
            input, residual, weight, bias, stride, padding, dilation, groups,
            running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu,
        )  # fmt: skip
        if output is not None:
            return output

    def check() -> None:
        checks.conv_bn_relu(
            input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
            stride, padding, dilation, groups, training, eps,
        )  # fmt: skip

    bn = (residual, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu)
    graph = (input, residual, weight, bias, bn_weight, bn_bias)

    def two_steps(backend: str = "eager") -> Tensor:
        output = _conv(backend, input, weight, bias, stride, padding, dilation, groups)
        return batch_norm(output, *bn)

    def served(backend: str) -> Tensor:
        operators = ops.OPERATORS[backend]
        operator = operators.conv_bn_relu_training if training else operators.conv_bn_relu
        if operator is None or (not training and autograd.needs_graph(*graph)):
            check()
            return two_steps(backend)
        dtype = compute_dtype(input)
        alike = input.dtype == weight.dtype == dtype and (bias is None or bias.dtype == dtype)
        if not alike:  # autocast, or a mistake: the operator allows more than eager does
            check()
        if training:
            return autograd.conv_bn_relu_training(
                *_conv_operands(input, weight, bias), residual, running_mean, running_var,
                bn_weight, bn_bias, geometry_of(weight, stride, padding, dilation, groups), momentum,
                eps, relu, backend,
            )  # fmt: skip
        return operator(
            input.to(dtype), weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
            stride, resolve_padding(padding, weight, stride, dilation), dilation, groups, eps, relu,
        )  # fmt: skip

    return _serve(
        "conv_bn_relu", input, served, check, two_steps,
        lambda: choice.Convolution.of(input, weight, stride, dilation, groups, training),
    )  # fmt: skip


def _conv(
    backend: str, input: Tensor, weight: Tensor, bias, stride, padding, dilation, groups
) -> Tensor:
    """``F.conv2d``, by the backend's own operator if it has one. A compiler is better off with the
    convolution that it knows."""
    own = backend != "eager" and ops.OPERATORS[backend].conv is not None
    if backend == "cpu" and compute_dtype(input) not in CPU_CONV_DTYPES:
        own = False
    if not own or torch.compiler.is_compiling():
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = geometry_of(weight, stride, padding, dilation, groups)
    return autograd.conv(*_conv_operands(input, weight, bias), geometry, backend)


def geometry_of(weight: Tensor, stride, padding, dilation, groups: int) -> tuple:
    """As the operators take it."""
    return (
        pair("stride", stride), resolve_padding(padding, weight, stride, dilation),
        pair("dilation", dilation), groups,
    )  # fmt: skip


def _conv_operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """In the dtype that they are computed in: autocast's, where it is on."""
    dtype = compute_dtype(input)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _serve(operator: str, input: Tensor, served, check, eager, convolution=None) -> Tensor:
    """``served(backend)`` where a backend has the operator, else ``eager()``; ``convolution()``
    tells which one is asked for.

    Compiled operators check their arguments themselves. Only when one refuses, ``check`` looks for
    the mistake again, to report it in the caller's words: that takes longer than a small map does.
    """
    try:
        backend = serving(operator, input.device, convolution)
        if backend != "eager" and input.numel():
            return served(backend)
    except Exception as error:  # noqa: BLE001 - raised again below, if nothing says it better
        refusal = error
    else:
        check()
        return eager()
    check()
    raise refusal


def _add_act(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output
