"""ResNet v2: batch norm and ReLU come before each convolution, and shortcuts are left untouched.

He, Zhang, Ren, Sun 2016, "Identity Mappings in Deep Residual Networks", sections 3 and 4. Every
batch norm is fused with its ReLU, and in inference with the convolution before it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import heads, sites
from ..branches import Link, run_links
from ..memory_format import fastest
from ..nn import conv1x1, conv3x3
from ..residual import Residual
from .common import blocks_of_depth, check_choice, initialise, stem_convolution, stem_pooling
from .registry import register_depths
from .shortcuts import PaddedIdentity

SHORTCUTS = ("A", "B", "C")


def _shortcut(kind: str, inplanes: int, planes: int, stride: int) -> nn.Module | None:
    check_choice("shortcut", kind, SHORTCUTS)
    agree = stride == 1 and inplanes == planes
    if agree and kind != "C":
        return None
    return (
        PaddedIdentity(inplanes, planes, stride)
        if kind == "A"
        else conv1x1(inplanes, planes, stride)
    )


class PreActivation(Residual):
    """``conv(... relu(bn2(conv1(relu(bn1(x)))))) + shortcut``: what both kinds of v2 block share.

    A projection sees ``relu(bn1(x))``, an identity (padded or not) ``x`` itself.
    """

    def combine(self, x: Tensor, skipped: Tensor, scale: float = 1.0) -> Tensor:
        if skipped is x and isinstance(self.downsample, nn.Conv2d):
            active = sites.bn_act(x, self.bn1, self.relu)
            branch = self.branch(active)
            return torch.add(sites.convolve(active, self.downsample), branch, alpha=scale)
        branch = self.branch(x, Link(None, self.bn1, self.relu))
        return torch.add(self.without_branch(skipped), branch, alpha=scale)

    def without_branch(self, x: Tensor) -> Tensor:
        if isinstance(self.downsample, nn.Conv2d):
            return sites.convolve(sites.bn_act(x, self.bn1, self.relu), self.downsample)
        return x if self.downsample is None else self.downsample(x)

    def branch(self, x: Tensor, *first: Link) -> Tensor:
        """The convolutions, from ``relu(bn1(x))`` on; where that is ``first``, from ``x``."""
        raise NotImplementedError


class PreActBlock(PreActivation):
    """Two 3x3 convolutions; with ``dropout`` between them (Zagoruyko & Komodakis 2016)."""

    expansion: int = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        norm_layer: Callable[..., nn.Module] | None = None, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def branch(self, x: Tensor, *first: Link) -> Tensor:
        links = (*first, Link(self.conv1, self.bn2, self.relu))
        if self.dropout is None:
            return run_links(x, (*links, Link(self.conv2, None)))
        return sites.convolve(self.dropout(run_links(x, links)), self.conv2)


class PreActBottleneck(PreActivation):
    """1x1 reduce, 3x3 with the stride, 1x1 expand by 4."""

    expansion: int = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def branch(self, x: Tensor, *first: Link) -> Tensor:
        links = (
            Link(self.conv1, self.bn2, self.relu), Link(self.conv2, self.bn3, self.relu),
            Link(self.conv3, None),
        )  # fmt: skip
        return run_links(x, (*first, *links))


class PreActResNet(nn.Module):
    """A residual network v2: (N, in_channels, H, W) images to (N, num_classes) logits.

    Args:
        block, layers: the kind of block, and the number of blocks of each stage.
        num_classes, in_channels, stem, widths, norm_layer: as :class:`fastres.models.ResNet`.
        stem_width: channels behind the first convolution (default: the first of ``widths``).
        shortcut: ``"A"``, ``"B"`` or ``"C"``; projections are bare 1x1 convolutions.
        dropout: probability of zeroing between the convolutions of a :class:`PreActBlock`.
    """

    def __init__(
        self, block: type[PreActBlock | PreActBottleneck], layers: Sequence[int],
        num_classes: int = 1000, *, in_channels: int = 3, stem: str = "imagenet",
        widths: Sequence[int] = (64, 128, 256, 512), stem_width: int | None = None,
        shortcut: str = "B", dropout: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        if len(layers) != len(widths):
            raise ValueError(f"widths: expected {len(layers)}, one a stage, got {len(widths)}")
        norm_layer = norm_layer or nn.BatchNorm2d
        options = {"norm_layer": norm_layer}
        if issubclass(block, PreActBlock):
            options["dropout"] = dropout
        elif dropout:
            raise ValueError(f"dropout: {block.__name__} has none, got {dropout}")
        inplanes = stem_width or widths[0]
        self.conv1 = stem_convolution(stem, in_channels, inplanes)
        self.maxpool = stem_pooling(stem)
        self.stages = ("conv1", *(f"layer{index + 1}" for index in range(len(layers))), "fc")
        for index, (planes, blocks) in enumerate(zip(widths, layers, strict=True)):
            stage = []
            for number in range(blocks):
                width, stride = planes * block.expansion, 2 if index and not number else 1
                downsample = _shortcut(shortcut, inplanes, width, stride)
                stage.append(block(inplanes, planes, stride, downsample, **options))
                inplanes = width
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
        self.bn = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = sites.convolve(fastest(x), self.conv1)
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in self.stages[1:-1]:
            x = self._modules[stage](x)
        x = sites.bn_act(x, self.bn, self.relu)
        return heads.classify(x, self.avgpool, self.fc)


_LAYERS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
_CIFAR = {"num_classes": 10, "stem": "cifar", "widths": (16, 32, 64)}


def resnetv2(depth: int = 50, **options) -> PreActResNet:
    """ResNet v2 for ImageNet, of 50, 101 or 152 layers. Options as :class:`PreActResNet`'s."""
    check_choice("depth", depth, _LAYERS)
    return PreActResNet(PreActBottleneck, _LAYERS[depth], **options)


def cifar_resnetv2(depth: int = 164, **options) -> PreActResNet:
    """ResNet v2 for CIFAR: basic blocks for 110 layers, and for others of 6n+2 that are not 9n+2;
    bottlenecks for 164, 1001 and others of 9n+2. Options as :class:`PreActResNet`'s."""
    bottleneck = isinstance(depth, int) and depth != 110 and (depth - 2) % 9 == 0
    block, layers = (PreActBottleneck, 3) if bottleneck else (PreActBlock, 2)
    return PreActResNet(block, [blocks_of_depth(depth, layers)] * 3, **(_CIFAR | options))


_FIXED = ("block", "layers", "depth")
register_depths("resnetv2_", resnetv2, _LAYERS, PreActResNet, fixed=_FIXED)
register_depths("cifar_resnetv2_", cifar_resnetv2, (110, 164, 1001), PreActResNet, fixed=_FIXED)
