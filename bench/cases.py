"""What is measured: the operators, blocks and models of ResNet-50 on 224x224 images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastres

DTYPES = (torch.float32, torch.bfloat16)
MODES = ("eval", "train")
FASTRES = ("fastres-cpu", "fastres-triton", "fastres-cuda")
OPERATOR_PROVIDERS = ("eager", "compile", *FASTRES)
# in eval, with weights to fold: the faster form of torch.compile
EVAL_PROVIDERS = ("eager", "compile-freezing", *FASTRES)
# planes and map size of the four stages of ResNet-50 (He et al. 2015, table 1)
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))


@dataclass(frozen=True)
class Case:
    """One thing to measure, under every provider.

    Attributes:
        name: unique in its file; what ``-k`` selects by.
        build: makes the eager module (float32) and its inputs (float32, contiguous).
        fused: from a copy of that module to the call that fastres serves.
        dtype: of inputs and, in eval, of the module. In training the parameters stay float32.
        autocast: training runs under autocast to ``dtype``, from float32 inputs.
        model: a whole model: fastres is measured in each of the user's memory formats, training is
            an SGD step instead of forward and backward.
        traffic: elements that must move between memory and the processor at least; None leaves the
            case out of the roofline.
        threads: how many the case runs on; None for PyTorch's choice.
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    providers: tuple[str, ...]
    fused: Callable[[nn.Module], Callable] = fastres.convert
    dtype: torch.dtype = torch.float32
    train: bool = False
    autocast: bool = False
    model: bool = False
    traffic: int | None = None
    threads: int | None = None


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def variants() -> Iterator[tuple[torch.dtype, str]]:
    """Every dtype in eval and training."""
    return ((dtype, mode) for dtype in DTYPES for mode in MODES)


# --- operators -----------------------------------------------------------------------------------


class Operator(nn.Module):
    """An operator in eager PyTorch and, once ``on_fastres``, fused: the same calls around both."""

    fused = False

    @property
    def library(self):
        return fastres.functional if self.fused else fastres.reference


class AddReLU(Operator):
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self.library.add_relu(input, residual)


class BNReLU(Operator):
    def __init__(self, channels: int):
        super().__init__()
        self.bn = randomise(nn.BatchNorm2d(channels))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        arguments = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)
        if residual is None:
            return self.library.bn_relu(input, *arguments)
        return self.library.bn_add_relu(input, residual, *arguments)


class ConvBNReLU(Operator):
    """Convolution, batch norm, the residual if one is given, ReLU if wanted."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.bn = randomise(nn.BatchNorm2d(cout))
        self.relu = relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn, library = self.conv, self.bn, self.library
        arguments = (
            conv.weight, None, conv.stride, conv.padding, 1, 1,
            bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training,
        )  # fmt: skip
        if residual is not None:
            return library.conv_bn_add_relu(input, residual, *arguments)
        return (library.conv_bn_relu if self.relu else library.conv_bn)(input, *arguments)


def on_fastres(module: Operator) -> Operator:
    module.fused = True
    return module


def randomise(module: nn.Module) -> nn.Module:
    """Give every batch norm statistics, scale and shift that a wrong formula could not survive."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.3)
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
    return module


def maps(*shape: int, count: int = 1) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for _ in range(count))


# --- ResNet-50's shapes --------------------------------------------------------------------------


class Convolution(NamedTuple):
    """A convolution of ResNet-50 and what follows its batch norm."""

    cin: int
    cout: int
    kernel: int
    stride: int
    size: int
    residual: bool = False
    relu: bool = True

    @property
    def name(self) -> str:
        tail = "-add" if self.residual else ("" if self.relu else "-norelu")
        stride = f"s{self.stride}" if self.stride > 1 else ""
        return f"{self.cin}to{self.cout}-{self.kernel}x{self.kernel}{stride}-{self.size}px{tail}"


def convolutions() -> list[Convolution]:
    """The 24 distinct (shape, epilogue) pairs of ResNet-50, in the network's order."""
    found = [Convolution(3, 64, 7, 2, 224)]
    for planes, size in STAGES:
        stride = 1 if planes == 64 else 2
        cin = 64 if planes == 64 else planes * 2
        found += [
            Convolution(cin, planes, 1, 1, size * stride),
            Convolution(planes, planes, 3, stride, size * stride),
            Convolution(planes, planes * 4, 1, 1, size, residual=True),
            Convolution(cin, planes * 4, 1, stride, size * stride, relu=False),
            Convolution(planes * 4, planes, 1, 1, size),
            Convolution(planes, planes, 3, 1, size),
        ]
    return list(dict.fromkeys(found))


def normalised_maps() -> list[tuple[int, int]]:
    """Channels and size of the maps that go through batch norm and ReLU without a residual.

    Left out are the maps in front of a strided 3x3 convolution: twice the size, once a stage.
    """
    return [(64, 112), *STAGES]


def block_outputs() -> list[tuple[int, int]]:
    """Channels and size of the maps to which a residual is added."""
    return [(planes * 4, size) for planes, size in STAGES]
