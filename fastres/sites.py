"""Fused calls on modules: what :mod:`fastres.nn` and converted models run.

A *site* is a place where a convolution, a batch norm, a residual addition and a ReLU follow each
other. Every call looks at the modules as they are now: whatever the fused path does not cover (a
hook, a subclass, a replaced module, a residual that broadcasts) is called module by module, in the
order the model's author wrote, so that the answer is always the author's.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import functional, ops
from .arguments import compute_dtype, conv_output_size, resolve_padding
from .backend import extension_serves

Act = nn.Module | Callable[[Tensor], Tensor] | None


def conv_bn_act(
    input: Tensor, conv: nn.Conv2d, bn: nn.Module, act: Act = None,
    residual: Tensor | None = None, via: tuple[nn.Module, ...] = (),
) -> Tensor:  # fmt: skip
    """``act(bn(conv(input)) + residual)``; ``via`` are identity modules behind ``bn``.

    The extension looks at plain modules faster than Python does; see ``csrc/sites.h``.
    """
    if extension_serves("conv_bn_relu"):
        output = ops.extension.conv_bn_act(input, conv, bn, act, residual, via)
        if output is not None:
            return output
    if why_not_conv(conv) or input.dim() != 4:
        return bn_act(conv(input), bn, act, residual, via)
    if why_not_rest(bn, act, residual, via):
        return _one_by_one(conv(input), bn, act, residual, via)
    if residual is not None and (act is None or not fits_convolution(residual, input, conv)):
        return _add_act(_conv_bn(input, conv, bn, None, False), residual, act)
    return _conv_bn(input, conv, bn, residual, act is not None or has_relu(bn))


def bn_act(
    input: Tensor, bn: nn.Module, act: Act = None,
    residual: Tensor | None = None, via: tuple[nn.Module, ...] = (),
) -> Tensor:  # fmt: skip
    """``act(bn(input) + residual)``; ``via`` are identity modules behind ``bn``."""
    if extension_serves("bn_relu"):
        output = ops.extension.bn_act(input, bn, act, residual, via)
        if output is not None:
            return output
    if why_not_rest(bn, act, residual, via) or input.dim() != 4:
        return _one_by_one(input, bn, act, residual, via)
    if residual is not None and not alike(residual, input.shape, input.dtype, input.device):
        return _add_act(_bn(input, bn, None, False), residual, act)
    return _bn(input, bn, residual, act is not None or has_relu(bn))


def convolve(input: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(input)``, for a convolution that no batch norm follows.

    On a CPU it runs on fastres' own convolutions; in inference their weights are packed once: a
    batch norm that changes nothing is what they fold.
    """
    if extension_serves("conv_bn_relu"):
        output = ops.extension.convolve(input, conv)
        if output is not None:
            return output
    plain = type(input) is Tensor and input.dim() == 4 and input.device.type == "cpu"
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return conv(input)
    if input.dtype not in _FOLDED_DTYPES or input.dtype != conv.weight.dtype or why_not_conv(conv):
        return conv(input)
    return conv_bn_act(input, conv, _unchanging(conv.out_channels, input.dtype))


_FOLDED_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _unchanging(channels: int, dtype: torch.dtype) -> nn.BatchNorm2d:
    """A batch norm whose scale is 1 and whose shift is 0."""
    with torch.inference_mode(False):
        return nn.BatchNorm2d(channels, eps=0.0, affine=False, device="cpu", dtype=dtype).eval()


def add_act(input: Tensor, residual: Tensor, act: Act) -> Tensor:
    """``act(input + residual)``."""
    if (
        act is None
        or why_not_act(act)
        or not isinstance(residual, Tensor)
        or input.dim() != 4
        or not alike(residual, input.shape, input.dtype, input.device)
    ):
        return _add_act(input, residual, act)
    return functional.add_relu(input, residual)


# --- which modules a fused call may stand for ----------------------------------------------------

_FROZEN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}
_WITH_ACT = {
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}


def _name(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def is_bn(module: nn.Module) -> bool:
    """A batch norm whose maths is known, with or without an activation of its own."""
    return type(module) is nn.BatchNorm2d or _name(module) in _FROZEN | _WITH_ACT


def has_relu(bn: nn.Module) -> bool:
    """Whether the batch norm applies a ReLU itself (timm's BatchNormAct2d)."""
    return type(bn) is not nn.BatchNorm2d and isinstance(getattr(bn, "act", None), nn.ReLU)


def why_not_conv(conv: nn.Module) -> str:
    """Why a fused call may not stand for this convolution; "" where it may."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    if conv.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ):
        return "padding 'same' is not symmetric for an even kernel"
    return why_not_plain(conv)


def why_not_bn(bn: nn.Module) -> str:
    """Why a fused call may not stand for this batch norm; "" where it may."""
    if type(bn) is not nn.BatchNorm2d:
        name = _name(bn)
        if name not in _FROZEN | _WITH_ACT:
            kind = "BatchNorm subclass " if isinstance(bn, nn.modules.batchnorm._BatchNorm) else ""
            return f"{kind}{type(bn).__name__} is not nn.BatchNorm2d"
        if name in _WITH_ACT:
            for inner, expected in ((bn.drop, nn.Identity), (bn.act, (nn.ReLU, nn.Identity))):
                if not isinstance(inner, expected):
                    return f"{type(inner).__name__} inside {type(bn).__name__}"
                if reason := why_not_plain(inner):
                    return reason
    return why_not_plain(bn)


def why_not_act(act: Act) -> str:
    """Why a fused call may not stand for this activation; "" where it may (None: none at all)."""
    if act is None or act is F.relu:
        return ""
    if type(act) is not nn.ReLU:
        return f"activation {type(act).__name__} is not ReLU"
    return why_not_plain(act)


def why_not_via(module: nn.Module) -> str:
    """Why a module between batch norm and addition may not be skipped; "" where it may."""
    if type(module) is not nn.Identity:
        return f"{type(module).__name__} between batch norm and addition"
    return why_not_plain(module)


def is_conv_bn(module: nn.Module) -> bool:
    """A plain ``nn.Sequential(convolution, batch norm)``: torchvision's projection shortcut."""
    return (
        type(module) is nn.Sequential
        and len(module) == 2
        and isinstance(module[0], nn.Conv2d)
        and is_bn(module[1])
        and not why_not_plain(module)
    )


def why_not_plain(module: nn.Module) -> str:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"hook on a {type(module).__name__}"
    if "forward" in module.__dict__:
        return f"patched forward of a {type(module).__name__}"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "global module hooks"
    return ""


def why_not_rest(bn: nn.Module, act: Act, residual, via) -> str:
    reason = why_not_bn(bn) or why_not_act(act)
    if not reason and residual is not None:
        if not isinstance(residual, Tensor):
            return "residual is no Tensor"
        if has_relu(bn):
            return f"ReLU of {type(bn).__name__} comes before the addition"
    for module in via:
        reason = reason or why_not_via(module)
    return reason


# --- the calls -----------------------------------------------------------------------------------


def _conv_bn(input, conv, bn, residual, relu) -> Tensor:
    running_mean, running_var, training, momentum = statistics_of(bn)
    call = functional.conv_bn_relu if relu else functional.conv_bn
    operands = (input, conv.weight)
    if residual is not None:
        call, operands = functional.conv_bn_add_relu, (input, residual, conv.weight)
    batches = count_batch(bn)
    try:
        return call(
            *operands, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
            running_mean, running_var, bn.weight, bn.bias, training, momentum, bn.eps,
        )  # fmt: skip
    except functional.REFUSED:
        uncount(batches)
        raise


def _bn(input, bn, residual, relu) -> Tensor:
    running_mean, running_var, training, momentum = statistics_of(bn)
    batches = count_batch(bn)
    try:
        return functional.batch_norm(
            input, residual, running_mean, running_var, bn.weight, bn.bias,
            training, momentum, bn.eps, relu,
        )  # fmt: skip
    except functional.REFUSED:
        uncount(batches)
        raise


def statistics_of(bn: nn.Module) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """``running_mean, running_var, training, momentum`` as ``nn.BatchNorm2d.forward`` has them."""
    if not isinstance(bn, nn.BatchNorm2d):  # frozen: the statistics are constants
        return bn.running_mean, bn.running_var, False, 0.0
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    if bn.training and not bn.track_running_stats:
        return None, None, training, 0.0
    momentum = bn.momentum
    if momentum is None:  # a cumulative average
        counted = bn.training and bn.num_batches_tracked is not None
        momentum = 1.0 / float(bn.num_batches_tracked + 1) if counted else 0.0
    return bn.running_mean, bn.running_var, training, momentum


def count_batch(bn: nn.Module) -> Tensor | None:
    """Count a batch before it is normalised, as ``nn.BatchNorm2d`` does; gives the counter."""
    if not (bn.training and isinstance(bn, nn.BatchNorm2d) and bn.track_running_stats):
        return None
    batches = bn.num_batches_tracked
    return None if batches is None else batches.add_(1)


def uncount(batches: Tensor | None) -> None:
    if batches is not None:
        batches.sub_(1)


def _one_by_one(input: Tensor, bn: nn.Module, act: Act, residual, via) -> Tensor:
    output = bn(input)
    for module in via:
        output = module(output)
    return _add_act(output, residual, act)


def _add_act(output: Tensor, residual, act: Act) -> Tensor:
    if residual is not None:
        output = output + residual
    return output if act is None else act(output)


def fits_convolution(residual: Tensor, input: Tensor, conv: nn.Conv2d) -> bool:
    padding = resolve_padding(conv.padding, conv.weight, conv.stride, conv.dilation)
    size = conv_output_size(input.shape, conv.weight.shape, conv.stride, padding, conv.dilation)
    return alike(residual, size, compute_dtype(input), input.device)


def alike(tensor: Tensor, shape, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
