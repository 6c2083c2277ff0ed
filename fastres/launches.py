"""Triton's operators, by name: checks, then the launchers of :mod:`fastres.kernels`.

And how a graph sees them: their fakes, and the launches that a compiled graph has in their place.
"""

import functools
import importlib.util
import os
import pkgutil

import torch
from torch import Tensor
from torch._library.triton import triton_ops_to_kernels

from . import checks, fakes, fallbacks
from .arguments import conv_output_size

# operator -> the module of fastres.kernels that has its launcher
MODULES = {
    "add_relu": "add_relu",
    "add_relu_backward": "add_relu",
    "bn_relu": "bn_relu",
    "bn_relu_backward": "bn_relu",
    "conv_bn_relu": "conv_bn_relu",
    "conv": "conv",
    "conv_dgrad": "conv",
    "conv_wgrad": "conv",
    "conv_bn_relu_training": "conv_bn_relu",
    "bn_relu_moments": "bn_relu",
    "bn_relu_apply": "bn_relu",
    "bn_relu_conv": "bn_relu_conv",
    "bn_relu_conv_backward": "bn_relu_conv",
}

FOUND = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs kernels in Python, on CPU tensors too. Triton itself reads the same
# variable, but importing it takes long.
INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1", "true", "on", "yes", "y",
)  # fmt: skip


@functools.cache
def launcher(name: str):
    """The operator's, from ``fastres.kernels``, on first use: Triton takes long to import."""
    module = importlib.import_module(f".kernels.{MODULES[name]}", __package__)
    return getattr(module, name)


def _launch(name: str, input: Tensor, *args):
    if input.device.type != "cuda" and not INTERPRETS:
        raise RuntimeError(f"input: Triton's kernels expect a CUDA tensor, got {input.device}")
    with torch.cuda.device_of(input):
        return launcher(name)(input, *args)


def add_relu(input, residual):
    checks.add_relu(input, residual)
    return _launch("add_relu", input, residual)


def add_relu_backward(grad_output, output):
    _check_gradient(grad_output, output)
    return _launch("add_relu_backward", grad_output, output)


def bn_relu(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
):
    if not input.numel():  # statistics of nothing
        return fallbacks.bn_relu(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
    checks.bn_relu(input, residual, running_mean, running_var, weight, bias, training, eps)
    return _launch(
        "bn_relu", input, residual, running_mean, running_var, weight, bias, training, momentum,
        eps, relu,
    )  # fmt: skip


def bn_relu_backward(grad_output, input, output, *args):
    if not input.numel():
        return fallbacks.bn_relu_backward(grad_output, input, output, *args)
    _check_gradient(grad_output, input)
    if output is not None:
        _check_gradient(output, input, "output")
    return _launch("bn_relu_backward", grad_output, input, output, *args)


def bn_relu_moments(input, running_mean, running_var, momentum, eps):
    if not input.numel():
        return fallbacks.bn_relu_moments(input, running_mean, running_var, momentum, eps)
    checks.bn_relu(input, None, running_mean, running_var, None, None, True, eps)
    return _launch("bn_relu_moments", input, running_mean, running_var, momentum, eps)


def bn_relu_apply(input, *args):
    if not input.numel():
        return fallbacks.bn_relu_apply(input, *args)
    *operands, _ = args
    checks.bn_relu_apply(input, *operands)
    return _launch("bn_relu_apply", input, *args)


def bn_relu_conv(input, mean, invstd, bn_weight, bn_bias, weight, bias, *args):
    operands = (mean, invstd, bn_weight, bn_bias, weight, bias, *args)
    if not input.numel():
        return fallbacks.bn_relu_conv(input, *operands)
    if mean is not None:
        checks.bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias)
    running_mean, running_var, *window, _, eps, statistics = args
    if statistics:
        bn = (running_mean, running_var, None, None)
        checks.conv_bn_relu(input, weight, bias, None, *bn, *window, True, eps)
    else:
        checks.conv(input, weight, bias, *window)
    return _launch("bn_relu_conv", input, *operands)


def bn_relu_conv_backward(
    grad_output, input, mean, invstd, bn_weight, bn_bias, weight, *args
):  # fmt: skip
    operands = (grad_output, input, mean, invstd, bn_weight, bn_bias, weight, *args)
    if not input.numel():
        return fallbacks.bn_relu_conv_backward(*operands)
    *window, _ = args
    checks.bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("bn_relu_conv_backward", *operands)


def conv(input, weight, bias, stride, padding, dilation, groups):
    window = (stride, padding, dilation, groups)
    if not input.numel():
        return fallbacks.conv(input, weight, bias, *window)
    checks.conv(input, weight, bias, *window)
    return _launch("conv", input, weight, bias, *window)


def conv_dgrad(grad_output, input, weight, *window):
    if not input.numel():
        return fallbacks.conv_dgrad(grad_output, input, weight, *window)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("conv_dgrad", grad_output, input, weight, *window)


def conv_wgrad(
    grad_output, input, weight, stride, padding, dilation, groups, output_mask
):  # fmt: skip
    window = (stride, padding, dilation, groups)
    if not input.numel():
        return fallbacks.conv_wgrad(grad_output, input, weight, *window, output_mask)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("conv_wgrad", grad_output, input, weight, *window, output_mask)


def conv_bn_relu(input, *args):
    *operands, eps, _ = args
    if not input.numel():
        return fallbacks.conv_bn_relu(input, *args)
    checks.conv_bn_relu(input, *operands, False, eps)
    return _launch("conv_bn_relu", input, *args)


def conv_bn_relu_training(input, *args):
    *operands, _, eps, _ = args
    if not input.numel():
        return fallbacks.conv_bn_relu_training(input, *args)
    checks.conv_bn_relu(input, *operands, True, eps)
    return _launch("conv_bn_relu_training", input, *args)


def _check_convolved(grad_output, input, weight, stride, padding, dilation, groups) -> None:
    checks.conv(input, weight, None, stride, padding, dilation, groups)
    size = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    _check_gradient(grad_output, input.new_empty(()).expand(size))


def _check_gradient(gradient: Tensor, like: Tensor, name: str = "grad_output") -> None:
    """A kernel would read past the end of a smaller one."""
    if gradient.shape != like.shape or gradient.dtype != like.dtype:
        raise RuntimeError(
            f"{name}: expected {like.dtype} of shape {tuple(like.shape)}, got {gradient.dtype} of "
            f"shape {tuple(gradient.shape)}"
        )
    fakes.check_device(like, gradient)


def visible(name: str):
    """The rule by which a compiled graph gets the kernels' launches in place of the operator, so
    that Inductor plans their memory and calls them without Python. An exported graph keeps it."""

    def rule(mode, operator, types, args, kwargs):
        if torch.compiler.is_exporting() or INTERPRETS:
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode:
            return launcher(name)(*args, **kwargs, wrap=torch.library.wrap_triton)

    return rule


def fake(name: str):
    """The operator's fake. It runs before a compiled graph is looked up in AOTAutograd's cache on
    disk, whose key has the source of the kernels that an operator is known to launch: without it,
    another version's kernels would be found there."""
    without_kernels = getattr(fakes, name)

    def with_kernels(*args):
        if FOUND and not INTERPRETS:
            triton_ops_to_kernels.setdefault(f"fastres::triton_{name}", _kernels())
        return without_kernels(*args)

    return with_kernels


def _kernels() -> list:
    """Every kernel there is, whichever an operator comes to launch."""
    triton, package = (
        importlib.import_module(name) for name in ("triton", f"{__package__}.kernels")
    )
    found = {}
    for module in sorted(each.name for each in pkgutil.iter_modules(package.__path__)):
        for value in vars(importlib.import_module(f"{package.__name__}.{module}")).values():
            if isinstance(value, triton.JITFunction):
                found[id(value)] = value
    return list(found.values())
