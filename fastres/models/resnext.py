"""ResNeXt: bottlenecks whose 3x3 convolution is grouped.

Xie, Girshick, Dollar, Tu, He 2017, "Aggregated Residual Transformations for Deep Neural Networks".
A name such as ``resnext50_32x4d`` has depth, cardinality and width of a path.
"""

from ..nn import Bottleneck
from .common import blocks_of_depth, check_choice
from .registry import register
from .resnet import ResNet

_LAYERS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
_CIFAR = {"num_classes": 10, "stem": "cifar", "widths": (64, 128, 256)}


def resnext(depth: int = 50, cardinality: int = 32, width: int = 4, **options) -> ResNet:
    """ResNeXt for ImageNet, of 50, 101 or 152 layers. Options as :class:`ResNet`'s.

    ``cardinality`` is the number of paths of a block, ``width`` a path's channels in stage 1.
    """
    check_choice("depth", depth, _LAYERS)
    return ResNet(Bottleneck, _LAYERS[depth], groups=cardinality, width_per_group=width, **options)


def cifar_resnext(depth: int = 29, cardinality: int = 8, width: int = 64, **options) -> ResNet:
    """ResNeXt for CIFAR, of 9n+2 layers (section 5.3). Options as :class:`ResNet`'s."""
    options = _CIFAR | {"groups": cardinality, "width_per_group": width} | options
    return ResNet(Bottleneck, [blocks_of_depth(depth, 3)] * 3, **options)


def resnext50_32x4d(**options) -> ResNet:
    """ResNeXt-50, 32 paths of 4 channels. Options as :func:`resnext`'s."""
    return resnext(50, **({"cardinality": 32, "width": 4} | options))


def resnext101_32x8d(**options) -> ResNet:
    """ResNeXt-101, 32 paths of 8 channels. Options as :func:`resnext`'s."""
    return resnext(101, **({"cardinality": 32, "width": 8} | options))


def resnext101_64x4d(**options) -> ResNet:
    """ResNeXt-101, 64 paths of 4 channels. Options as :func:`resnext`'s."""
    return resnext(101, **({"cardinality": 64, "width": 4} | options))


def cifar_resnext29_8x64d(**options) -> ResNet:
    """ResNeXt-29, 8 paths of 64 channels. Options as :func:`cifar_resnext`'s."""
    return cifar_resnext(29, **({"cardinality": 8, "width": 64} | options))


def cifar_resnext29_16x64d(**options) -> ResNet:
    """ResNeXt-29, 16 paths of 64 channels. Options as :func:`cifar_resnext`'s."""
    return cifar_resnext(29, **({"cardinality": 16, "width": 64} | options))


_FIXED = ("block", "layers", "depth", "groups", "width_per_group")
for _build in (
    resnext50_32x4d, resnext101_32x8d, resnext101_64x4d,
    cifar_resnext29_8x64d, cifar_resnext29_16x64d,
):  # fmt: skip
    register(_build.__name__, _build, resnext, ResNet, fixed=_FIXED)
