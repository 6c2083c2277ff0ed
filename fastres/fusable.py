"""Which modules a fused call may stand for, and why not the others.

``csrc/modules.h`` looks at modules for the extension, and leaves the unusual ones to this.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

Act = nn.Module | Callable[[Tensor], Tensor] | None

_FROZEN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}
_WITH_ACT = {
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}


def name_of(module: nn.Module) -> tuple[str, str]:
    """Module and name of its class: of libraries that need not be installed."""
    return type(module).__module__, type(module).__qualname__


def is_bn(module: nn.Module) -> bool:
    """A batch norm whose maths is known, with or without an activation of its own."""
    return type(module) is nn.BatchNorm2d or name_of(module) in _FROZEN | _WITH_ACT


def has_relu(bn: nn.Module) -> bool:
    """Whether the batch norm applies a ReLU itself (timm's BatchNormAct2d)."""
    return type(bn) is not nn.BatchNorm2d and isinstance(getattr(bn, "act", None), nn.ReLU)


def acts_apart(bn: nn.Module) -> bool:
    """Whether timm's batch norm ends in a dropout or an activation that no fused call stands for: a
    convolution before it is fused with its batch norm alone, and they are called behind."""
    return name_of(bn) in _WITH_ACT and bool(_why_not_inner(bn)) and not why_not_plain(bn)


def why_not_conv(conv: nn.Module) -> str:
    """Why a fused call may not stand for this convolution; "" where it may."""
    if type(conv) is not nn.Conv2d:
        return _why_not_yet(conv) or f"{type(conv).__name__} is not nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    if conv.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ):
        return "padding 'same' is not symmetric for an even kernel"
    return why_not_plain(conv)


def _why_not_yet(module: nn.Module) -> str:
    """A lazy module takes its lasting class at its first call, which no plan is told of."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} had seen no input: call the model once, then convert it"
    return ""


def why_not_bn(bn: nn.Module) -> str:
    """Why a fused call may not stand for this batch norm; "" where it may."""
    if not is_bn(bn):
        kind = "BatchNorm subclass " if isinstance(bn, nn.modules.batchnorm._BatchNorm) else ""
        return _why_not_yet(bn) or f"{kind}{type(bn).__name__} is not nn.BatchNorm2d"
    return (name_of(bn) in _WITH_ACT and _why_not_inner(bn)) or why_not_plain(bn)


def _why_not_inner(bn: nn.Module) -> str:
    """The same of the dropout and the activation inside timm's batch norm."""
    for inner, expected in ((bn.drop, nn.Identity), (bn.act, (nn.ReLU, nn.Identity))):
        if not isinstance(inner, expected):
            return f"{type(inner).__name__} inside {type(bn).__name__}"
        if reason := why_not_plain(inner):
            return reason
    return ""


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
    """What sees, or replaces, a call of this module: a hook or a patched forward; "" if nothing."""
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
    """Why a fused call may not stand for what follows a convolution; "" where it may."""
    reason = why_not_bn(bn) or why_not_act(act)
    if not reason and residual is not None:
        if not isinstance(residual, Tensor):
            return "residual is no Tensor"
        if has_relu(bn):
            return f"ReLU of {type(bn).__name__} comes before the addition"
    for module in via:
        reason = reason or why_not_via(module)
    return reason
