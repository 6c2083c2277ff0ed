"""Residual networks of stages, and the ResNets for ImageNet.

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", table 1. The state_dict of
:func:`resnet18` to :func:`resnet152` is that of ``torchvision.models.resnet``.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .. import heads, stems
from ..memory_format import fastest
from ..nn import BasicBlock, Bottleneck
from .common import initialise, stem_convolution, stem_pooling
from .registry import register
from .shortcuts import make_shortcut


class ResNet(nn.Module):
    """A residual network: (N, in_channels, H, W) images to (N, num_classes) logits.

    Arguments and parameter names are torchvision's up to ``norm_layer``; the others are

    Args:
        block, layers: the kind of block, and the number of blocks of each stage.
        in_channels: the channels of the images.
        stem: ``"imagenet"``, a 7x7 convolution at stride 2 and a pooling, or ``"cifar"``, a 3x3
            convolution at stride 1.
        widths: planes of each stage's blocks; the stem has the first. Every stage but the first
            halves the map.
        shortcut: one of :data:`fastres.models.SHORTCUTS`; He et al. 2015, section 4.1.
        stride_on: which convolution of a bottleneck has the stride: ``"3x3"`` (v1.5, torchvision's)
            or ``"1x1"`` (v1, the paper's).
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: Sequence[int],
        num_classes: int = 1000, zero_init_residual: bool = False, groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None, *,
        in_channels: int = 3, stem: str = "imagenet",
        widths: Sequence[int] = (64, 128, 256, 512), shortcut: str = "B", stride_on: str = "3x3",
    ):  # fmt: skip
        super().__init__()
        if len(layers) != len(widths):
            raise ValueError(f"widths: expected {len(layers)}, one a stage, got {len(widths)}")
        dilated = tuple(replace_stride_with_dilation or (False,) * (len(widths) - 1))
        if len(dilated) != len(widths) - 1:
            raise ValueError(
                f"replace_stride_with_dilation: expected None or {len(widths) - 1} values, "
                f"got {len(dilated)}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._shortcut = shortcut
        self._block_options = {"groups": groups, "base_width": width_per_group}
        if issubclass(block, Bottleneck):
            self._block_options["stride_on"] = stride_on
        elif stride_on != "3x3":
            raise ValueError(f"stride_on: {block.__name__} has no 1x1 convolution")
        self.inplanes, self.dilation = widths[0], 1
        self.conv1 = stem_convolution(stem, in_channels, self.inplanes)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = stem_pooling(stem)
        for index, (planes, blocks, dilate) in enumerate(
            zip(widths, layers, (False, *dilated), strict=True)
        ):
            stage = self._make_layer(block, planes, blocks, 2 if index else 1, dilate)
            self.add_module(f"layer{index + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self.stages = ("conv1", *(f"layer{index + 1}" for index in range(len(layers))), "fc")
        initialise(self, zero_init_residual)

    def _make_layer(self, block, planes: int, blocks: int, stride: int = 1, dilate: bool = False):
        previous_dilation = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        width = planes * block.expansion
        stage = []
        for index in range(blocks):
            stride = 1 if index else stride
            stage.append(block(
                self.inplanes, planes, stride,
                make_shortcut(self._shortcut, self.inplanes, width, stride, self._norm_layer),
                dilation=self.dilation if index else previous_dilation,
                norm_layer=self._norm_layer, **self._block_options,
            ))  # fmt: skip
            self.inplanes = width
        return nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        x = stems.conv_bn_act_pool(fastest(x), self.conv1, self.bn1, self.relu, self.maxpool)
        for stage in self.stages[1:-1]:
            x = self._modules[stage](x)
        return heads.classify(x, self.avgpool, self.fc)


def resnet18(**options) -> ResNet:
    """ResNet-18: basic blocks [2, 2, 2, 2]. Options as :class:`ResNet`."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **options)


def resnet34(**options) -> ResNet:
    """ResNet-34: basic blocks [3, 4, 6, 3]. Options as :class:`ResNet`."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **options)


def resnet50(**options) -> ResNet:
    """ResNet-50: bottlenecks [3, 4, 6, 3]. Options as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **options)


def resnet101(**options) -> ResNet:
    """ResNet-101: bottlenecks [3, 4, 23, 3]. Options as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **options)


def resnet152(**options) -> ResNet:
    """ResNet-152: bottlenecks [3, 8, 36, 3]. Options as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **options)


for _build in (resnet18, resnet34, resnet50, resnet101, resnet152):
    register(_build.__name__, _build, ResNet, fixed=("block", "layers"))
