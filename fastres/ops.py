"""Operator schemas, fakes and fallbacks: the only place that names ``torch.ops.fastres``.

The schemas are defined here, in Python, so that the operators exist on every installation. The
compiled extension ``fastres._C`` implements them for the devices it was built for; anything else
is served by the eager maths of :mod:`fastres.reference` (``CompositeExplicitAutograd``). The Triton
kernels are operators of their own, ``fastres::triton_<name>``, with the same schemas.
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
from torch._prims_common import suggest_memory_format
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import checks, reference
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
    "bn_relu_recompute": "(Tensor input, Tensor? weight, Tensor? bias, Tensor save_mean, "
    "Tensor save_invstd) -> Tensor",
    "bn_relu_backward": "(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, "
    "Tensor? bias, Tensor save_mean, Tensor save_invstd, bool training, bool relu, "
    "bool[3] output_mask) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "bn_relu_conv": "(Tensor input, Tensor running_mean, Tensor running_var, Tensor? bn_weight, "
    f"Tensor? bn_bias, float eps, Tensor weight, {_GEOMETRY}) -> Tensor",
    "conv": f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    "conv_dgrad": f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor",
    "conv_dgrad_bn_relu": f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, "
    "Tensor bn_input, Tensor? bn_weight, Tensor save_mean, Tensor save_invstd, "
    "bool[3] output_mask) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "conv_wgrad": f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, "
    "bool[2] output_mask) -> (Tensor grad_weight, Tensor grad_bias)",
    "conv_bn_relu": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, "
    f"{_GEOMETRY}, float eps, bool relu) -> Tensor",
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
}
for _name in _TRITON:
    _library.define(f"triton_{_name}{_SCHEMAS[_name]}", tags=torch.Tag.pt2_compliant_tag)

add_relu = torch.ops.fastres.add_relu.default
add_relu_backward = torch.ops.fastres.add_relu_backward.default
bn_relu = torch.ops.fastres.bn_relu.default
bn_relu_recompute = torch.ops.fastres.bn_relu_recompute.default
bn_relu_backward = torch.ops.fastres.bn_relu_backward.default
bn_relu_conv = torch.ops.fastres.bn_relu_conv.default
conv = torch.ops.fastres.conv.default
conv_dgrad = torch.ops.fastres.conv_dgrad.default
conv_dgrad_bn_relu = torch.ops.fastres.conv_dgrad_bn_relu.default
conv_wgrad = torch.ops.fastres.conv_wgrad.default
conv_bn_relu = torch.ops.fastres.conv_bn_relu.default
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


_elementwise = (add_relu, add_relu_backward, bn_relu, bn_relu_backward)
_inference = (conv_bn_relu_pool, mean_linear)
OPERATORS = {
    "cpu": Operators(*_elementwise, conv_bn_relu, conv, conv_dgrad, conv_wgrad, None, *_inference),
    "cuda": Operators(
        *_elementwise, conv_bn_relu, conv, conv_dgrad, conv_wgrad, conv_bn_relu_training
    ),
    "triton": Operators(
        **{_name: getattr(torch.ops.fastres, f"triton_{_name}").default for _name in _TRITON}
    ),
}


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether the compiled extension implements ``operator`` for ``"cpu"`` or ``"cuda"``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fastres::{operator}", device_type.upper()
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: what statistics and parameters are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- fallbacks: used where no compiled kernel is registered for the device -----------------------


def _add_relu(input: Tensor, residual: Tensor) -> Tensor:
    checks.add_relu(input, residual)
    return reference.add_relu(input, residual)


def _add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad_output, output, 0)


def _bn_relu(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
):
    checks.bn_relu(input, residual, running_mean, running_var, weight, bias, training, eps)
    return reference.bn_relu_forward(
        input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
    )


def _bn_relu_recompute(input, weight, bias, save_mean, save_invstd):
    return reference.bn_relu_recompute(input, weight, bias, save_mean, save_invstd)


def _bn_relu_backward(*args):
    return reference.bn_relu_backward(*args)


def _bn_relu_conv(
    input, running_mean, running_var, bn_weight, bn_bias, eps,
    weight, stride, padding, dilation, groups,
):  # fmt: skip
    """``conv2d(relu(batch_norm(input)), weight)`` with the running statistics, or others."""
    y, *_ = reference.bn_relu_forward(
        input, None, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps, True
    )
    return conv(y, weight, None, stride, padding, dilation, groups)


def _conv(input, weight, bias, stride, padding, dilation, groups):
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_gradients(grad_output, input, weight, stride, padding, dilation, groups, mask):
    """PyTorch's own gradients of input, weight and bias, those that ``mask`` asks for;
    differentiable."""
    bias_size = [weight.shape[0]] if mask[2] else None
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, bias_size, stride, padding, dilation, False, [0, 0], groups,
        mask,
    )  # fmt: skip


def _conv_dgrad(grad_output, input, weight, stride, padding, dilation, groups):
    return conv_gradients(
        grad_output, input, weight, stride, padding, dilation, groups, [True, False, False]
    )[0]


def _conv_dgrad_bn_relu(
    grad_output, input, weight, stride, padding, dilation, groups,
    bn_input, bn_weight, save_mean, save_invstd, output_mask,
):  # fmt: skip
    """Through a convolution of ``input = relu(batch_norm(bn_input) + residual)``, in training:
    ``conv_dgrad``, whose result the ReLU masks, and ``bn_relu_backward``."""
    grad = conv_dgrad(grad_output, input, weight, stride, padding, dilation, groups)
    return bn_relu_backward(
        grad, bn_input, input, bn_weight, None, save_mean, save_invstd, True, True, output_mask
    )


def _conv_wgrad(grad_output, input, weight, stride, padding, dilation, groups, output_mask):
    _, grad_weight, grad_bias = conv_gradients(
        grad_output, input, weight, stride, padding, dilation, groups, [False, *output_mask]
    )
    nothing = weight.new_empty(0)
    return (
        nothing if grad_weight is None else grad_weight,
        nothing.clone() if grad_bias is None else grad_bias,
    )


def _conv_bn_relu(
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


def _conv_bn_relu_training(
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


def _conv_bn_relu_pool(
    input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, pool_kernel, pool_stride, pool_padding,
):  # fmt: skip
    output = _conv_bn_relu(
        input, weight, bias, None, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, eps, True,
    )  # fmt: skip
    return torch.nn.functional.max_pool2d(output, pool_kernel, pool_stride, pool_padding)


def _mean_linear(input, weight, bias):
    checks.mean_linear(input, weight, bias)
    return reference.mean_linear(input, weight, bias)


# --- fakes: shapes, dtypes and strides without data ----------------------------------------------


def _check_device(input: Tensor, *others: Tensor | None) -> None:
    """One tensor on "meta" brings a call here, whatever device the others are on."""
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"expected every tensor on {input.device}, got one on {other.device}"
            )


def _like(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _fake_add_relu(input: Tensor, residual: Tensor) -> Tensor:
    _check_device(input, residual)
    return _like(input)


def _fake_add_relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    return _like(output)


def _fake_bn_relu(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
):
    _check_device(input, residual, running_mean, running_var, weight, bias)
    statistics = input.new_empty(input.shape[1], dtype=accumulation_dtype(input.dtype))
    return _like(input), statistics, torch.empty_like(statistics)


def _fake_bn_relu_recompute(input, weight, bias, save_mean, save_invstd):
    _check_device(input, weight, bias, save_mean, save_invstd)
    return _like(input)


def _fake_bn_relu_backward(
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


def _fake_conv_bn_relu(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, relu,
):  # fmt: skip
    _check_device(input, residual, running_mean, running_var, bn_weight, bn_bias)
    return _fake_conv(input, weight, bias, stride, padding, dilation, groups)


def _fake_conv_bn_relu_training(
    input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, momentum, eps, relu,
):  # fmt: skip
    convolved = _fake_conv_bn_relu(
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, eps, relu,
    )  # fmt: skip
    statistics = input.new_empty(weight.shape[0], dtype=accumulation_dtype(input.dtype))
    return torch.empty_like(convolved), convolved, statistics, torch.empty_like(statistics)


def _fake_conv_dgrad(grad_output, input, weight, stride, padding, dilation, groups):
    _check_device(input, grad_output, weight)
    return _like(input)


def _fake_conv_dgrad_bn_relu(
    grad_output, input, weight, stride, padding, dilation, groups,
    bn_input, bn_weight, save_mean, save_invstd, output_mask,
):  # fmt: skip
    _check_device(input, grad_output, weight, bn_input, bn_weight, save_mean, save_invstd)
    return _fake_bn_relu_backward(
        input, bn_input, input, bn_weight, None, save_mean, save_invstd, True, True, output_mask
    )


def _fake_conv_wgrad(grad_output, input, weight, stride, padding, dilation, groups, output_mask):
    _check_device(input, grad_output, weight)
    want_weight, want_bias = output_mask
    return (
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def _fake_bn_relu_conv(
    input, running_mean, running_var, bn_weight, bn_bias, eps,
    weight, stride, padding, dilation, groups,
):  # fmt: skip
    _check_device(input, running_mean, running_var, bn_weight, bn_bias, weight)
    return _fake_conv(input, weight, None, stride, padding, dilation, groups)


def _fake_conv_bn_relu_pool(
    input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
    stride, padding, dilation, groups, eps, pool_kernel, pool_stride, pool_padding,
):  # fmt: skip
    convolved = _fake_conv_bn_relu(
        input, weight, bias, None, running_mean, running_var, bn_weight, bn_bias,
        stride, padding, dilation, groups, eps, True,
    )  # fmt: skip
    return torch.nn.functional.max_pool2d(convolved, pool_kernel, pool_stride, pool_padding)


def _fake_mean_linear(input, weight, bias):
    _check_device(input, weight, bias)
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake_conv(input, weight, bias, stride, padding, dilation, groups):
    _check_device(input, weight, bias)
    size = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    formats = (suggest_memory_format(input), suggest_memory_format(weight))
    channels_last = torch.channels_last in formats
    return input.new_empty(size).to(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


for _name in _SCHEMAS:
    _library.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{_name}", globals()[f"_fake_{_name}"], lib=_library)


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
        return _bn_relu(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu
        )
    checks.bn_relu(input, residual, running_mean, running_var, weight, bias, training, eps)
    return _launch(
        "bn_relu", input, residual, running_mean, running_var, weight, bias, training, momentum,
        eps, relu,
    )  # fmt: skip


def _triton_bn_relu_backward(grad_output, input, output, *args):
    if not input.numel():
        return _bn_relu_backward(grad_output, input, output, *args)
    _check_gradient(grad_output, input)
    if output is not None:
        _check_gradient(output, input, "output")
    return _launch("bn_relu_backward", grad_output, input, output, *args)


def _triton_conv(input, weight, bias, stride, padding, dilation, groups):
    window = (stride, padding, dilation, groups)
    if not input.numel():
        return _conv(input, weight, bias, *window)
    checks.conv(input, weight, bias, *window)
    return _launch("conv", input, weight, bias, *window)


def _triton_conv_dgrad(grad_output, input, weight, *window):
    if not input.numel():
        return _conv_dgrad(grad_output, input, weight, *window)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("conv_dgrad", grad_output, input, weight, *window)


def _triton_conv_wgrad(
    grad_output, input, weight, stride, padding, dilation, groups, output_mask
):  # fmt: skip
    window = (stride, padding, dilation, groups)
    if not input.numel():
        return _conv_wgrad(grad_output, input, weight, *window, output_mask)
    _check_convolved(grad_output, input, weight, *window)
    return _launch("conv_wgrad", grad_output, input, weight, *window, output_mask)


def _triton_conv_bn_relu(input, *args):
    *operands, eps, _ = args
    if not input.numel():
        return _conv_bn_relu(input, *args)
    checks.conv_bn_relu(input, *operands, False, eps)
    return _launch("conv_bn_relu", input, *args)


def _triton_conv_bn_relu_training(input, *args):
    *operands, _, eps, _ = args
    if not input.numel():
        return _conv_bn_relu_training(input, *args)
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
    _check_device(like, gradient)


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
    fake = globals()[f"_fake_{name}"]

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
