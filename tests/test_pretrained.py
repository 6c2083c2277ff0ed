"""Networks that have learnt something, on real pictures: converted they answer as before.

The pretrained ResNet-20 and CIFAR-10 are not part of the repository; where ``../shared/data`` is
missing, a small network trained here on scikit-learn's digits stands for the same claim.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import Calls
from torch import nn

import fastres

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TIE = 1e-4  # two logits nearer than this may swap places


# --- the model as published: akamaster's pytorch_resnet_cifar10, option A ------------------------


class LambdaLayer(nn.Module):
    def __init__(self, lambd):
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class CifarBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            pad = planes // 4
            self.shortcut = LambdaLayer(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad), "constant", 0)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class CifarResNet(nn.Module):
    def __init__(self, num_blocks, num_classes=10, channels=3):
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(channels, 16, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, num_blocks[0], stride=1)
        self.layer2 = self._make_layer(32, num_blocks[1], stride=2)
        self.layer3 = self._make_layer(64, num_blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)

    def _make_layer(self, planes, num_blocks, stride):
        layers = []
        for s in [stride] + [1] * (num_blocks - 1):
            layers.append(CifarBlock(self.in_planes, planes, s))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


def test_every_site_of_the_published_class_is_fused():
    """19 convolutions, 19 fused calls: the comparisons below are not of eager with itself."""
    model, images = CifarResNet([3, 3, 3]), torch.randn(2, 3, 32, 32)
    converted = fastres.convert(model)
    with Calls() as calls:
        converted(images)
    assert calls.names == ["bn_relu"] * 19
    converted.eval()
    with Calls() as calls, torch.no_grad():
        converted(images)
    assert calls.names == ["conv_bn_relu"] * 19


# --- data ----------------------------------------------------------------------------------------


def tiles(name, side):
    """The images of one sheet of tiles, row by row, as (N, C, side, side) in [0, 1]."""
    image = pytest.importorskip("PIL.Image")
    image.MAX_IMAGE_PIXELS = None
    with image.open(DATA / name) as opened:
        sheet = np.asarray(opened)
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    split = sheet.reshape(rows, side, columns, side, -1).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(split)).reshape(-1, sheet.shape[2], side, side)


@pytest.fixture(scope="module")
def cifar10():
    if not (DATA / "cifar10-test.webp").exists():
        pytest.skip(f"the CIFAR-10 test set and the pretrained ResNet-20 are not in {DATA}")
    images = tiles("cifar10-test.webp", 32).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    labels = torch.from_numpy(np.fromfile(DATA / "cifar10-test-labels.u8", np.uint8)).long()
    model = CifarResNet([3, 3, 3])
    state = torch.load(DATA / "resnet20-cifar10.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)
    return model.eval(), (images - mean) / std, labels


def logits(model, images, dtype=torch.float32, batch=500):
    with torch.inference_mode():
        return torch.cat([model(part.to(dtype)).float() for part in images.split(batch)])


def assert_same_predictions(ours, eager):
    """The same class for every image, but where eager itself has two logits within ``TIE``."""
    top = eager.topk(2).values
    differ = ours.argmax(1) != eager.argmax(1)
    wrong = differ & (top[:, 0] - top[:, 1] >= TIE)
    assert not wrong.any(), f"{int(wrong.sum())} predictions changed: {wrong.nonzero().flatten()}"
    assert (ours - eager).abs().max() < 1e-3


def accuracy(scores, labels):
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def test_resnet20_on_cifar10(cifar10, threads):
    threads(2)
    model, images, labels = cifar10
    eager = logits(model, images)
    assert round(accuracy(eager, labels), 2) == 91.73, "this is not the published model"
    ours = logits(fastres.convert(model, inplace=False), images)
    assert_same_predictions(ours, eager)
    assert round(accuracy(ours, labels), 2) == 91.73
    narrow = logits(fastres.convert(copy.deepcopy(model).bfloat16()), images, torch.bfloat16)
    assert abs(accuracy(narrow, labels) - 91.73) <= 0.1


@pytest.mark.parametrize("tile", ["auto", 4, 2, "off"])
def test_logits_of_real_images(cifar10, threads, tile):
    """The bound that the README states for every choice of fastres.winograd."""
    threads(2)
    model, images, _ = cifar10
    images = images[:256]
    truth = logits(copy.deepcopy(model).double(), images, torch.float64)
    with fastres.winograd(tile):
        ours = logits(fastres.convert(model, inplace=False), images)
    assert (ours - truth).abs().max() < 4e-6 * truth.abs().max()


def test_resnet20_keeps_learning_on_cifar10(cifar10, one_thread):
    """A few steps of fine-tuning in fp64 beside eager, on real images."""
    model, images, labels = cifar10
    states = []
    for net in (copy.deepcopy(model), fastres.convert(model, inplace=False)):
        net.double().train()
        sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        for part, wanted in zip(images[:96].split(32), labels[:96].split(32), strict=True):
            sgd.zero_grad()
            F.cross_entropy(net(part.double()), wanted).backward()
            sgd.step()
        states.append(net.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-8, atol=1e-8)


# --- the stand-in that every machine has ---------------------------------------------------------


def learn(model, images, labels, epochs):
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for part, wanted in zip(images.split(32), labels.split(32), strict=True):
            sgd.zero_grad()
            F.cross_entropy(model(part), wanted).backward()
            sgd.step()


@pytest.fixture(scope="module")
def digits():
    """A ResNet-8 that has learnt scikit-learn's handwritten digits (8x8)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # 8x8 maps: waking a second thread costs more than the work
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    model = CifarResNet([1, 1, 1], channels=1)
    learn(model, images[:1280], labels[:1280], epochs=3)
    torch.set_num_threads(threads)
    return model.eval(), images[1280:], labels[1280:]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_network_that_learnt_digits(digits, one_thread, layout):
    model, images, labels = digits
    images = images.to(memory_format=layout)
    eager = logits(model, images)
    assert accuracy(eager, labels) > 85, "it has not learnt; the comparison would mean little"
    converted = fastres.convert(model, inplace=False)
    ours = logits(converted, images)
    assert_same_predictions(ours, eager)
    narrow = copy.deepcopy(model).bfloat16()
    wide = accuracy(logits(narrow, images, torch.bfloat16), labels)
    narrow = accuracy(logits(fastres.convert(narrow), images, torch.bfloat16), labels)
    assert abs(narrow - wide) <= 0.6, "bf16: more than three of 517 answers changed"


def test_our_own_modules_learn_digits(digits, one_thread):
    """Trained and evaluated by the fused operators alone, from scratch."""
    _, images, labels = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        fastres.nn.ConvBNReLU(1, 16), fastres.nn.BasicBlock(16, 16),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    learn(model, images[:320], labels[:320], epochs=5)
    assert accuracy(logits(model.eval(), images[320:]), labels[320:]) > 80
