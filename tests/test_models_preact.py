"""ResNet v2 and Wide ResNets: timm's and torchvision's networks, and blocks written out."""

import re

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls
from families import assert_same_network, count, fill, trace
from torch import nn

import fastres
from fastres import compat
from fastres.models import PreActBlock, PreActBottleneck, PreActResNet


@pytest.fixture
def timm():
    return compat.import_timm()


def from_timm(name: str) -> str:
    """timm's names as ours."""
    for pattern, ours in [
        (r"^stem\.conv\.", "conv1."), (r"^norm\.", "bn."), (r"^head\.fc\.", "fc."),
        (r"downsample\.conv\.", "downsample."), (r"\.norm(\d)", r".bn\1"),
    ]:  # fmt: skip
        name = re.sub(pattern, ours, name)
    return re.sub(r"^stages\.(\d)\.blocks\.", lambda stage: f"layer{int(stage[1]) + 1}.", name)


def with_linear_head(model):
    """timm's classifier is a 1x1 convolution; the same numbers as a linear layer."""
    convolution = model.head.fc
    linear = nn.Linear(convolution.in_channels, convolution.out_channels)
    model.head.fc = nn.Identity()
    model.head.flatten = nn.Sequential(nn.Flatten(), linear)
    return model


@pytest.mark.parametrize("name, parameters", [
    ("resnetv2_50", 25_549_352), ("resnetv2_101", 44_541_480), ("resnetv2_152", 60_185_128),
])  # fmt: skip
def test_parameters_are_timms(timm, name, parameters):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), fastres.models.create(name)
    shapes = {from_timm(k): v.shape for k, v in theirs.state_dict().items()}
    shapes["fc.weight"] = shapes["fc.weight"][:2]
    assert shapes == {k: v.shape for k, v in ours.state_dict().items()}
    assert count(name) == parameters


def test_it_is_timms_network(one_thread, timm):
    theirs = with_linear_head(timm.create_model("resnetv2_50", num_classes=5))
    ours = fastres.models.create("resnetv2_50", num_classes=5)

    def rename(name):
        return from_timm(name.replace("head.flatten.1.", "head.fc."))

    assert_same_network(ours, theirs, torch.randn(3, 3, 45, 37), rename)


class EagerBlock(nn.Module):
    """``x + conv(relu(bn(...)))`` from the paper's figure 4 (e), in PyTorch's own calls."""

    def __init__(self, convolutions, inplanes, planes, stride, kind):
        super().__init__()
        last = inplanes
        for index, (width, kernel, step) in enumerate(convolutions):
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(last))
            conv = nn.Conv2d(last, width, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{index + 1}", conv)
            last = width
        self.number, self.kind, self.stride, self.missing = index + 1, kind, stride, last - inplanes
        if kind == "C" or (kind == "B" and (stride != 1 or inplanes != last)):
            self.downsample = nn.Conv2d(inplanes, last, 1, stride, bias=False)

    def forward(self, x):
        out, first = x, None
        for index in range(1, self.number + 1):
            out = F.relu(getattr(self, f"bn{index}")(out))
            first = out if first is None else first
            out = getattr(self, f"conv{index}")(out)
        if hasattr(self, "downsample"):
            return out + self.downsample(first)
        x = x[:, :, :: self.stride, :: self.stride]
        zeros = x.new_zeros(x.shape[0], self.missing, *x.shape[2:])
        before, behind = zeros.tensor_split((self.missing // 2,), 1)
        return out + torch.cat((before, x, behind), 1)


class EagerV2(nn.Module):
    def __init__(self, bottleneck, blocks, widths, kind, stem=None):
        super().__init__()
        inplanes = stem or widths[0]
        self.conv1 = nn.Conv2d(3, inplanes, 3, padding=1, bias=False)
        for index, planes in enumerate(widths):
            stage = []
            for block in range(blocks):
                stride = 2 if index and not block else 1
                plan = [(planes, 1, 1), (planes, 3, stride), (4 * planes, 1, 1)]
                plan = plan if bottleneck else [(planes, 3, stride), (planes, 3, 1)]
                stage.append(EagerBlock(plan, inplanes, planes, stride, kind))
                inplanes = plan[-1][0]
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.bn, self.fc = nn.BatchNorm2d(inplanes), nn.Linear(inplanes, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["A", "B", "C"])
@pytest.mark.parametrize("block", [PreActBlock, PreActBottleneck])
def test_blocks_are_the_papers(one_thread, kind, block):
    options = {"num_classes": 10, "stem": "cifar", "widths": (4, 6, 9), "shortcut": kind}
    ours = PreActResNet(block, [2, 2, 2], **options)
    theirs = EagerV2(block is PreActBottleneck, 2, (4, 6, 9), kind)
    assert_same_network(ours, theirs, torch.randn(3, 3, 13, 11))


def test_a_small_wide_resnet(one_thread):
    ours = fastres.models.cifar_wide_resnet(10, 2)
    assert_same_network(ours, EagerV2(False, 1, (32, 64, 128), "B", 16), torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("name, parameters", {
    "cifar_resnetv2_110": 1_730_522,  # 1.7, 1.7 and 10.2 million: tables 2 and 4 of the paper
    "cifar_resnetv2_164": 1_703_258,
    "cifar_resnetv2_1001": 10_327_706,
    "cifar_wide_resnet28_10": 36_479_194,  # 36.5 and 8.9 million: table 4 of Wide ResNets
    "cifar_wide_resnet40_4": 8_949_210,
}.items())  # fmt: skip
def test_parameters_of_the_papers(name, parameters):
    assert count(name) == parameters


def test_shapes():
    assert trace("cifar_resnetv2_164", 32) == [(16, 32), (64, 32), (128, 16), (256, 8), (10,)]
    wide = [(16, 32), (160, 32), (320, 16), (640, 8), (10,)]
    assert trace("cifar_wide_resnet28_10", 32) == wide
    stages = [(256, 56), (512, 28), (1024, 14), (2048, 7), (1000,)]
    assert trace("resnetv2_50", 224) == [(64, 112), *stages]


def test_every_batch_norm_is_fused(one_thread):
    model = fill(fastres.models.create("cifar_resnetv2_11").eval())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), Calls() as calls:
        model(x)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    block = ["bn_relu", "conv_bn_relu", "conv_bn_relu"]
    bare = ["conv_bn_relu"]  # a convolution that no batch norm follows
    ends = ["bn_relu", "mean_linear"]
    assert calls.names == [*bare, *(block + bare * 2) * 3, *ends] and norms == 10


def test_dropout_between_the_convolutions(one_thread):
    ours = fastres.models.cifar_wide_resnet(10, 1, dropout=0.3)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(ours(x), ours(x))
        ours.eval()
        assert torch.equal(ours(x), ours(x))
    drops = [module for module in ours.modules() if isinstance(module, nn.Dropout)]
    assert [drop.p for drop in drops] == [0.3] * 3
