"""DenseNet: every layer sees the concatenation of all before it.

Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks", table 1
(the BC form). Names as ``torchvision.models.densenet``, but two things are done another way. A
block's layers write their channels into one buffer and read the first of it, instead of copying, and
in training keeping, all of them once a layer. (Where PyTorch's own batch norm serves, which is slower
on a part of the channels, they are concatenated.) A transition pools before its 1x1 convolution, which
commutes with it and has a quarter of the work then.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import heads, sites
from ..backend import serving
from ..memory_format import fastest
from .common import check_choice, stem_convolution, stem_pooling
from .registry import register_depths


class DenseLayer(nn.Module):
    """``conv2(relu(norm2(conv1(relu(norm1(x))))))``: ``growth_rate`` new channels, through a 1x1
    convolution to ``bn_size * growth_rate`` and a 3x3 one."""

    def __init__(self, inplanes: int, growth_rate: int, bn_size: int, drop_rate: float):
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(inplanes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        out = sites.bn_act(x, self.norm1, self.relu1)
        out = sites.convolve(sites.conv_bn_act(out, self.conv1, self.norm2, self.relu2), self.conv2)
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate else out


class DenseBlock(nn.ModuleDict):
    """Layers ``denselayer1``, ``denselayer2``, ...: (N, C, H, W) to (N, C + layers * growth, H, W)."""

    def __init__(
        self, layers: int, inplanes: int, growth_rate: int, bn_size: int, drop_rate: float
    ):
        super().__init__()
        self.growth_rate = growth_rate
        for index in range(layers):
            layer = DenseLayer(inplanes + index * growth_rate, growth_rate, bn_size, drop_rate)
            self[f"denselayer{index + 1}"] = layer

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or serving("bn_relu", x.device) == "eager":
            for layer in self.values():
                x = torch.cat((x, layer(x)), 1)
            return x
        buffer = self._buffer(x)
        x = _append(buffer, None, x)
        for layer in self.values():
            x = _append(buffer, x, layer(x))
        return x

    def _buffer(self, x: Tensor) -> Tensor:
        """Room for the block's output, in the memory format of its input ``x``."""
        n, channels, height, width = x.shape
        size = (n, channels + len(self) * self.growth_rate, height, width)
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def _append(buffer: Tensor, x: Tensor | None, new: Tensor) -> Tensor:
    """``torch.cat((x, new), 1)``, ``x`` being what this returned last for ``buffer``: None at first."""
    if torch.is_grad_enabled():
        return _Append.apply(buffer, x, new)
    start = 0 if x is None else x.size(1)
    end = start + new.size(1)
    buffer[:, start:end] = new
    return buffer[:, :end]


class _Append(torch.autograd.Function):
    """:func:`_append` with its gradients, which are parts of the output's.

    Backward reads ``x`` as it was, and it still is: what is written lies behind it. Autograd, which
    takes any write to a tensor's memory for a change, is not told: ``buffer.data`` and what is made
    of it count their changes apart.
    """

    @staticmethod
    def forward(ctx, buffer: Tensor, x: Tensor | None, new: Tensor) -> Tensor:
        ctx.start = 0 if x is None else x.size(1)
        ctx.dtype = new.dtype
        with torch.no_grad():
            return _append(buffer.data, x, new)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor]:
        old = grad[:, : ctx.start] if ctx.start else None
        return None, old, grad[:, ctx.start :].to(ctx.dtype)


class Transition(nn.Module):
    """``pool(conv(relu(norm(x))))``: half the map and ``planes`` channels."""

    def __init__(self, inplanes: int, planes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return sites.convolve(self.pool(sites.bn_act(x, self.norm, self.relu)), self.conv)


class DenseNet(nn.Module):
    """A DenseNet: (N, in_channels, H, W) images to (N, num_classes) logits.

    Args:
        growth_rate: new channels a layer, k.
        block_config: layers of each dense block; between blocks a transition halves map and channels.
        num_init_features: channels behind the first convolution.
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels.
        drop_rate: dropout behind each layer.
        num_classes, in_channels, stem: as :class:`fastres.models.ResNet`.
    """

    def __init__(
        self, growth_rate: int = 32, block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64, bn_size: int = 4, drop_rate: float = 0.0,
        num_classes: int = 1000, *, in_channels: int = 3, stem: str = "imagenet",
    ):  # fmt: skip
        super().__init__()
        channels = num_init_features
        modules: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=stem_convolution(stem, in_channels, channels),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(inplace=True),
        )
        pooling = stem_pooling(stem)
        if pooling is not None:
            modules["pool0"] = pooling
        for index, layers in enumerate(block_config):
            if index:
                modules[f"transition{index}"] = Transition(channels, channels // 2)
                channels //= 2
            modules[f"denseblock{index + 1}"] = DenseBlock(
                layers, channels, growth_rate, bn_size, drop_rate
            )
            channels += layers * growth_rate
        modules["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(modules)
        self.classifier = nn.Linear(channels, num_classes)
        self.relu = nn.ReLU(inplace=True)
        inner = [name for name in modules if name.startswith(("denseblock", "transition"))]
        self.stages = ("features.conv0", *(f"features.{name}" for name in inner), "classifier")
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features
        x = sites.conv_bn_act(fastest(x), features.conv0, features.norm0, features.relu0)
        for name, module in features.named_children():
            if name not in ("conv0", "norm0", "relu0", "norm5"):
                x = module(x)
        x = sites.bn_act(x, features.norm5, self.relu)
        logits = heads.mean_linear(x, (), self.classifier)
        if logits is not None:
            return logits
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


_CONFIGURATIONS = {
    121: {"growth_rate": 32, "block_config": (6, 12, 24, 16), "num_init_features": 64},
    161: {"growth_rate": 48, "block_config": (6, 12, 36, 24), "num_init_features": 96},
    169: {"growth_rate": 32, "block_config": (6, 12, 32, 32), "num_init_features": 64},
    201: {"growth_rate": 32, "block_config": (6, 12, 48, 32), "num_init_features": 64},
}


def densenet(depth: int = 121, **options) -> DenseNet:
    """DenseNet of 121, 161, 169 or 201 layers. Options as :class:`DenseNet`'s."""
    check_choice("depth", depth, _CONFIGURATIONS)
    return DenseNet(**(_CONFIGURATIONS[depth] | options))


register_depths("densenet", densenet, _CONFIGURATIONS, DenseNet, fixed=("depth",))
