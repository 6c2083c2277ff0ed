"""What may not be fused: left alone, still right, and listed with the reason."""

import copy
import cProfile
import gc
import math
import random
import sys
import time
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from converting import (
    LAYOUTS,
    assert_agrees,
    assert_same,
    kinds,
    randomized,
    reasons,
    results,
    single_threaded,
)
from torch import Tensor, nn

import fastres

one_thread = pytest.fixture(autouse=True)(single_threaded)


def images(channels: int = 8, size: int = 9) -> Tensor:
    return torch.randn(3, channels, size, size)


class Block(nn.Module):
    """A residual block whose forward the cases below vary."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


FUSED = {"conv_bn_relu": 1, "conv_bn_add_relu": 1}


# --- patterns that are none ----------------------------------------------------------------------


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
        with_module(bn1=MyBN(8)), {"conv_bn_add_relu": 1}, "bn1", "BatchNorm subclass MyBN",
    ),
    "subclass of convolution": (
        with_module(conv1=ConvSubclass(8, 8, 3, padding=1)),
        {"bn_relu": 1, "conv_bn_add_relu": 1}, "conv1", "ConvSubclass",
    ),
    "sync batch norm": (
        with_module(bn1=nn.SyncBatchNorm(8)), {"conv_bn_add_relu": 1}, "bn1", "SyncBatchNorm",
    ),
    "another norm": (
        with_module(bn1=nn.GroupNorm(2, 8)), {"conv_bn_add_relu": 1}, "conv1", "GroupNorm bn1",
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
        {}, "1", "batch norm comes before the convolution",
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
    "conv used twice": (ConvUsedTwice, {"bn_relu": 1}, "conv1", "used by someone else"),
    "sum used twice": (SumUsedTwice, {"conv_bn": 1}, "relu", "used by someone else"),
    "doubled": (Doubled, {"conv_bn": 1, "add_relu": 1}, None, ""),
    "adds into its input": (AddsIntoItsInput, {"conv_bn": 1}, "relu", "in place"),
    "adds into a view": (AddsIntoAView, {"conv_bn_relu": 1}, "relu", "in place"),
    "input changed": (InputChangedInBetween, {"conv_bn": 1}, None, ""),
    "input changed by a module": (InputChangedByAModule, {"bn_relu": 1}, "conv1", "changed"),
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
        if isinstance(x, Tensor):
            x = x + 1
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


UNTRACEABLE = {
    Counts: "sets the attribute calls", CountsInADict: "changes a list or dict",
    Remembers: "changes a list or dict", StochasticDepth: "torch.rand",
    PythonRandom: "random", Clock: "time", Prints: "print", AsksType: "type",
    AsksAttribute: "names_of_my_own", DependsOnValues: "decision depends on a tensor",
    DependsOnShape: "decision depends on a tensor", Swallows: "'try'", NoGrad: "'with'",
    DependsOnGradMode: "is_grad_enabled", Decorated: "decorated", VarArgs: "inputs",
    Configured: "config", MakesATensor: "torch.ones", OwnDict: "StringKeyed",
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
    assert before == {"conv_bn_relu": 2, "conv_bn_add_relu": 1}
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


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["conv1", "bn1", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hook_on_an_inner_module(kind, name, when):
    seen = {"ours": [], "eager": []}

    def watch(model, log):
        module = model.get_submodule(name)
        if kind == "forward":  # it sees and changes the output
            module.register_forward_hook(lambda m, i, o: log.append(o.detach()) or o * 2)
        elif kind == "forward_pre":
            module.register_forward_pre_hook(lambda m, i: log.append(i[0].detach()))
        else:
            module.register_full_backward_hook(lambda m, i, o: log.append(o[0].detach()))

    model = randomized(Block()).double()
    ours = copy.deepcopy(model)
    watch(model, seen["eager"])
    if when == "before":
        watch(ours, seen["ours"])
        fastres.convert(ours)
    else:
        fastres.convert(ours)
        assert kinds(ours) == FUSED
        watch(ours, seen["ours"])
    assert "hook" in reasons(ours)[name]
    x = images().double()
    for training in (True, False):
        assert_same(results(ours, [x], training), results(model, [x], training))
    assert len(seen["ours"]) == len(seen["eager"]) > 0
    for a, b in zip(seen["ours"], seen["eager"], strict=True):
        torch.testing.assert_close(a, b)


def test_hook_on_the_converted_module_itself_sees_what_it_gives():
    model = fastres.convert(Block())
    seen = []
    model.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
    x = images()
    output = model(x)
    assert seen[0][0] is x and seen[0][1] is output
    assert kinds(model) == FUSED


def test_removing_a_hook_brings_the_fusion_back():
    model = fastres.convert(Block())
    handle = model.bn1.register_forward_hook(lambda m, i, o: None)
    assert kinds(model) == {"conv_bn_add_relu": 1}
    handle.remove()
    assert kinds(model) == FUSED


def test_hooks_inside_see_the_callers_memory_format():
    model = fastres.convert(nn.Sequential(Block(), nn.MaxPool2d(2), Block())).eval()
    seen = []
    x = images()
    assert model._fastres_entry
    with torch.no_grad():
        expected = model(x)
        handle = model[1].register_forward_hook(lambda m, i, o: seen.append(o.view(o.size(0), -1)))
        torch.testing.assert_close(model(x), expected)
        handle.remove()
    assert len(seen) == 1


# --- forwards and results of other kinds ---------------------------------------------------------


class Methods(Block):
    def forward_features(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.forward_features(x))) + x)


def test_another_method_than_forward():
    converted = assert_agrees(Methods(), images(), call="forward_features")
    assert kinds(converted) == FUSED
    assert_agrees(Methods(), images())


class CallsForward(nn.Module):
    """``self.block.forward(x)`` passes by ``__call__`` and its hooks."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block.forward(x)


def test_forward_called_directly():
    assert_agrees(CallsForward(), images())


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict, Pair])
def test_container_results(kind):
    class Two(Block):
        def forward(self, x):
            one, two = super().forward(x), self.conv1(x)
            if issubclass(kind, dict):
                return kind([("one", one), ("two", two)])
            return kind(one, two) if kind is Pair else kind((one, two))

    model = Two()
    # a class in a closure is code; the forward makes it with items that are traced
    converted = assert_agrees(model, images())
    assert type(converted(images())) is kind
    assert kinds(converted) == FUSED


class ViewsAndChanges(Block):
    """The view and what it looks at are one memory."""

    def forward(self, x):
        out = super().forward(x)
        flat = out.view(out.size(0), -1)
        flat.mul_(2)
        return out


def test_a_changed_view_stays_a_view():
    assert_agrees(ViewsAndChanges(), images(), layouts=LAYOUTS[:1], grad=False)


class OnStrides(Block):
    def forward(self, x):
        out = super().forward(x)
        return out * out.stride(1)


def test_code_that_looks_at_strides_gets_the_callers():
    model = nn.Sequential(OnStrides(), OnStrides())
    converted = assert_agrees(model, images())
    assert not any(getattr(m, "_fastres_entry", "") for m in converted.modules())


class ReturnsItsInput(Block):
    def forward(self, x):
        return super().forward(x), x


def test_an_input_that_is_returned_is_the_callers():
    converted = fastres.convert(ReturnsItsInput()).eval()
    x = images()
    assert converted(x)[1] is x
    assert kinds(converted) == FUSED


class ChangesItsInput(Block):
    def forward(self, x):
        out = super().forward(x)
        x.zero_()
        return out


def test_an_input_that_is_changed_is_the_callers():
    converted = fastres.convert(ChangesItsInput()).eval()
    x = images()
    with torch.no_grad():
        converted(x)
    assert not x.any()


def test_dropout_draws_what_eager_draws():
    model = nn.Sequential(Block(), nn.Dropout(0.3), Block())
    assert_agrees(model, images(), layouts=LAYOUTS[:1])


class RoundsDown(Block):
    def forward(self, x):
        return super().forward(x) * math.floor(2.5) * math.pi


def test_arithmetic_is_no_obstacle():
    assert kinds(assert_agrees(RoundsDown(), images())) == FUSED


class DefinesACollaborator(Block):
    """Helpers, comprehensions and inner functions are followed."""

    def forward(self, x):
        def twice(value):
            return value * factor

        factor = 2
        outs = [twice(out) for out in (super().forward(x), x)]
        return helper(*outs)


def helper(a, b):
    return F.relu(a + b)


def test_helpers_are_followed():
    converted = assert_agrees(DefinesACollaborator(), images())
    assert kinds(converted) == {**FUSED, "add_relu": 1}


class Aliased(nn.Module):
    """One ReLU under two names, one of which is replaced later."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), self.relu)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.body(x))


def test_a_module_under_two_names_is_looked_up_under_the_right_one():
    model = randomized(Aliased()).double()
    converted = fastres.convert(model, inplace=False)
    for m in (model, converted):
        m.body[2] = nn.Tanh()
    x = images().double()
    assert_same(results(converted, [x], True), results(model, [x], True))
    assert_same(results(converted, [x], False), results(model, [x], False))


class InPlace(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.add = add

    def forward(self, x, y):
        return F.relu(self.add(self.bn(self.conv(x)), y))


def adds_in_place(a, b):
    a += b
    return a


def adds(a, b):
    return a + b


def adds_gated(a, b):
    a = a * 2
    a += b
    return a


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("add", [adds_in_place, adds, adds_gated], ids=lambda add: add.__name__)
def test_mixed_operands_of_the_addition(add, training):
    """``+=`` keeps the left operand's dtype and shape; either operand may be a number."""
    model = randomized(InPlace(add)).train(training)
    converted = fastres.convert(model, inplace=False)
    x = images()
    for y in (x.double(), x.bfloat16(), x[:1], x[:, :, :1, :1], 3.0, 2, torch.ones(())):
        ours, eager = converted(x, y), model(x, y)
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    for m in (model, converted):
        m.conv, m.bn = nn.Conv2d(8, 1, 1), nn.Identity()
        torch.manual_seed(0)
        m.conv.reset_parameters()
    if add is not adds:
        for m in (model, converted):
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                m(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(x, x[:, :1]).dtype == model(x, x[:, :1]).dtype


class AddsANumber(Block):
    def forward(self, x, scale):
        return F.relu(scale + x) + F.relu(x.size(0) + x)


def test_a_number_before_the_sum():
    model = AddsANumber()
    converted = fastres.convert(model, inplace=False)
    x = images()
    for scale in (2.0, torch.tensor(3.0), x):
        assert torch.equal(converted(x, scale), model(x, scale))


@pytest.mark.parametrize("bad", [(1, 8, 9), (3, 8, 9, 9, 1), (3, 7, 9, 9)])
def test_a_wrong_input_fails_as_in_eager(bad):
    model = Block().eval()
    converted = fastres.convert(model, inplace=False)
    with pytest.raises(Exception) as eager:
        model(torch.randn(bad))
    with pytest.raises(type(eager.value)):
        converted(torch.randn(bad))


@pytest.mark.parametrize("empty", [(0, 8, 9, 9)])
def test_empty_batch(empty):
    model = Block().eval()
    converted = fastres.convert(model, inplace=False)
    assert converted(torch.randn(empty)).shape == model(torch.randn(empty)).shape


def test_a_profiler_may_watch_the_conversion():
    profile = cProfile.Profile()
    profile.enable()
    converted = fastres.convert(Block())
    profile.disable()
    assert kinds(converted) == FUSED
    assert profile.getstats()


def test_a_collector_may_run_during_the_conversion():
    """Finalisers and callbacks of the garbage collector are not the forward's code."""
    calls = []

    def callback(phase, info):
        global _collections
        _collections = calls.append(phase)

    gc.callbacks.append(callback)
    thresholds = gc.get_threshold()
    gc.set_threshold(20, 1, 1)
    try:
        assert kinds(fastres.convert(Block())) == FUSED
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(callback)
    assert calls


class EndsWithAnEffect(Block):
    """Drops an object whose finaliser does what a trace may not; Python swallows what it raises."""

    class Dropped:
        def __del__(self):
            global _collections
            _collections = 1

    def forward(self, x):
        self.Dropped()
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_effect_in_a_finaliser():
    assert kinds(fastres.convert(EndsWithAnEffect())) == {}


def test_another_default_device():
    with torch.device("meta"):
        assert kinds(fastres.convert(Block())) == FUSED


def test_nothing_is_left_of_a_trace():
    model = Remembers()
    before = {m: dict(m.__dict__) for m in model.modules()}
    fastres.convert(model)
    assert model.features == []
    for module, state in before.items():
        assert {k: v for k, v in module.__dict__.items() if not k.startswith("_fastres")} == state
    assert sys.getprofile() is None
    assert "__getattribute__" not in vars(nn.Module)
