"""Branches: the blocks of ``fastres.nn``, of the model families and of converted models as chains,
under Triton's interpreter; and what is left to the sites one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls, assert_like_eager
from torch import nn

import fastres
from fastres.models import plain, preact, teaching
from fastres.nn import BasicBlock, Bottleneck

pytestmark = pytest.mark.usefixtures("served_by_interpreted_triton")

LAST = torch.channels_last


def projection(channels, filters, stride):
    return nn.Sequential(
        nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
    )


# name to a block for 8 channels and its links
BLOCKS = {
    "BasicBlock": (lambda: BasicBlock(8, 8), 2),
    "BasicBlock, strided": (lambda: BasicBlock(8, 16, 2, projection(8, 16, 2)), 2),
    "Bottleneck": (lambda: Bottleneck(8, 2), 3),
    "Bottleneck, groups": (
        lambda: Bottleneck(8, 4, 2, projection(8, 16, 2), groups=4, base_width=32), 3,
    ),
    "plain": (lambda: plain.PlainBlock(8, 8), 2),
    "teaching": (lambda: teaching.TeachingBlock(8, 8), 2),
    "pre-activation": (lambda: preact.PreActBlock(8, 8), 2),
    "pre-activation, projecting": (
        lambda: preact.PreActBlock(8, 16, 2, nn.Conv2d(8, 16, 1, 2, bias=False)), 2,
    ),
    "pre-activation bottleneck": (lambda: preact.PreActBottleneck(8, 2), 3),
}  # fmt: skip


def outcome(net, inputs, call=lambda net, x: net(x), backend="triton"):
    """Output, gradients and buffers of one call in training, and the operators it took."""
    twin = copy.deepcopy(net).train()
    x = inputs.clone().requires_grad_()
    with fastres.backend(backend), Calls() as calls:
        output = call(twin, x)
        output.square().mean().backward()
    found = {"output": output.detach(), "input": x.grad} | dict(twin.named_buffers())
    # in front of a batch norm a bias has no gradient but rounding
    grads = {name: p.grad for name, p in twin.named_parameters() if "conv1.bias" not in name}
    return found | {name: grad for name, grad in grads.items() if grad is not None}, calls.names


def like_eager(net, inputs, links, call=lambda net, x: net(x)):
    """Numbers and buffers are eager's, and ``links`` convolutions were a chain's."""
    ours, names = outcome(net, inputs, call)
    eager, _ = outcome(net, inputs, call, "eager")
    assert_like_eager(ours, eager, rtol=2e-3, atol=2e-4)
    assert names.count("triton_bn_relu_conv") == links
    return names


def images(channels=8):
    return torch.randn(2, channels, 6, 5).to(memory_format=LAST)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_chains(name):
    make, links = BLOCKS[name]
    net = make().to(memory_format=LAST)
    names = like_eager(net, images(), links)
    with fastres.chained(False):
        assert like_eager(net, images(), 0).count("triton_bn_relu_conv_backward") == 0
    assert names.count("triton_bn_relu_conv_backward") >= links - 1


def test_three_steps_of_a_network():
    net = nn.Sequential(Bottleneck(8, 2), BasicBlock(8, 16, 2, projection(8, 16, 2)))
    net.to(memory_format=LAST)
    results = {}
    for backend in ("triton", "eager"):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(1)
        with fastres.backend(backend):
            for _ in range(3):
                optimizer.zero_grad()
                twin(images()).square().mean().backward()
                optimizer.step()
        results[backend] = twin.state_dict()
    assert int(results["triton"]["0.bn2.num_batches_tracked"]) == 3
    assert_like_eager(results["triton"], results["eager"], rtol=1e-3, atol=1e-3)


# --- what the sites do one by one ----------------------------------------------------------------


def hooked(net):
    net.bn1.register_forward_hook(lambda module, args, output: 2 * output)


def frozen(net):
    net.bn2.eval()


def cumulative(net):
    net.bn1.momentum = None


def patched(net):
    net.conv2.forward = lambda x: 2 * nn.Conv2d.forward(net.conv2, x)


def replaced(net):
    net.bn1 = nn.GroupNorm(2, 8)


def activated(net):
    net.relu = nn.GELU()


@pytest.mark.parametrize(
    "change", [hooked, frozen, cumulative, patched, replaced, activated], ids=lambda f: f.__name__
)
def test_what_is_watched_or_unlike_runs_site_by_site(change):
    net = BasicBlock(8, 8).to(memory_format=LAST)

    def call(net, x):
        net = copy.copy(net)
        change(net)
        return net(x)

    like_eager(net, images(), 0, call)


def test_evaluation_is_no_chain():
    net = BasicBlock(8, 8).to(memory_format=LAST).eval()
    x = images()
    with torch.no_grad(), Calls() as calls:
        ours = net(x)
    assert calls.names == ["triton_conv_bn_relu"] * 2
    with torch.no_grad(), fastres.backend("eager"):
        torch.testing.assert_close(ours, net(x), rtol=1e-4, atol=1e-4)


def test_a_refused_argument_is_reported_by_its_site():
    """And the batch norm before it has seen the batch, as in eager."""
    net = BasicBlock(8, 8)
    net.conv2 = nn.Conv2d(4, 8, 3, padding=1)
    for backend in ("triton", "eager"):
        twin = copy.deepcopy(net)
        with fastres.backend(backend), pytest.raises(RuntimeError, match="channels"):
            twin(images())
        counted = (int(twin.bn1.num_batches_tracked), int(twin.bn2.num_batches_tracked))
        assert counted == (1, 0), backend


def test_a_batch_that_fails_is_not_counted(monkeypatch):
    net = BasicBlock(8, 8)

    def refuse(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fastres.branches.chain, "chain", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        net(images())
    assert int(net.bn1.num_batches_tracked) == int(net.bn2.num_batches_tracked) == 0


def test_autocast():
    """In half precision, with gradients of fp32 parameters; a batch norm at the beginning keeps its
    input's dtype, and so is no part of a chain."""
    for name, links in (("Bottleneck", 3), ("pre-activation", 0)):
        net = BLOCKS[name][0]().to(memory_format=LAST)
        inputs, results = images(), []
        for backend in ("triton", "eager"):

            def call(net, x):
                with torch.autocast("cpu", torch.float16):
                    return net(x)

            results.append(outcome(net, inputs, call, backend))
        assert results[0][1].count("triton_bn_relu_conv") == links
        assert_like_eager(*(found for found, _ in results), rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("asked, expected", [("0", False), ("1", True)])
def test_the_environment_decides(asked, expected, monkeypatch):
    monkeypatch.setenv("FASTRES_CHAINED", asked)
    assert fastres.branches._asked() is expected
    monkeypatch.setenv("FASTRES_CHAINED", "yes")
    with pytest.raises(ValueError, match="FASTRES_CHAINED: expected 0 or 1, got 'yes'"):
        fastres.branches._asked()


# --- converted models ----------------------------------------------------------------------------


class Body(nn.Module):
    """Two convolutions, two batch norms and a ReLU, for forwards of many kinds."""

    links, differentiable = 2, True

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Identity()
        self.layers = nn.Sequential(self.conv1, self.bn1, self.relu, self.conv2, self.bn2)


class Functional(Body):
    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class InPlace(Body):
    def forward(self, x):
        y = self.relu(self.drop(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Listed(Body):
    def forward(self, x):
        return self.relu(self.layers(x) + x)


class Normalised(Body):
    def __init__(self):
        super().__init__()
        self.bn3 = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.relu(self.bn1(x))
        return self.bn3(self.conv2(self.relu(self.bn2(self.conv1(y)))))


class Shared(Body):
    links = 0

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn1(self.conv1(y)) + x)


class UsedTwice(Body):
    links = 0

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + y)


class ChangedBetween(Body):
    links, differentiable = 0, False

    def forward(self, x):
        x = x * 1
        y = self.relu(self.bn1(self.conv1(x)))
        x.mul_(2)
        return self.relu(self.bn2(self.conv2(y)) + x)


class Broadcast(Body):
    links = 0

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize(
    "kind", [Functional, InPlace, Listed, Normalised, Shared, UsedTwice, ChangedBetween, Broadcast],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_converted_forwards(kind):
    net, inputs = kind().to(memory_format=LAST), images()
    converted = fastres.convert(copy.deepcopy(net))
    if kind.differentiable:
        ours, names = outcome(converted, inputs)
        eager, _ = outcome(net, inputs, backend="eager")
    else:
        with torch.no_grad(), Calls() as calls:
            ours, names = {"output": converted(inputs)}, calls.names
        with torch.no_grad(), fastres.backend("eager"):
            eager = {"output": net(inputs)}
    assert_like_eager(ours, eager, rtol=2e-3, atol=2e-4)
    assert names.count("triton_bn_relu_conv") == kind.links


@pytest.mark.parametrize("backend, converted", [("aot_eager", True), ("inductor", False)])
def test_compiled_in_one_graph(backend, converted):
    torch._dynamo.reset()
    net = nn.Sequential(Bottleneck(8, 2), preact.PreActBlock(8, 8))
    net = fastres.convert(nn.Sequential(InPlace())) if converted else net
    net.to(memory_format=LAST)
    x, results = images(), []
    for compiled in (False, True):
        twin, given = copy.deepcopy(net), x.clone().requires_grad_()
        twin(given)  # a converted module plans at its first call
        call = torch.compile(twin, fullgraph=True, backend=backend) if compiled else twin
        output = call(given)
        output.square().mean().backward()
        found = {"output": output.detach(), "input": given.grad} | dict(twin.named_buffers())
        results.append(found | {name: p.grad for name, p in twin.named_parameters()})
    assert_like_eager(results[1], results[0], rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
