"""ResNets for CIFAR's 32x32 images.

He et al. 2015, section 4.2: a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64
planes, 6n+2 layers; shortcuts are padded identities (option A).
"""

from collections.abc import Sequence

from ..nn import BasicBlock
from ..residual import Residual
from .common import blocks_of_depth
from .registry import register, register_depths
from .resnet import ResNet

DEPTHS = (20, 32, 44, 56, 110, 1202)
_CIFAR = {"num_classes": 10, "stem": "cifar", "widths": (16, 32, 64), "shortcut": "A"}


def cifar_resnet(depth: int = 20, block: type[Residual] = BasicBlock, **options) -> ResNet:
    """The CIFAR ResNet of 6n+2 layers. Options as :class:`ResNet`'s."""
    return ResNet(block, [blocks_of_depth(depth, 2)] * 3, **(_CIFAR | options))


def cifar_resnet_wide(n: int = 1, widths: Sequence[int] = (64, 128, 256), **options) -> ResNet:
    """The wider form of tutorials: [1 + 2n, 2n, 2n] basic blocks, with widths of your choice and
    projections (option B). Options as :class:`ResNet`'s."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected a positive integer, got {n!r}")
    options = _CIFAR | {"shortcut": "B", "widths": widths} | options
    return ResNet(BasicBlock, [1 + 2 * n, 2 * n, 2 * n], **options)


_FIXED = ("block", "layers", "depth")
register_depths("cifar_resnet", cifar_resnet, DEPTHS, ResNet, fixed=_FIXED)
register("cifar_resnet_wide", cifar_resnet_wide, ResNet, fixed=_FIXED)
