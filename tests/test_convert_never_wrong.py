"""Hooks, unusual calls and results, and what else is going on in the process: never wrong."""

import copy
import cProfile
import gc
import math
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from converting import (
    FUSED,
    LAYOUTS,
    Block,
    assert_agrees,
    assert_same,
    images,
    kinds,
    randomized,
    reasons,
    results,
)
from torch import nn

import fastres

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert kinds(converted) == {**FUSED, "conv": 1}


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", [torch.jit.script, lambda m: torch.jit.trace(m, images())])
def test_a_script_module_inside_is_left_alone(compiler):
    """It runs as it is, and says so; what surrounds it is fused."""

    def model():
        torch.manual_seed(0)
        return randomized(nn.Sequential(Block(), Block())).eval()

    ours, eager = model(), model()
    ours[1] = compiler(ours[1])
    fastres.convert(ours)
    assert kinds(ours) == FUSED
    assert reasons(ours) == {
        f"1.{name}": "inside a ScriptModule" for name in ("conv1", "bn1", "conv2", "bn2", "relu")
    }
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), eager(x))
    assert set(reasons(fastres.convert(ours[1])).values()) == {"inside a ScriptModule"}
