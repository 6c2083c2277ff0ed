"""Programs: the extension runs a converted forward step by step, and whoever watches a module or
changes one sees what the author's forward would have shown."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from agreement import assert_close, assert_like_eager
from converting import Block, images, randomized
from torch import nn

import fastres
from fastres import ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the extension runs programs")


class Net(nn.Module):
    """A stem, two layers of blocks, something that is no block, and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(nn.Identity(), nn.GELU(), nn.Sequential(Block()))
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.conv(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.mean(x), 1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomized(Net()).eval()


def forwards(call) -> int:
    """How many Python functions of the name ``forward`` run in a call."""
    count = 0

    def see(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_name == "forward"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


# the model's own, the function generated for it, and nn.GELU's
AT_LEAST = 3


def compare(author: nn.Module, model: nn.Module, x) -> None:
    with torch.no_grad():
        assert_close(model(x), author(x), copy.deepcopy(author).double()(x.double()))


def test_blocks_run_without_python(net):
    model, x = fastres.convert(copy.deepcopy(net)), images(3, 16)
    compare(net, model, x)
    with torch.no_grad():
        assert forwards(lambda: model(x)) == AT_LEAST
        with fastres.backend("eager"):
            assert forwards(lambda: model(x)) > AT_LEAST


def test_containers_that_fuse_run_without_python_while_they_hold(net):
    """A shortcut's convolution and batch norm, listed in a Sequential: fused for its children."""
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    net.layer1[1].conv2 = randomized(shortcut).eval()
    author, model, x = copy.deepcopy(net), fastres.convert(net), images(3, 16)
    compare(author, model, x)
    with torch.no_grad():
        assert forwards(lambda: model(x)) == AT_LEAST
    for each in (author, model):
        each.layer1[1].conv2.append(nn.Tanh())
    compare(author, model, x)
    compare(author, model, x)


def test_training_records_the_same_graph(net):
    model, x = fastres.convert(copy.deepcopy(net)), images(3, 16)
    results = []
    for each in (net.train(), model.train()):
        each(x).square().sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters()}
        results.append(gradients | dict(each.named_buffers()))
    assert_like_eager(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", ["layer1", "layer1.1", "layer2.0", "layer2.2", "layer2.2.0"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_see_their_module(net, path, kind):
    model, x, seen = fastres.convert(net), images(3, 16), []
    module = model.get_submodule(path)
    with torch.no_grad():
        model(x)
        register = getattr(module, f"register_{kind}_hook")
        handle = register(lambda each, *values: seen.append(each))
        model(x)
        handle.remove()
        model(x)
    assert seen == [module]


def test_global_hooks_see_every_module(net):
    author, seen = copy.deepcopy(net), []
    model, x = fastres.convert(net), images(3, 16)
    hook = nn.modules.module.register_module_forward_hook
    handle = hook(lambda module, *_: seen.append(type(module).__name__))
    with torch.no_grad():
        model(x)
        ours, seen[:] = list(seen), []
        author(x)
    handle.remove()
    assert ours == seen


@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("of", [Block, nn.Sequential, nn.Identity])
def test_patched_classes_are_called(net, of, name, monkeypatch):
    model, x, seen = fastres.convert(net), images(3, 16), []
    cls = type(model.layer1[0]) if of is Block else of
    original = getattr(cls, name)

    def patched(self, x):
        seen.append(self)
        return original(self, x)

    monkeypatch.setattr(cls, name, patched)
    with torch.no_grad():
        model(x)
    assert seen == [module for module in model.modules() if type(module) is cls]


def test_patched_instances_sub_classes_and_compiled_ones(net):
    model, x = fastres.convert(net), images(3, 16)
    first, second = model.layer1
    first.forward = lambda x: x * 2
    second.__class__ = type("Half", (type(second),), {"forward": lambda self, x: x / 2})
    model.layer2[2]._compiled_call_impl = lambda x: x + 1
    with torch.no_grad():
        stem = model.relu(model.bn(model.conv(x)))
        expected = model.fc((nn.functional.gelu(model.pool(stem)) + 1).mean((2, 3)))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_replaced_modules_and_changed_modes(net):
    author, model, x = net, fastres.convert(copy.deepcopy(net)), images(3, 16)
    compare(author, model, x)
    for each in (author, model):
        torch.manual_seed(1)
        each.layer1[1] = Block().eval()
        each.layer1[0].conv2 = nn.Conv2d(8, 8, 1)
        each.layer2.append(nn.Tanh())
        each.layer2[2][0].bn1.train()
    compare(author, model, x)
    compare(author, model, x)


def test_what_a_module_raises_is_raised(net):
    class Refusing(nn.Module):
        def forward(self, x):
            raise LookupError("not today")

    model = fastres.convert(net)
    model.layer1[1] = Refusing()
    with pytest.raises(LookupError, match="not today"):
        model(images(3, 16))
    del model.layer1[0].conv1
    with pytest.raises((AttributeError, KeyError), match="conv1"):
        model(images(3, 16))


def test_values_are_freed_after_their_last_use(net):
    alive = []

    class Watching(nn.Module):
        def forward(self, x):
            gc.collect()
            alive.append([each() is not None for each in seen])
            y = x + 1
            seen.append(weakref.ref(y))
            return y

    seen = []
    net.layer2 = nn.Sequential(Watching(), Block(), Watching())
    model = fastres.convert(net)
    with torch.no_grad():
        model(images(3, 16))
    assert alive == [[], [False]]


class ManyOperands(Block):
    def forward(self, x):
        return torch.broadcast_tensors(*[super().forward(x)] * 17)[3]


def test_a_call_of_more_operands_than_a_program_gives():
    model = randomized(ManyOperands()).eval()
    ours = fastres.convert(model, inplace=False)
    x = images()
    with torch.no_grad():
        assert_like_eager({"output": ours(x)}, {"output": model(x)})
