"""A network's stem on modules: convolution, batch norm, ReLU and a max-pool.

As the calls of :mod:`fastres.sites`, each looks at the modules as they are now.
"""

import torch
from torch import Tensor, nn

from . import autograd, functional, fusable, ops, sites
from .arguments import pair
from .backend import extension_serves, serving

KIND = "conv_bn_relu_pool"  # of site, and the operator that serves it


def conv_bn_act_pool(
    input: Tensor, conv: nn.Conv2d, bn: nn.Module, act: fusable.Act, pool: nn.Module | None,
    via: tuple[nn.Module, ...] = (),
) -> Tensor:  # fmt: skip
    """``pool(act(bn(conv(input))))``, see :func:`fastres.sites.conv_bn_act`; ``pool`` may be None."""
    if pool is None:
        return sites.conv_bn_act(input, conv, bn, act, via=via)
    if extension_serves(KIND):
        output = ops.extension.conv_bn_act_pool(input, conv, bn, act, pool, via)
        if output is not None:
            return output
    if not _is_served(input, conv, bn, act, pool, via):
        return pool(sites.conv_bn_act(input, conv, bn, act, via=via))
    return functional.conv_bn_relu_pool(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
        pool.kernel_size, pool.stride, pool.padding,
    )  # fmt: skip


def _is_served(input, conv, bn, act, pool, via) -> bool:
    """Whether one operator may stand for the modules: nowhere where autograd records, or autocast
    is on."""
    if not isinstance(input, Tensor) or input.dim() != 4 or not input.numel():
        return False
    if serving(KIND, input.device) != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if why_not_pool(pool) or fusable.why_not_conv(conv) or fusable.why_not_rest(bn, act, None, via):
        return False
    if bn.training or bn.running_mean is None or bn.running_var is None:
        return False
    if act is None and not fusable.has_relu(bn):
        return False
    parameters = (conv.weight, conv.bias, bn.weight, bn.bias)
    return conv.weight.dtype == input.dtype and not autograd.needs_graph(input, *parameters)


def is_pool(module: nn.Module) -> bool:
    return type(module) is nn.MaxPool2d


def why_not_pool(pool: nn.Module) -> str:
    """Why the operator may not stand for this pooling; "" where it may."""
    if not is_pool(pool):
        return f"{type(pool).__name__} is not nn.MaxPool2d"
    if pool.return_indices or pool.ceil_mode or pair("dilation", pool.dilation) != (1, 1):
        return "max-pool with indices, dilation or ceil_mode"
    return fusable.why_not_plain(pool)
