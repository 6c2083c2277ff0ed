"""The small ResNet-18 that textbooks build by hand, for images of one channel.

Its residual block has biased convolutions and a bare 1x1 convolution as its projection.
"""

from torch import Tensor, nn

from .. import heads, stems
from ..memory_format import fastest
from ..residual import Residual, block, end_without_branch
from .registry import register


class TeachingBlock(Residual):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + x)``, or ``conv3(x)`` with ``use_1x1conv``.

    ``strides`` are those of ``conv1`` and ``conv3``.
    """

    def __init__(
        self, in_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ):
        super().__init__()
        if not use_1x1conv and (strides != 1 or in_channels != num_channels):
            raise ValueError(
                f"use_1x1conv: expected True from {in_channels} to {num_channels} channels with "
                f"strides {strides}, got False"
            )
        self.conv1 = nn.Conv2d(in_channels, num_channels, 3, strides, 1)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, 1, 1)
        self.conv3 = nn.Conv2d(in_channels, num_channels, 1, strides) if use_1x1conv else None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)
        self.relu = nn.ReLU(inplace=True)

    def combine(self, x: Tensor, skipped: Tensor, scale: float = 1.0) -> Tensor:
        pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        return block(x, pairs, self.relu, self.conv3, skipped, scale)

    def without_branch(self, x: Tensor) -> Tensor:
        return end_without_branch(self.relu, self.conv3, x)


class TeachingResNet(nn.Module):
    """ResNet-18: (N, in_channels, H, W) images to (N, num_classes) logits.

    Stages ``b1`` (7x7 convolution, batch norm, ReLU, pooling) and ``b2`` to ``b5`` (two residual
    blocks each), then a mean over the map and ``fc``.
    """

    stages = ("b1", "b2", "b3", "b4", "b5", "fc")

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__()
        self.b1 = Stem(in_channels, 64)
        self.b2 = nn.Sequential(TeachingBlock(64, 64), TeachingBlock(64, 64))
        for index, channels in enumerate((128, 256, 512)):
            first = TeachingBlock(channels // 2, channels, use_1x1conv=True, strides=2)
            second = TeachingBlock(channels, channels)
            self.add_module(f"b{index + 3}", nn.Sequential(first, second))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = fastest(x)
        for stage in self.stages[:-1]:
            x = self._modules[stage](x)
        return heads.classify(x, self.avgpool, self.fc)


class Stem(nn.Module):
    """``maxpool(relu(bn(conv(x))))``: a quarter of the map's height and width."""

    def __init__(self, in_channels: int, num_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_channels, 7, 2, 3)
        self.bn = nn.BatchNorm2d(num_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return stems.conv_bn_act_pool(x, self.conv, self.bn, self.relu, self.maxpool)


def teaching_resnet18(**options) -> TeachingResNet:
    """The textbooks' ResNet-18. Options as :class:`TeachingResNet`'s."""
    return TeachingResNet(**options)


register("teaching_resnet18", teaching_resnet18, TeachingResNet)
