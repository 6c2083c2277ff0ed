"""ResNet v1.5 for ImageNet, state_dict-compatible with ``torchvision.models.resnet``.

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", table 1; the stride of a
bottleneck is on its 3x3 convolution.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import sites
from ..nn import BasicBlock, Bottleneck, conv1x1


class ResNet(nn.Module):
    """A ResNet of four stages: (N, 3, H, W) images to (N, num_classes) logits.

    ``layers`` is the number of blocks a stage. Arguments and parameter names are torchvision's.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: Sequence[int],
        num_classes: int = 1000, zero_init_residual: bool = False, groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        dilated = tuple(replace_stride_with_dilation or (False, False, False))
        if len(dilated) != 3:
            raise ValueError(
                f"replace_stride_with_dilation: expected None or 3 values, got {len(dilated)}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilated[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilated[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilated[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(self, block, planes: int, blocks: int, stride: int = 1, dilate: bool = False):
        previous_dilation = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        width = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != width:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, width, stride), self._norm_layer(width)
            )
        stage = []
        for index in range(blocks):
            first = index == 0
            options = {
                "groups": self.groups,
                "base_width": self.base_width,
                "dilation": previous_dilation if first else self.dilation,
                "norm_layer": self._norm_layer,
            }
            if first:
                options |= {"stride": stride, "downsample": downsample}
            stage.append(block(self.inplanes, planes, **options))
            self.inplanes = width
        return nn.Sequential(*stage)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, "Delving Deep into Rectifiers"
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:  # every block starts as the identity: Goyal et al. 2017, section 5.1
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    nn.init.zeros_(module.bn2.weight)
                elif isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(sites.conv_bn_act(x, self.conv1, self.bn1, self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


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
