"""A classifier's head on modules: global average pooling, flattening and a linear layer.

As the calls of :mod:`fastres.sites`, each looks at the modules as they are now.
"""

import torch
from torch import Tensor, nn

from . import autograd, functional, fusable, ops
from .backend import extension_serves, serving

KIND = "mean_linear"  # of site, and the operator that serves it
_TIMM_POOL = ("timm.layers.adaptive_avgmax_pool", "SelectAdaptivePool2d")
_TIMM_MEAN = ("timm.layers.adaptive_avgmax_pool", "FastAdaptiveAvgPool")
_ONE = (1, (1, 1), [1, 1])


def classify(input: Tensor, pool: nn.Module, fc: nn.Module) -> Tensor:
    """``fc(flatten(pool(input), 1))``."""
    output = mean_linear(input, (pool,), fc)
    return fc(torch.flatten(pool(input), 1)) if output is None else output


def mean_linear(input: Tensor, pooling: tuple[nn.Module, ...], fc: nn.Module) -> Tensor | None:
    """``fc`` on what ``pooling`` modules make of a map, its means over H and W, in one operator.

    None where the modules have to be called: where autograd records, under autocast, where one of
    them is watched or another than it was, and for anything that they would refuse.
    """
    if extension_serves(KIND):
        output = ops.extension.mean_linear(input, pooling, fc)
        if output is not None:
            return output
    if not isinstance(input, Tensor) or input.dim() != 4 or not input.numel():
        return None
    if any(map(why_not, (*pooling, fc))) or serving(KIND, input.device) != "cpu":
        return None
    weight, bias = fc.weight, fc.bias
    if autograd.needs_graph(input, weight, bias) or torch.is_autocast_enabled("cpu"):
        return None
    if not all(_is_plain(tensor, input) for tensor in (weight, bias) if tensor is not None):
        return None
    if weight.shape[1] != input.shape[1]:
        return None
    return functional.mean_linear(input, weight, bias)


def _is_plain(parameter: Tensor, input: Tensor) -> bool:
    """Whether a parameter has the input's dtype and device and no behaviour of its own."""
    ordinary = type(parameter) in (Tensor, nn.Parameter) or torch.compiler.is_compiling()
    return ordinary and parameter.dtype == input.dtype and parameter.device == input.device


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def is_flatten(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def is_dropout(module: nn.Module) -> bool:
    return type(module) is nn.Dropout


def pooled_dimensions(module: nn.Module) -> int:
    """2 or 4, those of what a global average pooling gives; 0 for any other module."""
    if type(module) is nn.AdaptiveAvgPool2d:
        return 4 if module.output_size in _ONE else 0
    if fusable.name_of(module) == _TIMM_MEAN:
        return (2 if module.flatten else 4) if tuple(module.dim) == (2, 3) else 0
    if fusable.name_of(module) == _TIMM_POOL:
        dimensions = pooled_dimensions(module.pool)
        if is_flatten(module.flatten):
            return 2 if dimensions else 0
        return dimensions if type(module.flatten) is nn.Identity else 0
    return 0


def is_part(module: nn.Module) -> bool:
    """Whether a module may be a part of a head."""
    known = is_linear(module) or is_flatten(module) or is_dropout(module)
    return known or pooled_dimensions(module) > 0


def why_not(module: nn.Module) -> str:
    """Why the operator may not stand for this module; "" where it may."""
    if not is_part(module):
        kinds = "global average pooling, flattening, dropout or nn.Linear"
        return f"{type(module).__name__} is no {kinds}"
    if is_dropout(module) and module.training and module.p > 0:
        return "dropout in training mode"
    inner = (module.pool, module.flatten) if fusable.name_of(module) == _TIMM_POOL else ()
    return next(filter(None, map(fusable.why_not_plain, (module, *inner))), "")
