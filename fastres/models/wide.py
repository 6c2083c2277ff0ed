"""Wide ResNets: fewer layers, more channels.

Zagoruyko & Komodakis 2016, "Wide Residual Networks". For ImageNet, bottlenecks with ``width`` times
the channels inside; for CIFAR, pre-activation blocks with ``width`` times the channels.
"""

from ..nn import Bottleneck
from .common import blocks_of_depth, check_choice
from .preact import PreActBlock, PreActResNet
from .registry import register
from .resnet import ResNet

_LAYERS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}


def wide_resnet(depth: int = 50, width: int = 2, **options) -> ResNet:
    """Wide ResNet for ImageNet, of 50 or 101 layers. Options as :class:`ResNet`'s."""
    check_choice("depth", depth, _LAYERS)
    return ResNet(Bottleneck, _LAYERS[depth], width_per_group=64 * width, **options)


def cifar_wide_resnet(depth: int = 28, width: int = 10, **options) -> PreActResNet:
    """WRN-depth-width of 6n+4 layers; ``dropout`` as the paper's. Options as
    :class:`PreActResNet`'s."""
    layers = [blocks_of_depth(depth, 2, others=4)] * 3
    widths = (16 * width, 32 * width, 64 * width)
    options = {"num_classes": 10, "stem": "cifar", "widths": widths, "stem_width": 16} | options
    return PreActResNet(PreActBlock, layers, **options)


def wide_resnet50_2(**options) -> ResNet:
    """ResNet-50, twice as wide inside. Options as :func:`wide_resnet`'s."""
    return wide_resnet(50, **({"width": 2} | options))


def wide_resnet101_2(**options) -> ResNet:
    """ResNet-101, twice as wide inside. Options as :func:`wide_resnet`'s."""
    return wide_resnet(101, **({"width": 2} | options))


def cifar_wide_resnet28_10(**options) -> PreActResNet:
    """WRN-28-10. Options as :func:`cifar_wide_resnet`'s."""
    return cifar_wide_resnet(28, **({"width": 10} | options))


def cifar_wide_resnet40_4(**options) -> PreActResNet:
    """WRN-40-4. Options as :func:`cifar_wide_resnet`'s."""
    return cifar_wide_resnet(40, **({"width": 4} | options))


_FIXED = ("block", "layers", "depth")
for _build in (wide_resnet50_2, wide_resnet101_2):
    register(_build.__name__, _build, wide_resnet, ResNet, fixed=(*_FIXED, "width_per_group"))
for _build in (cifar_wide_resnet28_10, cifar_wide_resnet40_4):
    register(_build.__name__, _build, cifar_wide_resnet, PreActResNet, fixed=(*_FIXED, "widths"))
