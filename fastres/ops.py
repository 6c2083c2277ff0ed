"""Operator schemas, fakes and fallbacks: the only place that names ``torch.ops.fastres``.

The schemas are defined here, in Python, so that the operators exist on every installation. The
compiled extension ``fastres._C`` implements them for the devices it was built for; anything else
is served by the eager maths of :mod:`fastres.reference` (``CompositeExplicitAutograd``).
"""

import importlib

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

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

_SCHEMAS = {
    "add_relu": "(Tensor input, Tensor residual) -> Tensor",
    "add_relu_backward": "(Tensor grad_output, Tensor output) -> Tensor",
    "bn_relu": f"(Tensor input, Tensor? residual, {_BN_STATE}, bool training, float momentum, "
    "float eps, bool relu) -> (Tensor output, Tensor save_mean, Tensor save_invstd)",
    "bn_relu_backward": "(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, "
    "Tensor? bias, Tensor save_mean, Tensor save_invstd, bool training, bool relu, "
    "bool[3] output_mask) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "conv_bn_relu": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, float eps, bool relu) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)

add_relu = torch.ops.fastres.add_relu.default
add_relu_backward = torch.ops.fastres.add_relu_backward.default
bn_relu = torch.ops.fastres.bn_relu.default
bn_relu_backward = torch.ops.fastres.bn_relu_backward.default
conv_bn_relu = torch.ops.fastres.conv_bn_relu.default


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


def _bn_relu_backward(*args):
    return reference.bn_relu_backward(*args)


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
    _check_device(input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias)
    size = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    formats = (suggest_memory_format(input), suggest_memory_format(weight))
    channels_last = torch.channels_last in formats
    return input.new_empty(size).to(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


for _name in _SCHEMAS:
    _library.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{_name}", globals()[f"_fake_{_name}"], lib=_library)
