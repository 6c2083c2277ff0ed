"""ResNeXt and Wide ResNet: torchvision's networks; three forms of one block; the small net."""

import pytest
import torch
import torch.nn.functional as F
from families import assert_same_network, close, count, fill, trace
from torch import nn

import fastres
from fastres.nn import Bottleneck

TORCHVISION = {
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}


@pytest.mark.parametrize("name, parameters", TORCHVISION.items())
def test_state_dicts_are_torchvisions(torchvision, name, parameters):
    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, name)(), fastres.models.create(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert count(name) == parameters
    assert trace(name, 224) == [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7), (1000,)]


@pytest.mark.parametrize("options", [
    {"groups": 4, "width_per_group": 8}, {"width_per_group": 96}
], ids=["next", "wide"])  # fmt: skip
def test_they_are_torchvisions_networks(one_thread, torchvision, options):
    resnet = torchvision.models.resnet
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=5, **options)
    ours = fastres.models.ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5, **options)
    assert_same_network(ours, theirs, torch.randn(3, 3, 45, 37))


def test_cardinality_and_width_are_options():
    assert count("resnext50_32x4d", cardinality=8, width=14) == 25_603_016  # torchvision's
    assert count("cifar_resnext29_8x64d") == 34_426_698  # 34.4 and 68.1 million: table 7
    assert count("cifar_resnext29_16x64d") == 68_155_210
    stages = [(64, 32), (256, 32), (512, 16), (1024, 8), (10,)]
    assert trace("cifar_resnext29_8x64d", 32) == stages


# --- the three equivalent forms: figure 3 of Xie et al. 2017 ---------------------------------------


def paths(block, x):
    """What each path computes up to its last convolution: its share of channels of each layer."""
    cardinality = block.conv2.groups
    for index in range(cardinality):
        share = slice(index * len(block.bn1.weight) // cardinality,
                      (index + 1) * len(block.bn1.weight) // cardinality)  # fmt: skip
        out = normalised(F.conv2d(x, block.conv1.weight[share]), block.bn1, share).relu()
        out = F.conv2d(out, block.conv2.weight[share], stride=block.stride, padding=1)
        yield share, normalised(out, block.bn2, share).relu()


def normalised(x, bn, share=slice(None)):
    return F.batch_norm(
        x, bn.running_mean[share], bn.running_var[share], bn.weight[share], bn.bias[share],
        bn.training, bn.momentum, bn.eps,
    )  # fmt: skip


def aggregated(block, x):
    """Form (a): each path has its own 1x1, 3x3 and 1x1 convolution; their outputs are summed."""
    return sum(F.conv2d(out, block.conv3.weight[:, share]) for share, out in paths(block, x))


def concatenated(block, x):
    """Form (b): the paths' outputs are concatenated before one 1x1 convolution."""
    return block.conv3(torch.cat([out for _, out in paths(block, x)], 1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", [aggregated, concatenated])
def test_the_three_forms_of_a_block_are_equal(one_thread, form, stride, training):
    """Form (c), the grouped convolution, is what fastres computes."""
    downsample = nn.Sequential(nn.Conv2d(12, 32, 1, stride, bias=False), nn.BatchNorm2d(32))
    block = fill(Bottleneck(12, 8, stride, downsample, groups=4, base_width=24).double())
    block.train(training)
    x = torch.randn(3, 12, 7, 9, dtype=torch.float64, requires_grad=True)
    outputs, gradients = [], []
    for forward in (block, lambda x: F.relu(
        normalised(form(block, x), block.bn3) + block.downsample(x)
    )):  # fmt: skip
        output = forward(x)
        outputs.append(output.detach())
        tensors = [x, *block.parameters()]
        gradients.append(torch.autograd.grad(output.square().sum(), tensors))
    close(*outputs, "output")
    for name, ours, theirs in zip(
        ["input", *(name for name, _ in block.named_parameters())], *gradients, strict=True
    ):
        close(ours, theirs, name)


# --- the small net of textbooks ----------------------------------------------------------------------


class EagerResidual(nn.Module):
    def __init__(self, inputs, channels, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(inputs, channels, 1, stride=strides) if use_1x1conv else None
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.conv3 is None else self.conv3(x)))


class EagerTeaching(nn.Module):
    def __init__(self):
        super().__init__()
        self.b1 = nn.Module()
        self.b1.conv, self.b1.bn = nn.Conv2d(1, 64, 7, 2, 3), nn.BatchNorm2d(64)
        self.b2 = nn.Sequential(EagerResidual(64, 64), EagerResidual(64, 64))
        for name, width in (("b3", 128), ("b4", 256), ("b5", 512)):
            first = EagerResidual(width // 2, width, True, 2)
            setattr(self, name, nn.Sequential(first, EagerResidual(width, width)))
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.b1.bn(self.b1.conv(x))), 3, 2, 1)
        return self.fc(self.b5(self.b4(self.b3(self.b2(x)))).mean((2, 3)))


def test_the_teaching_net(one_thread):
    theirs = EagerTeaching()
    ours = fastres.models.teaching_resnet18()
    assert_same_network(ours, theirs, torch.randn(2, 1, 40, 33))
    assert count("teaching_resnet18") == sum(p.numel() for p in theirs.parameters()) == 11_178_378


def test_shapes_of_the_teaching_net():
    for size, maps in ((96, (24, 24, 12, 6, 3)), (224, (56, 56, 28, 14, 7))):
        channels = (64, 64, 128, 256, 512)
        expected = [*zip(channels, maps, strict=True), (10,)]
        assert trace("teaching_resnet18", size, channels=1) == expected
    with pytest.raises(ValueError, match="use_1x1conv: expected True from 3 to 6 channels"):
        fastres.models.TeachingBlock(3, 6)
    with pytest.raises(ValueError, match="with strides 2, got False"):
        fastres.models.TeachingBlock(3, 3, strides=2)
    block = fastres.models.TeachingBlock(3, 6, use_1x1conv=True, strides=2)
    assert block(torch.randn(4, 3, 6, 6)).shape == (4, 6, 3, 3)
