"""Operator schemas and registration: the only place that names ``torch.ops.fastres``.

The schemas are defined here, in Python, so that the operators exist on every installation. The
compiled extension ``fastres._C`` implements them for the devices it was built for; anything else
is served by :mod:`fastres.fallbacks` (``CompositeExplicitAutograd``). The Triton kernels are
operators of their own, ``fastres::triton_<name>``, with the same schemas.
"""

import functools
import importlib.util
import os
import pkgutil
from typing import NamedTuple

import torch
from torch import Tensor
from torch._library.triton import triton_ops_to_kernels
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import checks, fakes, fallbacks
from .arguments import conv_output_size

try:
    extension = importlib.import_module("._C", __package__)
except ImportError as error:
    extension = None
    extension_error: ImportError | None = error
else:
    extension_error = None

_library = torch.library.Library("fastres", "DEF")
_BN_STATE = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias"
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"

_SCHEMAS = {
    "add_relu": "(Tensor input, Tensor residual) -> Tensor",
    "add_relu_backward": "(Tensor grad_output, Tensor output) -> Tensor",
    "bn_relu": f"(Tensor input, Tensor? residual, {_BN_STATE}, bool training, float momentum, "
    "float eps, bool relu) -> (Tensor output, Tensor save_mean, Tensor save_invstd)",
    "bn_relu_backward": "(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, "
    "Tensor? bias, Tensor save_mean, Tensor save_invstd, bool training, bool relu, "
    "bool[3] output_mask) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "bn_relu_moments": "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps) -> (Tensor mean, Tensor invstd)",
    "bn_relu_apply": "(Tensor input, Tensor? residual, Tensor mean, Tensor invstd, "
    "Tensor? weight, Tensor? bias, bool relu) -> Tensor",
    # conv2d(relu(batch_norm(input))), and the statistics of that; without a mean, conv2d(input)
    "bn_relu_conv": "(Tensor input, Tensor? mean, Tensor? invstd, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor weight, Tensor? bias, Tensor(a!)? running_mean, "
    f"Tensor(b!)? running_var, {_GEOMETRY}, float momentum, float eps, bool statistics) "
    "-> (Tensor output, Tensor save_mean, Tensor save_invstd)",
    # its gradients, mean and invstd being those of input, too
    "bn_relu_conv_backward": "(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, "
    f"Tensor? bn_weight, Tensor? bn_bias, Tensor weight, {_GEOMETRY}, bool[4] output_mask) "
    "-> (Tensor grad_input, Tensor grad_bn_weight, Tensor grad_bn_bias, Tensor grad_weight, "
    "Tensor grad_bias)",
    "conv": f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    "conv_dgrad": f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor",
    "conv_wgrad": f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, "
    "bool[2] output_mask) -> (Tensor grad_weight, Tensor grad_bias)",
    "conv_bn_relu": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, "
    f"{_GEOMETRY}, float eps, bool relu) -> Tensor",
    # the same, its output in the residual's place
    "conv_bn_relu_": "(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) residual, "
    "Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, "
    f"{_GEOMETRY}, float eps, bool relu) -> ()",
    "conv_bn_relu_training": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? bn_weight, Tensor? bn_bias, "
    f"{_GEOMETRY}, float momentum, float eps, bool relu) "
    "-> (Tensor output, Tensor convolved, Tensor save_mean, Tensor save_invstd)",
    "conv_bn_relu_pool": "(Tensor input, Tensor weight, Tensor? bias, Tensor running_mean, "
    f"Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, {_GEOMETRY}, float eps, "
    "int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) -> Tensor",
    "mean_linear": "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)

# the module of fastres.kernels that has its launcher
_TRITON = {
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
for _name in _TRITON:
    _library.define(f"triton_{_name}{_SCHEMAS[_name]}", tags=torch.Tag.pt2_compliant_tag)

add_relu = torch.ops.fastres.add_relu.default
add_relu_backward = torch.ops.fastres.add_relu_backward.default
bn_relu = torch.ops.fastres.bn_relu.default
bn_relu_backward = torch.ops.fastres.bn_relu_backward.default
bn_relu_moments = torch.ops.fastres.bn_relu_moments.default
bn_relu_apply = torch.ops.fastres.bn_relu_apply.default
bn_relu_conv = torch.ops.fastres.bn_relu_conv.default
bn_relu_conv_backward = torch.ops.fastres.bn_relu_conv_backward.default
conv = torch.ops.fastres.conv.default
conv_dgrad = torch.ops.fastres.conv_dgrad.default
conv_wgrad = torch.ops.fastres.conv_wgrad.default
conv_bn_relu = torch.ops.fastres.conv_bn_relu.default
conv_bn_relu_ = torch.ops.fastres.conv_bn_relu_.default
conv_bn_relu_training = torch.ops.fastres.conv_bn_relu_training.default
conv_bn_relu_pool = torch.ops.fastres.conv_bn_relu_pool.default
mean_linear = torch.ops.fastres.mean_linear.default


class Operators(NamedTuple):
    """The operators by which a backend serves; None where it has none."""

    add_relu: OpOverload
    add_relu_backward: OpOverload
    bn_relu: OpOverload
    bn_relu_backward: OpOverload
    conv_bn_relu: OpOverload | None = None
    conv: OpOverload | None = None
    conv_dgrad: OpOverload | None = None
    conv_wgrad: OpOverload | None = None
    conv_bn_relu_training: OpOverload | None = None
    conv_bn_relu_pool: OpOverload | None = None
    mean_linear: OpOverload | None = None
    # a chain of them in training, see fastres/chain.py
    bn_relu_moments: OpOverload | None = None
    bn_relu_apply: OpOverload | None = None
    bn_relu_conv: OpOverload | None = None
    bn_relu_conv_backward: OpOverload | None = None


_elementwise = (add_relu, add_relu_backward, bn_relu, bn_relu_backward)
_convolutions = (conv_bn_relu, conv, conv_dgrad, conv_wgrad)
_inference = (conv_bn_relu_pool, mean_linear)
_chain = (bn_relu_moments, bn_relu_apply, bn_relu_conv, bn_relu_conv_backward)
OPERATORS = {
    "cpu": Operators(*_elementwise, *_convolutions, None, *_inference),
    "cuda": Operators(*_elementwise, *_convolutions, conv_bn_relu_training, None, None, *_chain),
    "triton": Operators(
        **{_name: getattr(torch.ops.fastres, f"triton_{_name}").default for _name in _TRITON}
    ),
}


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether the compiled extension implements ``operator`` for ``"cpu"`` or ``"cuda"``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fastres::{operator}", device_type.upper()
    )


for _name in _SCHEMAS:
    _library.impl(_name, getattr(fallbacks, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{_name}", getattr(fakes, _name), lib=_library)


# --- Triton's kernels ----------------------------------------------------------------------------

TRITON_FOUND = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs kernels in Python, on CPU tensors too. Triton itself reads the same
# variable, but importing it takes long.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1",
    "true",
    "on",
    "yes",
    "y",
)


@functools.cache
def _launcher(name: str):
    """From ``fastres.kernels``, on first use: Triton takes long to import."""
    module = importlib.import_module(f".kernels.{_TRITON[name]}", __package__)
    return getattr(module, name)


def _launch(name: str, input: Tensor, *args):
    if input.device.type != "cuda" and not TRITON_INTERPRETS:
        raise RuntimeError(f"input: Triton's kernels expect a CUDA tensor, got {input.device}")
    with torch.cuda.device_of(input):
        return _launcher(name)(input, *args)


def _triton_add_relu(input, residual):
    checks.add_relu(input, residual)
    return _launch("add_relu", input, residual)


def _triton_add_relu_backward(grad_output, output):
    _check_gradient(grad_output, output)
    return _launch("add_relu_backward", grad_output, output)


def _triton_bn_relu(
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


def _triton_bn_relu_backward(grad_output, input, output, *args):
    if not input.numel():
        return fallbacks.bn_relu_backward(grad_output, input, output, *args)
    _check_gradient(grad_output, input)
    if output is not None:
        _check_gradient(output, input, "output")
    return _launch("bn_relu_backward", grad_output, input, output, *args)


def _triton_bn_relu_moments(input, running_mean, running_var, momentum, eps):
    if not input.numel():
        return fallbacks.bn_relu_moments(input, running_mean, running_var, momentum, eps)
    checks.bn_relu(input, None, running_mean, running_var, None, None, True, eps)
    return _launch("bn_relu_moments", input, running_mean, running_var, momentum, eps)


def _triton_bn_relu_apply(input, *args):
    if not input.numel():
        return fallbacks.bn_relu_apply(input, *args)
    *operands, _ = args
    checks.bn_relu_apply(input, *operands)
    return _launch("bn_relu_apply", input, *args)


def _triton_bn_relu_conv(input, mean, invstd, bn_weight, bn_bias, weight, bias, *args):
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


def _triton_bn_relu_conv_backward(
    grad_output, input, mean, invstd, bn_weight, bn_bias, weight, *args
):  # fmt: skip
    operands = (grad_output, input, mean, invstd, bn_weight, bn_bias, weight, *args)
    if not input.numel():
        return fallbacks.bn_relu_conv_backward(*operands)
    *window, _ = args
    checks.bn_relu_apply(input, None, mean, invstd, bn_weight, bn_bias)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("bn_relu_conv_backward", *operands)


def _triton_conv(input, weight, bias, stride, padding, dilation, groups):
    window = (stride, padding, dilation, groups)
    if not input.numel():
        return fallbacks.conv(input, weight, bias, *window)
    checks.conv(input, weight, bias, *window)
    return _launch("conv", input, weight, bias, *window)


def _triton_conv_dgrad(grad_output, input, weight, *window):
    if not input.numel():
        return fallbacks.conv_dgrad(grad_output, input, weight, *window)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("conv_dgrad", grad_output, input, weight, *window)


def _triton_conv_wgrad(
    grad_output, input, weight, stride, padding, dilation, groups, output_mask
):  # fmt: skip
    window = (stride, padding, dilation, groups)
    if not input.numel():
        return fallbacks.conv_wgrad(grad_output, input, weight, *window, output_mask)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("conv_wgrad", grad_output, input, weight, *window, output_mask)


def _triton_conv_bn_relu(input, *args):
    *operands, eps, _ = args
    if not input.numel():
        return fallbacks.conv_bn_relu(input, *args)
    checks.conv_bn_relu(input, *operands, False, eps)
    return _launch("conv_bn_relu", input, *args)


def _triton_conv_bn_relu_training(input, *args):
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


def _visible(name: str):
    """The rule by which a compiled graph gets the kernels' launches in place of the operator, so
    that Inductor plans their memory and calls them without Python. An exported graph keeps it."""

    def rule(mode, operator, types, args, kwargs):
        if torch.compiler.is_exporting() or TRITON_INTERPRETS:
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode:
            return _launcher(name)(*args, **kwargs, wrap=torch.library.wrap_triton)

    return rule


def _fake_triton(name: str):
    """The operator's fake. It runs before a compiled graph is looked up in AOTAutograd's cache on
    disk, whose key has the source of the kernels that an operator is known to launch: without it,
    another version's kernels would be found there."""
    fake = getattr(fakes, name)

    def known(*args):
        if TRITON_FOUND and not TRITON_INTERPRETS:
            triton_ops_to_kernels.setdefault(f"fastres::triton_{name}", _kernels())
        return fake(*args)

    return known


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


for _name in _TRITON:
    _library.impl(f"triton_{_name}", globals()[f"_triton_{_name}"], "CompositeExplicitAutograd")
    _qualified = f"fastres::triton_{_name}"
    torch.library.register_fake(_qualified, _fake_triton(_name), lib=_library)
    torch.library.register_torch_dispatch(
        _qualified, FunctionalTensorMode, _visible(_name), lib=_library
    )
