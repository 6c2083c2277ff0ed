"""Drop-in modules on the fused operators.

``BasicBlock`` and ``Bottleneck`` take torchvision's arguments and have its parameter names, so
checkpoints load both ways.
"""

from collections.abc import Callable

from torch import Tensor, nn

from . import sites
from .arguments import pair
from .residual import Residual, block, end_without_branch


class ConvBNReLU(nn.Module):
    """``relu(bn(conv(input)))``, and with ``residual``: ``relu(bn(conv(input)) + residual)``.

    Arguments are those of ``nn.Conv2d``, except that ``padding`` defaults to what keeps the map's
    size at stride 1 and ``bias`` to False; ``relu=False`` leaves the ReLU out (a projection).
    Sub-modules: ``conv`` and ``bn``. Shapes: (N, C, H, W) to (N, K, P, Q).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size=3, stride=1,
        padding=None, dilation=1, groups: int = 1, bias: bool = False,
        relu: bool = True, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):  # fmt: skip
        super().__init__()
        if padding is None:
            extents = zip(pair("kernel_size", kernel_size), pair("dilation", dilation), strict=True)
            padding = tuple(d * (k - 1) // 2 for k, d in extents)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.bn = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return sites.conv_bn_act(input, self.conv, self.bn, self.relu, residual)


class BNReLU(nn.Module):
    """``relu(bn(input))``, and with ``residual``: ``relu(bn(input) + residual)``.

    Arguments are those of ``nn.BatchNorm2d``; the sub-module is ``bn``.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return sites.bn_act(input, self.bn, self.relu, residual)


class AddReLU(nn.Module):
    """``relu(input + residual)``."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return sites.add_act(input, residual, self.relu)


def conv3x3(in_planes: int, out_planes: int, stride=1, groups=1, dilation=1) -> nn.Conv2d:
    """3x3 convolution with padding, no bias."""
    return nn.Conv2d(
        in_planes, out_planes, 3, stride, padding=dilation, dilation=dilation, groups=groups,
        bias=False,
    )  # fmt: skip


def conv1x1(in_planes: int, out_planes: int, stride=1) -> nn.Conv2d:
    """1x1 convolution, no bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(Residual):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`` with 3x3 convolutions.

    Arguments and names as ``torchvision.models.resnet.BasicBlock``. He et al. 2015, figure 2.
    """

    expansion: int = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        groups: int = 1, base_width: int = 64, dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                "groups, base_width: BasicBlock expects 1 and 64, got "
                f"{groups} and {base_width} (Bottleneck takes others)"
            )
        if dilation > 1:
            raise ValueError(f"dilation: BasicBlock expects 1, got {dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def combine(self, x: Tensor, skipped: Tensor, scale: float = 1.0) -> Tensor:
        pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        return block(x, pairs, self.relu, self.downsample, skipped, scale)

    def without_branch(self, x: Tensor) -> Tensor:
        return end_without_branch(self.relu, self.downsample, x)


class Bottleneck(Residual):
    """1x1 reduce, 3x3, 1x1 expand by 4, plus the shortcut.

    Arguments and names as ``torchvision.models.resnet.Bottleneck``. He et al. 2015, figure 5;
    ``groups`` and ``base_width`` make it a ResNeXt or Wide ResNet block. The stride is on the 3x3
    convolution ("v1.5"), or as in the paper on the first 1x1 with ``stride_on="1x1"`` ("v1").
    """

    expansion: int = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        groups: int = 1, base_width: int = 64, dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None, stride_on: str = "3x3",
    ):  # fmt: skip
        super().__init__()
        if stride_on not in ("1x1", "3x3"):
            raise ValueError(f"stride_on: expected '1x1' or '3x3', got {stride_on!r}")
        strides = (stride, 1) if stride_on == "1x1" else (1, stride)
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width, strides[0])
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, strides[1], groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def combine(self, x: Tensor, skipped: Tensor, scale: float = 1.0) -> Tensor:
        pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        return block(x, pairs, self.relu, self.downsample, skipped, scale)

    def without_branch(self, x: Tensor) -> Tensor:
        return end_without_branch(self.relu, self.downsample, x)
