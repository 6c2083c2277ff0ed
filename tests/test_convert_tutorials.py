"""Blocks as tutorials write them, of classes that fastres has never seen."""

import pytest
import torch
import torch.nn.functional as F
from converting import LAYOUTS, assert_agrees, kinds
from torch import nn

import fastres

pytestmark = pytest.mark.usefixtures("one_thread")


def images(channels: int = 8, size: int = 10) -> torch.Tensor:
    return torch.randn(3, channels, size, size + 1)


class AddIdentity(nn.Module):
    """``out += identity`` and one shared in-place ReLU, with a projection."""

    def __init__(self, planes=8, out=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or planes != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(planes, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class SkipConnection(nn.Module):
    """``act2(x + skip)`` with activations of its own."""

    def __init__(self, planes=8):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU()
        self.skipconnection = nn.Sequential()

    def forward(self, x):
        skip = self.skipconnection(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(x + skip)


class Residual(nn.Module):
    """``F.relu(Y + X)`` in place of nothing: the residual is changed in place, as d2l writes it."""

    def __init__(self, planes=8, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, 12, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(12, 12, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(planes, 12, kernel_size=1, stride=strides)
        self.bn1 = nn.BatchNorm2d(12)
        self.bn2 = nn.BatchNorm2d(12)

    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class LambdaLayer(nn.Module):
    def __init__(self, lambd):
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class ZeroPadding(nn.Module):
    """The CIFAR shortcut A: every second pixel, channels padded with zeros."""

    def __init__(self, planes=8):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, 2 * planes, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * planes)
        self.conv2 = nn.Conv2d(2 * planes, 2 * planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * planes)
        self.shortcut = LambdaLayer(
            lambda x: F.pad(
                x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 2, planes // 2), "constant", 0
            )
        )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class LeftRight(nn.Module):
    """A pattern that begins inside a Sequential and ends outside."""

    def __init__(self, planes=8, out=12):
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(planes, out, 3, 2, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(planes, out, 1, 2, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.left(x) + self.shortcut(x))


class PreActivation(nn.Module):
    """``conv(relu(bn(x)))``, twice, and an addition without a ReLU."""

    def __init__(self, planes=8):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += x
        return out


class ConvBlock(nn.Module):
    def __init__(self, planes, out, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(planes, out, bias=False, **kwargs)
        self.batchnorm = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.batchnorm(self.conv(x))


class Wrapped(nn.Module):
    """Convolution and batch norm in a class of their own, used by another."""

    def __init__(self):
        super().__init__()
        self.first = ConvBlock(8, 8, kernel_size=3, padding=1)
        self.second = ConvBlock(8, 8, kernel_size=3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.first(x))
        out = self.second(out)
        out += x
        return self.relu(out)


class SharedBetweenPlaces(nn.Module):
    """One convolution and one batch norm at two places."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x):
        out = self.act(self.bn(self.conv(x)))
        return self.act(self.bn(self.conv(out)) + x)


class Spelled(nn.Module):
    """One way to spell each step."""

    def __init__(self, relu, add=None):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu, self.add = relu, add

    def forward(self, x):
        out = self.bn(self.conv(x))
        if self.add is not None:
            out = self.add(out, x)
        return self.relu(out)


class DeepStem(nn.Module):
    """timm's "d" stem: a Sequential that ends in a convolution, then the parent's batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 12, 3, padding=1, bias=False),
        )  # fmt: skip
        self.bn1 = nn.BatchNorm2d(12)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act1(self.bn1(self.conv1(x)))


class Gated(nn.Module):
    """Attention between the last batch norm and the addition."""

    def __init__(self, planes=8):
        super().__init__()
        self.conv = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(planes)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes, planes)

    def forward(self, x):
        out = self.bn(self.conv(x))
        b, c, _, _ = out.size()
        gate = torch.sigmoid(self.fc(self.pool(out).view(b, c))).view(b, c, 1, 1)
        return F.relu(out * gate.expand_as(out) + x)


class Classifier(nn.Module):
    """``x.view(x.size(0), -1)`` before the head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            AddIdentity(8, 16, stride=2), nn.MaxPool2d(2), AddIdentity(16, 16)
        )
        self.fc = nn.Linear(16 * 2 * 3, 5)

    def forward(self, x):
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.fc(x)


CASES = {
    "add identity": (AddIdentity, {"conv_bn_relu": 1, "conv_bn_add_relu": 1}),
    "projection": (
        lambda: AddIdentity(8, 12, 2),
        {"conv_bn_relu": 1, "conv_bn_add_relu": 1, "conv_bn": 1},
    ),
    "skipconnection": (SkipConnection, {"conv_bn_relu": 1, "conv_bn_add_relu": 1}),
    "residual with biases": (Residual, {"conv_bn_relu": 1, "conv_bn_add_relu": 1, "conv": 1}),
    "zero padding": (ZeroPadding, {"conv_bn_relu": 1, "conv_bn_add_relu": 1}),
    "left and right": (LeftRight, {"conv_bn_relu": 1, "conv_bn_add_relu": 1, "conv_bn": 1}),
    "pre-activation": (PreActivation, {"bn_relu": 1, "conv_bn_relu": 1, "conv": 1}),
    "wrapped": (Wrapped, {"conv_bn": 2, "add_relu": 1}),
    "shared": (SharedBetweenPlaces, {"conv_bn_relu": 1, "conv_bn_add_relu": 1}),
    "deep stem": (DeepStem, {"conv_bn_relu": 2}),
    "gated": (Gated, {"conv_bn": 1, "add_relu": 1}),
    "classifier": (Classifier, {"conv_bn_relu": 2, "conv_bn_add_relu": 2, "conv_bn": 1}),
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        {"conv_bn_relu": 1, "conv": 1},
    ),
    "nested sequential": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)), nn.Sequential(nn.ReLU())
        ),
        {"conv_bn_relu": 1},
    ),
    "no convolution": (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), {"bn_relu": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_tutorial_block(name):
    make, expected = CASES[name]
    # eager's own view fails in channels_last
    layouts = LAYOUTS[:1] if name == "classifier" else LAYOUTS
    converted = assert_agrees(make(), images(), layouts=layouts)
    assert kinds(converted) == expected


def relu_method(x):
    return x.relu()


def relu_in_place_method(x):
    return x.relu_()


def functional_in_place(x):
    return F.relu(x, inplace=True)


def functional_positional(x):
    return F.relu(x, True)


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_, torch.relu, torch.relu_,
        functional_in_place, functional_positional, relu_method, relu_in_place_method,
    ],
    ids=lambda relu: getattr(relu, "__name__", str(relu)),
)  # fmt: skip
def test_every_spelling_of_relu(relu):
    assert kinds(assert_agrees(Spelled(relu), images())) == {"conv_bn_relu": 1}


def add_operator(a, b):
    return a + b


def add_turned_round(a, b):
    return b + a


def add_in_place(a, b):
    a += b
    return a


def add_method(a, b):
    return a.add(b)


def add_in_place_method(a, b):
    return a.add_(b)


@pytest.mark.parametrize(
    "add",
    [add_operator, add_turned_round, add_in_place, torch.add, add_method, add_in_place_method],
)
def test_every_spelling_of_the_addition(add):
    assert kinds(assert_agrees(Spelled(F.relu, add), images())) == {"conv_bn_add_relu": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 1e-2},
    ],
    ids=str,
)  # fmt: skip
def test_batch_norm_options(options):
    block = AddIdentity(8, 12, 2)
    block.bn1 = nn.BatchNorm2d(12, **options)
    block.bn2 = nn.BatchNorm2d(12, **options)
    converted = assert_agrees(block, images())
    assert kinds(converted)["conv_bn_add_relu"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2, "padding": 2}, {"groups": 4, "padding": 1}, {"padding": "same"},
        {"stride": (2, 1), "padding": (1, 0)}, {"padding": "valid"},
    ],
    ids=str,
)  # fmt: skip
def test_convolution_options(options):
    block = nn.Sequential(nn.Conv2d(8, 8, 3, **options), nn.BatchNorm2d(8), nn.ReLU())
    assert kinds(assert_agrees(block, images())) == {"conv_bn_relu": 1}


def test_only_one_channel_and_one_pixel_in_any_format():
    block = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1), nn.ReLU(),
    )  # fmt: skip
    assert_agrees(block, torch.randn(5, 1, 1, 1))
    assert_agrees(block, torch.randn(5, 1, 6, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_eval(dtype):
    block = AddIdentity(8, 12, 2).eval()
    x = images()
    with torch.no_grad():
        expected = block(x)
        found = fastres.convert(block.to(dtype))(x.to(dtype))
    assert found.dtype == dtype
    # three roundings to 8 bits (11 in fp16) on values of order 1
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
