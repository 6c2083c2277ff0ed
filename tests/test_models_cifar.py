"""CIFAR and plain networks and their shortcuts, beside blocks written out in eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from families import assert_same_network, count, trace
from torch import nn

import fastres
from fastres.models import cifar_plain, cifar_resnet, cifar_resnet_wide

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


class EagerBlock(nn.Module):
    """The block of He et al. 2015, with the shortcut ``kind``, in PyTorch's own calls."""

    def __init__(self, inplanes, planes, stride, kind):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.kind, self.stride, self.missing = kind, stride, planes - inplanes
        differ = stride != 1 or inplanes != planes
        if kind == "C" or (kind == "B" and differ):
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )
        elif kind.endswith("gating") and not differ:
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(planes, planes, 1)})
        self.kind = "A" if differ and kind not in ("B", "C", "none") else kind

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.kind == "none":
            return F.relu(out)
        if hasattr(self, "downsample") and self.kind in ("B", "C"):
            return F.relu(out + self.downsample(x))
        if self.kind in ("A", "B"):
            x = x[:, :, :: self.stride, :: self.stride]
            zeros = x.new_zeros(x.shape[0], self.missing, *x.shape[2:])
            before, behind = zeros.tensor_split((self.missing // 2,), 1)
            return F.relu(out + torch.cat((before, x, behind), 1))
        if self.kind == "scaling":
            return F.relu(0.5 * out + 0.5 * x)
        gate = torch.sigmoid(self.downsample["conv"](x))
        return F.relu((gate * out if self.kind == "exclusive_gating" else out) + (1 - gate) * x)


class EagerCifar(nn.Module):
    def __init__(self, blocks, widths, kind, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inplanes = widths[0]
        for index, (number, planes) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for block in range(number):
                stride = 2 if index and not block else 1
                stage.append(EagerBlock(inplanes, planes, stride, kind))
                inplanes = planes
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(inplanes, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    "kind", ["A", "B", "C", "scaling", "exclusive_gating", "shortcut_gating", "none"]
)
def test_every_shortcut(one_thread, kind):
    theirs = EagerCifar((2, 2, 2), (5, 8, 12), kind)
    make = cifar_plain if kind == "none" else cifar_resnet
    options = {} if kind == "none" else {"shortcut": kind}
    ours = make(14, widths=(5, 8, 12), **options)
    assert_same_network(ours, theirs, torch.randn(3, 3, 13, 11))


def test_the_papers_resnet20(one_thread):
    ours, theirs = cifar_resnet(20), EagerCifar((3, 3, 3), (16, 32, 64), "A")
    assert_same_network(ours, theirs, torch.randn(2, 3, 32, 32))


def test_the_wide_form(one_thread):
    ours = cifar_resnet_wide(1, widths=(6, 7, 8), num_classes=2)
    theirs = EagerCifar((3, 2, 2), (6, 7, 8), "B", classes=2)
    assert_same_network(ours, theirs, torch.randn(2, 3, 16, 16))
    assert count("cifar_resnet_wide", n=2) == sum(
        p.numel() for p in EagerCifar((5, 4, 4), (64, 128, 256), "B").parameters()
    )


@pytest.mark.parametrize("depth, parameters", PARAMETERS.items())
def test_parameters(depth, parameters):
    """Table 6 of the paper: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 million."""
    assert count(f"cifar_resnet{depth}") == parameters
    if depth != 1202:
        assert count(f"cifar_plain{depth}") == parameters, "shortcuts have none"


def test_shapes():
    for name in ("cifar_resnet20", "cifar_plain20"):
        assert trace(name, 32) == [(16, 32), (16, 32), (32, 16), (64, 8), (10,)]
    assert trace("cifar_resnet_wide", 32) == [(64, 32), (64, 32), (128, 16), (256, 8), (10,)]
    assert trace("plain34", 224)[1:-1] == [(64, 56), (128, 28), (256, 14), (512, 7)]
    assert count("plain18") == count("resnet18", shortcut="A") == 11_515_688


def test_gates_start_nearly_closed():
    """With a bias of -6 the shortcut starts as (1 - 0.0025) * x."""
    model = cifar_resnet(8, shortcut="shortcut_gating")
    gates = [module for name, module in model.named_modules() if name.endswith("downsample.conv")]
    assert len(gates) == 1 and torch.equal(gates[0].bias, torch.full((16,), -6.0))


def test_dropout_shortcut(one_thread):
    """In eval it is the identity; in training half of the shortcut's values are dropped."""
    ours, identity = cifar_resnet(8, shortcut="dropout"), cifar_resnet(8)
    identity.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), identity.eval()(x))
        block = ours.train().layer1[0]
        nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
        kept = block(torch.ones(4, 16, 16, 16))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (kept == 0).float().mean() < 0.6


def test_a_padded_identity_keeps_channels_last():
    shortcut = fastres.models.cifar_resnet(8).layer2[0].downsample
    x = torch.randn(2, 16, 7, 5).to(memory_format=torch.channels_last)
    output = shortcut(x)
    assert output.shape == (2, 32, 4, 3)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output[:, 8:24], x[:, :, ::2, ::2])
    assert not output[:, :8].any() and not output[:, 24:].any()
