"""Plain networks: the residual ones without their shortcuts, for comparison.

He et al. 2015, sections 3.3 and 4.1: the counterparts in the studies of degradation.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..branches import Link, run_links
from ..nn import conv3x3
from ..residual import Residual
from .cifar import DEPTHS, cifar_resnet
from .registry import register, register_depths
from .resnet import ResNet


class PlainBlock(Residual):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))))``: a basic block without the addition.

    Names as :class:`fastres.nn.BasicBlock`. Without its branch nothing is left but the input.
    """

    expansion: int = 1
    has_shortcut = False

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: None = None,
        groups: int = 1, base_width: int = 64, dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"groups, base_width: PlainBlock expects 1 and 64, got {groups} and {base_width}"
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=dilation)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.keeps_shape = stride == 1 and inplanes == planes

    def combine(self, x: Tensor, skipped: Tensor, scale: float = 1.0) -> Tensor:
        if scale != 1.0:
            raise ValueError("a plain block has no shortcut that would carry on without the branch")
        links = (Link(self.conv1, self.bn1, self.relu), Link(self.conv2, self.bn2, self.relu))
        return run_links(x, links)

    def without_branch(self, x: Tensor) -> Tensor:
        if not self.keeps_shape:
            raise ValueError("a plain block that changes the shape cannot be left out")
        return x


def plain18(**options) -> ResNet:
    """ResNet-18 without shortcuts. Options as :class:`ResNet`."""
    return _plain([2, 2, 2, 2], **options)


def plain34(**options) -> ResNet:
    """ResNet-34 without shortcuts. Options as :class:`ResNet`."""
    return _plain([3, 4, 6, 3], **options)


def cifar_plain(depth: int = 20, **options) -> ResNet:
    """The CIFAR ResNet of 6n+2 layers without shortcuts. Options as :class:`ResNet`."""
    return cifar_resnet(depth, block=PlainBlock, shortcut="none", **options)


def _plain(layers: list[int], **options) -> ResNet:
    return ResNet(PlainBlock, layers, shortcut="none", **options)


_FIXED = ("block", "layers", "depth", "shortcut", "stride_on", "zero_init_residual")
for _build in (plain18, plain34):
    register(_build.__name__, _build, ResNet, fixed=_FIXED)
register_depths("cifar_plain", cifar_plain, DEPTHS[:-1], ResNet, fixed=_FIXED)
