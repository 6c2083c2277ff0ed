"""Shortcuts of residual blocks: what stands beside the branch.

``"A"``, ``"B"``, ``"C"`` are those of He et al. 2015, section 4.1 (option C is also the 1x1
convolution of 2016b); the others are the variants of He et al. 2016b, "Identity Mappings in Deep
Residual Networks", table 1 and figure 2, and stand where the shapes agree. Where shapes differ,
``"B"`` and ``"C"`` project, all others pad with zeros.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory_format import has_channels_last_strides
from ..nn import conv1x1
from ..residual import Weighing
from .common import check_choice


class PaddedIdentity(nn.Module):
    """Option A: every ``stride``-th pixel between channels of zeros, as many before as behind, which
    is what published weights were trained with; it has no parameters."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        if planes < inplanes:
            raise ValueError(f"planes: expected at least {inplanes} (padding), got {planes}")
        self.stride, self.before = stride, (planes - inplanes) // 2
        self.behind = planes - inplanes - self.before

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[:, :, :: self.stride, :: self.stride]
        if has_channels_last_strides(x):  # which padding does not see in such a slice
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return F.pad(pixels, (0, 0, 0, 0, self.before, self.behind))


class ConstantScaling(Weighing):
    """``shortcut * x``, and the branch times ``branch``."""

    def __init__(self, shortcut: float = 0.5, branch: float = 0.5):
        super().__init__()
        self.shortcut, self.branch = shortcut, branch

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.shortcut * x, self.branch


class Gate(Weighing):
    """``(1 - g(x)) * x`` beside ``g(x) * branch``, g being a sigmoid behind a 1x1 convolution.

    ``exclusive=False`` gates the shortcut only. ``bias`` is what the convolution's starts from; the
    paper finds -6 best.
    """

    def __init__(self, planes: int, exclusive: bool = True, bias: float = -6.0):
        super().__init__()
        self.conv = nn.Conv2d(planes, planes, 1)
        nn.init.constant_(self.conv.bias, bias)
        self.exclusive = exclusive

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        gate = torch.sigmoid(self.conv(x))
        return (1 - gate) * x, gate if self.exclusive else 1.0


def projection(inplanes, planes, stride, norm_layer) -> nn.Sequential:
    return nn.Sequential(conv1x1(inplanes, planes, stride), norm_layer(planes))


# what stands where the shapes agree; None is the identity
_WHERE_SHAPES_AGREE: dict[str, Callable[[int, Callable], nn.Module | None]] = {
    "A": lambda planes, norm_layer: None,
    "B": lambda planes, norm_layer: None,
    "C": lambda planes, norm_layer: projection(planes, planes, 1, norm_layer),
    "scaling": lambda planes, norm_layer: ConstantScaling(),
    "exclusive_gating": lambda planes, norm_layer: Gate(planes),
    "shortcut_gating": lambda planes, norm_layer: Gate(planes, exclusive=False),
    "dropout": lambda planes, norm_layer: nn.Dropout(0.5),
    "none": lambda planes, norm_layer: None,
}
SHORTCUTS = tuple(_WHERE_SHAPES_AGREE)


def make_shortcut(
    kind: str, inplanes: int, planes: int, stride: int, norm_layer: Callable
) -> nn.Module | None:
    """The shortcut of a block from ``inplanes`` to ``planes`` channels; None is the identity."""
    check_choice("shortcut", kind, SHORTCUTS)
    if stride == 1 and inplanes == planes:
        return _WHERE_SHAPES_AGREE[kind](planes, norm_layer)
    if kind == "none":
        return None
    if kind in ("B", "C"):
        return projection(inplanes, planes, stride, norm_layer)
    return PaddedIdentity(inplanes, planes, stride)
