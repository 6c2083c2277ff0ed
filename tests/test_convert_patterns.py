"""What is no pattern of convert: left alone, still right, and listed with the reason."""

import pytest
import torch
import torch.nn.functional as F
from converting import (
    Block,
    assert_agrees,
    images,
    kinds,
    randomized,
    reasons,
)
from torch import nn

import fastres

pytestmark = pytest.mark.usefixtures("one_thread")


class MyBN(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class ConvSubclass(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class UsedTwice(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.relu(out) + out


class ConvUsedTwice(Block):
    def forward(self, x):
        out = self.conv1(x)
        return self.relu(self.bn1(out)) + out


class SumUsedTwice(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x)) + x
        return self.relu(out) * out


class Doubled(Block):
    """Both operands of the addition are the one value."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.relu(out + out)


class AddsIntoItsInput(Block):
    """``x += out`` changes what the caller holds."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        x += out
        return self.relu(x)


class AddsIntoAView(Block):
    def forward(self, x):
        before = F.relu(self.bn1(self.conv1(x)))
        view = before[:, :]
        view += x
        return self.relu(view) + before


class InputChangedInBetween(Block):
    """The residual is changed between its use and the ReLU; the fused call would read it late."""

    def forward(self, x):
        x = x * 1
        out = self.bn1(self.conv1(x)) + x
        x.mul_(2)
        return self.relu(out) + x


class InputChangedByAModule(Block):
    """An in-place ReLU gets the convolution's input before the batch norm runs."""

    def __init__(self):
        super().__init__()
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1
        out = self.conv1(x)
        y = self.inplace(x)
        return self.relu(self.bn1(out)) + y


class SharedBNInBetween(Block):
    """The running statistics are updated in the order of the calls."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        other = self.bn1(self.conv2(x))
        return self.relu(out + other)


class SharedConvPath(Block):
    def forward(self, x):
        return self.relu(self.bn1(x)) + self.relu(self.bn1(self.conv1(x)))


class ScalarResidual(Block):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + 1.0)


class BroadcastResidual(Block):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


class ScaledAddition(Block):
    def forward(self, x):
        return self.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=0.5))


class Subtraction(Block):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) - x)


def with_module(**modules):
    def make():
        block = Block()
        for name, module in modules.items():
            setattr(block, name, module)
        return block

    return make


ALONE = {
    # name: (model, fused kinds, module, part of the reason)
    "subclass of batch norm": (
        with_module(bn1=MyBN(8)), {"conv": 1, "conv_bn_add_relu": 1}, "bn1", "BatchNorm subclass MyBN",
    ),
    "subclass of convolution": (
        with_module(conv1=ConvSubclass(8, 8, 3, padding=1)),
        {"bn_relu": 1, "conv_bn_add_relu": 1}, "conv1", "ConvSubclass",
    ),
    "sync batch norm": (
        with_module(bn1=nn.SyncBatchNorm(8)),
        {"conv": 1, "conv_bn_add_relu": 1}, "bn1", "SyncBatchNorm",
    ),
    "another norm": (
        with_module(bn1=nn.GroupNorm(2, 8)), {"conv": 1, "conv_bn_add_relu": 1}, None, "",
    ),
    "another activation": (
        with_module(relu=nn.GELU()), {"conv_bn": 2}, None, "",
    ),
    "another padding": (
        with_module(conv1=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        {"bn_relu": 1, "conv_bn_add_relu": 1}, "conv1", "padding_mode 'reflect'",
    ),
    "bn comes before": (
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.GELU()),
        {"conv": 1}, "0", "Conv2d 1",
    ),
    "bn then gelu": (
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.GELU()), {}, "0", "GELU is not ReLU",
    ),
    "dropout in between": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU()
        ),
        {"conv_bn": 1}, "3", "Dropout 2",
    ),
    "value used twice": (UsedTwice, {"conv_bn": 1}, "relu", "used by someone else"),
    "conv used twice": (ConvUsedTwice, {"conv": 1, "bn_relu": 1}, None, ""),
    "sum used twice": (SumUsedTwice, {"conv_bn": 1}, "relu", "used by someone else"),
    "doubled": (Doubled, {"conv_bn": 1, "add_relu": 1}, None, ""),
    "adds into its input": (AddsIntoItsInput, {"conv_bn": 1}, "relu", "in place"),
    "adds into a view": (AddsIntoAView, {"conv_bn_relu": 1}, "relu", "in place"),
    "input changed": (InputChangedInBetween, {"conv_bn": 1}, None, ""),
    "input changed by a module": (InputChangedByAModule, {"conv": 1, "bn_relu": 1}, None, ""),
    "shared batch norm": (SharedBNInBetween, {"conv_bn": 1, "conv_bn_add_relu": 1}, None, ""),
    "shared path": (SharedConvPath, {"bn_relu": 1, "conv_bn_relu": 1}, None, ""),
    "scalar residual": (ScalarResidual, {"conv_bn": 1}, "relu", "add"),
    "broadcast residual": (BroadcastResidual, {"conv_bn_add_relu": 1}, None, ""),
    "scaled addition": (ScaledAddition, {"conv_bn": 1}, "relu", "add"),
    "subtraction": (Subtraction, {"conv_bn": 1}, "relu", "sub"),
}  # fmt: skip


# eager autograd refuses these: they change in place what it has saved
NO_GRADIENT = (
    "adds into its input",
    "adds into a view",
    "input changed",
    "input changed by a module",
)


@pytest.mark.parametrize("name", ALONE)
def test_left_alone_with_the_reason(name):
    make, fused, path, reason = ALONE[name]
    model = make()
    if name == "sync batch norm":  # runs on GPUs only
        converted = fastres.convert(model)
    else:
        converted = assert_agrees(model, images(), grad=name not in NO_GRADIENT)
    assert kinds(converted) == fused
    if path is not None:
        assert reason in reasons(converted)[path]


class AddsBehindAModule(Block):
    """``passing`` returns the very tensor it is given, in eval at least: the caller's changes."""

    def __init__(self, passing):
        super().__init__()
        self.passing = passing

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        same = self.passing(x)
        same += out
        return self.relu(same)


@pytest.mark.parametrize(
    "passing", [nn.Identity(), nn.Dropout(0.5), nn.Sequential(), nn.Flatten(3)]
)
def test_an_input_that_a_module_passes_on_is_changed(passing):
    model = randomized(AddsBehindAModule(passing)).double().eval()
    converted = fastres.convert(model, inplace=False)
    assert kinds(converted) == {"conv_bn": 1}
    x = images().double()
    eager = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(eager))
    torch.testing.assert_close(x, eager)


class Functional(Block):
    """Convolution and batch norm as functions of the modules' parameters."""

    def forward(self, x):
        bn = self.bn1
        x = F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1)
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return F.relu(x)


def test_functions_are_named_where_they_are_left_alone():
    rows = fastres.summary(assert_agrees(Functional(), images())).left_alone
    found = {row.kind: row.reason for row in rows if not row.modules}
    assert found["conv"] == "conv2d is a function here, not a module"
    assert found["bn"] == "batch_norm is a function here, not a module"
