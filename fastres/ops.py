"""Operator schemas and registration: the only place that names ``torch.ops.fastres``.

The schemas are defined here, in Python, so that the operators exist on every installation. The
compiled extension ``fastres._C`` implements them for the devices it was built for; anything else
is served by :mod:`fastres.fallbacks` (``CompositeExplicitAutograd``). The Triton kernels are
operators of their own, ``fastres::triton_<name>``, with the same schemas: see
:mod:`fastres.launches`.
"""

import importlib
from typing import NamedTuple

import torch
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import fakes, fallbacks, launches

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

for _name in launches.MODULES:  # Triton's
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
        **{
            _name: getattr(torch.ops.fastres, f"triton_{_name}").default
            for _name in launches.MODULES
        }
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

for _name in launches.MODULES:
    _qualified = f"fastres::triton_{_name}"
    _library.impl(f"triton_{_name}", getattr(launches, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(_qualified, launches.fake(_name), lib=_library)
    torch.library.register_torch_dispatch(
        _qualified, FunctionalTensorMode, launches.visible(_name), lib=_library
    )
