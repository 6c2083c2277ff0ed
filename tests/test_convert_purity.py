"""Forwards that a trace would not stand for, at once or after a later change: never wrong."""

import gc
import random
import sys
import time
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from converting import (
    FUSED,
    Block,
    assert_same,
    images,
    kinds,
    randomized,
    reasons,
    results,
)
from torch import Tensor, nn

import fastres

pytestmark = pytest.mark.usefixtures("one_thread")


# --- forwards whose trace would not stand for them -----------------------------------------------


class Counts(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountsInADict(Block):
    def __init__(self):
        super().__init__()
        self.log = {"calls": 0}

    def forward(self, x):
        self.log["calls"] += 1
        return super().forward(x)


class Remembers(Block):
    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x):
        out = super().forward(x)
        self.features.append(out)
        return out


def remember(x, seen=[]):  # noqa: B006
    seen.append(x)
    return x


class RemembersInADefault(Block):
    def forward(self, x):
        return super().forward(remember(x))


class ChangesData(Block):
    """The convolution behind keeps the changed values for its gradient; autograd is not told."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out.data.mul_(2)
        return self.relu(self.bn2(self.conv2(out)) + x)


class StochasticDepth(Block):
    def forward(self, x):
        if self.training and torch.rand(1) < 0.5:
            return x
        return super().forward(x)


class PythonRandom(Block):
    def forward(self, x):
        return super().forward(x) * (1 if random.random() < 0.5 else 3)


class Clock(Block):
    def forward(self, x):
        return super().forward(x) * (1 + 0 * time.time())


class Prints(Block):
    def forward(self, x):
        print("called")
        return super().forward(x)


class AsksType(Block):
    def forward(self, x):
        if isinstance(x + 1, Tensor):
            x = x + 1
        return super().forward(x)


class AsksArgumentsType(Block):
    def forward(self, x):
        if isinstance(x, Tensor):
            x = x + 1
        else:
            x = torch.cat(x, 1)
        return super().forward(x)


class AsksAttribute(Block):
    def forward(self, x):
        if hasattr(x, "names_of_my_own"):
            x = x + 1
        return super().forward(x)


class DependsOnValues(Block):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return x


class DependsOnShape(Block):
    def forward(self, x):
        if x.shape[-1] == 1:
            return x
        return super().forward(x)


class Swallows(Block):
    def forward(self, x):
        try:
            x = x + 1 if x.sum() > 1e9 else x
        except Exception:  # noqa: BLE001
            x = x * 100
        return super().forward(x)


class NoGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv1(x)
        return self.relu(self.bn1(x))


class DependsOnGradMode(Block):
    def forward(self, x):
        if torch.is_grad_enabled():
            x = x + 1
        return super().forward(x)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class VarArgs(Block):
    def forward(self, *inputs):
        return super().forward(*inputs)


class Plain:
    scale = 1


class Configured(Block):
    def __init__(self):
        super().__init__()
        self.config = Plain()

    def forward(self, x):
        return super().forward(x) * self.config.scale


class MakesATensor(Block):
    def forward(self, x):
        return super().forward(x) * torch.ones(1)


class StringKeyed(OrderedDict):
    pass


class OwnDict(Block):
    def forward(self, x):
        return StringKeyed(out=super().forward(x))


def halved(x):
    return x.mul_(0.5)


torch.fx.wrap("halved")  # as torchvision does with stochastic_depth


class CallsWrapped(Block):
    def forward(self, x):
        return super().forward(halved(x * 1)) + x


UNTRACEABLE = {
    Counts: "sets the attribute calls", CountsInADict: "changes a list or dict",
    Remembers: "changes a list or dict", RemembersInADefault: "keeps a tensor",
    ChangesData: "uses .data of a value", StochasticDepth: "torch.rand",
    PythonRandom: "random", Clock: "time", Prints: "print", AsksType: "a value's type",
    AsksAttribute: "names_of_my_own", DependsOnValues: "decision depends on a tensor",
    DependsOnShape: "decision depends on a tensor", Swallows: "'try'", NoGrad: "'with'",
    DependsOnGradMode: "is_grad_enabled", Decorated: "decorated", VarArgs: "inputs",
    Configured: "config", MakesATensor: "torch.ones", OwnDict: "StringKeyed",
    CallsWrapped: "halved, hidden by torch.fx.wrap",
}  # fmt: skip


@pytest.mark.parametrize("cls", UNTRACEABLE, ids=lambda cls: cls.__name__)
def test_untraceable_forward_is_kept(cls, capsys):
    model = randomized(cls()).double()
    converted = fastres.convert(model, inplace=False)
    assert UNTRACEABLE[cls] in reasons(converted)["conv1"]
    assert kinds(converted) == {}
    # the mode that has no such decision is fused all the same
    assert kinds(converted.eval()) == (FUSED if cls is StochasticDepth else {})
    capsys.readouterr()
    x = images().double()
    for training in (False, True):
        random.seed(0)
        grad = cls is not Decorated  # its output needs none
        ours = results(converted, [x], training, grad=grad)
        random.seed(0)
        assert_same(ours, results(model, [x], training, grad=grad))
    if cls is Prints:
        assert capsys.readouterr().out == "called\n" * 4
    if cls is CountsInADict:
        assert converted.log == model.log == {"calls": 2}
    if cls is Remembers:
        assert len(converted.features) == 2


# --- decisions that may change after the conversion ----------------------------------------------


class Optional(Block):
    def forward(self, x, residual=None, scale: float = 1.0):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out * scale + (x if residual is None else residual))


def test_optional_arguments():
    model = randomized(Optional()).double()
    converted = fastres.convert(model, inplace=False)
    assert kinds(converted)["conv_bn_relu"] == 1
    x, r = images().double(), images().double()
    for args, kwargs in (
        ((x,), {}), ((), {"x": x}), ((x, None), {}), ((x, r), {}), ((x,), {"residual": r}),
        ((x, r, 0.5), {}), ((x,), {"scale": 2}), ((), {"residual": r, "x": x}), ((x, None, 1), {}),
    ):  # fmt: skip
        torch.testing.assert_close(converted(*args, **kwargs), model(*args, **kwargs))
    for args, kwargs in (((), {}), ((x, r, 1, 2), {}), ((x,), {"x": x}), ((x,), {"other": 1})):
        with pytest.raises(TypeError) as eager:
            model(*args, **kwargs)
        with pytest.raises(TypeError) as ours:
            converted(*args, **kwargs)
        assert str(ours.value) == str(eager.value)


class Flexible(Block):
    width: int = 1

    def __init__(self):
        super().__init__()
        self.downsample = nn.Conv2d(8, 8, 1)
        self.skip = True
        self.scales = [1.0, 1.0]
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1)])
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        if self.skip:
            out = out + x
        out = self.relu(out) * self.scales[0] * self.width
        if self.bn1.momentum == 0.1:
            out = out + 1
        if GLOBAL_SWITCH:
            out = out + 1
        return F.relu(self.body(out))


GLOBAL_SWITCH = False


def change_downsample(model):
    model.downsample = None


def delete_and_add(model):
    del model.downsample
    model.downsample = nn.Conv2d(8, 8, 1, bias=False).double()
    with torch.no_grad():
        model.downsample.weight.fill_(0.1)


def change_flag(model):
    model.skip = False


def change_list(model):
    model.scales[0] = 3.0


def change_class_attribute(model):
    model.width = 2


def grow_list(model):
    model.layers.append(nn.ReLU())


def change_inner_attribute(model):
    model.bn1.momentum = 0.2


def replace_activation(model):
    model.relu = nn.GELU()


def replace_norm(model):
    model.bn2 = nn.Identity()


def replace_in_container(model):
    model.body[1] = nn.GELU()


def grow_container(model):
    model.body.append(nn.Tanh())


def shrink_container(model):
    del model.body[1]


def set_through_modules(model):
    model._modules["bn2"] = nn.Identity()


def patch_forward(model):
    model.bn1.forward = lambda x: x * 2


def pad_differently(model):
    model.conv1.padding_mode, model.conv1._reversed_padding_repeated_twice = "circular", [1] * 4


def global_switch(model):
    sys.modules[__name__].GLOBAL_SWITCH = True


@pytest.fixture
def restore_switch():
    yield
    sys.modules[__name__].GLOBAL_SWITCH = False


@pytest.mark.parametrize(
    "change",
    [
        change_downsample, delete_and_add, change_flag, change_list, change_class_attribute,
        grow_list, change_inner_attribute, replace_activation, replace_norm, replace_in_container,
        grow_container, shrink_container, set_through_modules, patch_forward, pad_differently,
        global_switch,
    ],
)  # fmt: skip
def test_changes_after_the_conversion_are_seen(change, restore_switch):
    model = randomized(Flexible()).double()
    converted = fastres.convert(model, inplace=False)
    x = images().double()
    before = kinds(converted)
    assert before == {"conv_bn_relu": 2, "conv_bn_add_relu": 1, "conv": 2}
    for training in (True, False):
        assert_same(results(converted, [x], training), results(model, [x], training))
    before = model(x)
    change(model)
    if change is not global_switch:
        change(converted)
    assert not torch.allclose(before, model(x))
    for training in (True, False):
        assert_same(results(converted, [x], training), results(model, [x], training))
    fastres.summary(converted)


def test_an_arguments_type_may_be_asked():
    """The forward is traced for a tensor and for a list of tensors."""
    model = randomized(AsksArgumentsType()).double()
    converted = fastres.convert(model, inplace=False)
    assert kinds(converted) == FUSED
    x = images().double()
    for training in (True, False):
        assert_same(results(converted, [x], training), results(model, [x], training))
    parts = list(x.split(4, 1))
    torch.testing.assert_close(converted(parts), model(parts))


def test_nothing_is_left_of_a_trace():
    model = Remembers()
    before = {m: dict(m.__dict__) for m in model.modules()}
    fastres.convert(model)
    assert model.features == []
    for module, state in before.items():
        assert {k: v for k, v in module.__dict__.items() if not k.startswith("_fastres")} == state
    assert sys.getprofile() is None
    assert "__getattribute__" not in vars(nn.Module)


class Unpacks(Block):
    def forward(self, x):
        left, right = x.chunk(2, 1)  # leaves the traced values in a cycle
        return super().forward(torch.cat((right, left), 1))


def test_a_trace_collects_its_own_garbage_alone():
    """A look at every object of a large process takes a fifth of a second, and there are traces by
    the hundred."""
    generations = []

    def note(phase, info):
        if phase == "start":
            generations.append(info["generation"])

    model = Unpacks()
    gc.disable()  # so that none is collected but by request
    gc.callbacks.append(note)
    try:
        fastres.convert(model)
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert kinds(model) == FUSED
    assert set(generations) == {1}
