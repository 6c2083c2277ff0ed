"""What every residual block has: a branch beside a shortcut, and a branch that can be left out.

``fastres.nn`` and the model families build on it, stochastic depth and lesion studies use it.
"""

import weakref

import torch
from torch import Tensor, nn

from . import branches, fusable, sites
from .backend import extension_serves

_SITE = "conv_bn_relu"


class Residual(nn.Module):
    """A block ``end(branch(x) + shortcut(x))``.

    Attributes:
        survival: the probability that the branch is kept in training, drawn once a call (Huang et
            al. 2016, "Deep Networks with Stochastic Depth", section 3); in eval the branch is
            multiplied by it. 1 is an ordinary block, 0 one whose branch is deleted (a lesion).
        has_shortcut: False for the blocks of plain networks, which have the branch alone.
    """

    survival = 1.0
    has_shortcut = True

    def forward(self, x: Tensor) -> Tensor:
        if self.survival == 1.0:
            return self.combine(x, x)
        if self.survival == 0.0 or (
            self.training and torch.rand((), device="cpu").item() >= self.survival
        ):
            return self.without_branch(x)
        return self.combine(x, x, 1.0 if self.training else self.survival)

    def combine(self, x: Tensor, skipped: Tensor, scale: float = 1.0) -> Tensor:
        """``end(scale * branch(x) + shortcut(skipped))``."""
        raise NotImplementedError

    def without_branch(self, x: Tensor) -> Tensor:
        """``end(shortcut(x))``: costs what the shortcut does."""
        raise NotImplementedError


def residual_blocks(model: nn.Module) -> list[Residual]:
    """The residual (and plain) blocks inside ``model``, from its input on."""
    return [module for module in model.modules() if isinstance(module, Residual)]


class Weighing(nn.Module):
    """A shortcut that weighs the branch too: ``forward(x)`` gives ``shortcut(x), weight``, the
    weight a number or a tensor as the branch's output."""


def shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """``downsample(x)``, fused where it is torchvision's ``Sequential(conv, bn)``; x if None."""
    if downsample is None:
        return x
    if fusable.is_conv_bn(downsample):
        return sites.conv_bn_act(x, *downsample)
    return downsample(x)


def block(
    x: Tensor, pairs: tuple[tuple[nn.Conv2d, nn.Module], ...], act: nn.Module,
    downsample: nn.Module | None, skipped: Tensor, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """``act(scale * branch(x) + downsample(skipped))``, a v1 block: its branch is ``pairs`` of
    convolution and batch norm, with ``act`` between them."""
    if scale == 1.0 and not isinstance(downsample, Weighing) and not extension_serves(_SITE):
        links = tuple(branches.Link(conv, bn, act) for conv, bn in pairs)
        if branches.serves(x, links):
            return branches.run(x, links, shortcut(downsample, skipped))
    *inner, (conv, bn) = pairs
    for pair in inner:
        x = sites.conv_bn_act(x, *pair, act)
    return end(x, conv, bn, act, downsample, skipped, scale)


def end(
    branch: Tensor, conv: nn.Conv2d, bn: nn.Module, act: nn.Module,
    downsample: nn.Module | None, skipped: Tensor, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """``act(scale * bn(conv(branch)) + downsample(skipped))``: the end of a v1 block."""
    if isinstance(downsample, Weighing):
        residual, weight = downsample(skipped)
        output = sites.conv_bn_act(branch, conv, bn) * (weight * scale)
        return sites.add_act(output, residual, act)
    return scaled_conv_bn_act(branch, conv, bn, act, shortcut(downsample, skipped), scale)


def end_without_branch(act: nn.Module, downsample: nn.Module | None, x: Tensor) -> Tensor:
    """``act(downsample(x))``. An identity shortcut's input comes out of a ReLU: it is its own."""
    if downsample is None:
        return x
    if fusable.is_conv_bn(downsample):
        return sites.conv_bn_act(x, *downsample, act)
    output = downsample(x)
    return act(output[0] if isinstance(downsample, Weighing) else output)


# --- a branch that ends in a batch norm, multiplied by a constant ---------------------------------

# batch norm -> one in eval that gives a multiple of it
_multiples: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def scaled_conv_bn_act(
    input: Tensor, conv: nn.Conv2d, bn: nn.Module, act: nn.Module, residual: Tensor, scale: float
) -> Tensor:
    """``act(scale * bn(conv(input)) + residual)``.

    In inference ``scale`` is part of batch norm's weight and bias, and costs nothing.
    """
    if scale == 1.0:
        return sites.conv_bn_act(input, conv, bn, act, residual)
    multiple = _multiple(bn, scale)
    if multiple is not None:
        return sites.conv_bn_act(input, conv, multiple, act, residual)
    return sites.add_act(sites.conv_bn_act(input, conv, bn) * scale, residual, act)


def _multiple(bn: nn.Module, scale: float) -> nn.BatchNorm2d | None:
    """A batch norm in eval that gives ``scale * bn``; None where ``bn`` must be called itself.

    Its vectors are made anew in every call: those folded into a convolution are compared by value.
    """
    if bn.training or type(bn) is not nn.BatchNorm2d or fusable.why_not_bn(bn):
        return None
    if torch.is_grad_enabled() or bn.weight is None or bn.running_mean is None:
        return None
    if torch.compiler.is_compiling():
        return None
    multiple = _multiples.get(bn)
    if multiple is None:
        multiple = nn.BatchNorm2d(bn.num_features, device="meta").eval()
        _multiples[bn] = multiple
    multiple.eps = bn.eps
    multiple._parameters.update(weight=bn.weight * scale, bias=bn.bias * scale)
    multiple._buffers.update(running_mean=bn.running_mean, running_var=bn.running_var)
    return multiple
