"""Chains on a GPU, by either backend: beside the sites one by one, repeated, captured, and the
memory between forward and backward."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F

import fastres
from fastres.nn import BasicBlock, Bottleneck

LAST = torch.channels_last
pytestmark = pytest.mark.gpu
BLOCKS = {
    "bottleneck": lambda: Bottleneck(256, 64),
    "ResNeXt": lambda: Bottleneck(256, 128, groups=32, base_width=4),
    "basic block": lambda: BasicBlock(256, 256),
    "pre-activation": lambda: fastres.models.preact.PreActBottleneck(256, 64),
}


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request, monkeypatch):
    """Triton's own convolutions, whatever the table of choices says."""
    if not torch.cuda.is_available() or not fastres.backends()[request.param]:
        pytest.skip(f"the backend {request.param} cannot serve here")
    if request.param == "triton":
        choice = importlib.import_module("fastres.kernels.conv_choice")
        monkeypatch.setattr(choice, "serves", lambda *args, last, **keywords: last)
    with fastres.backend(request.param):
        yield request.param


def block_and_input(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().to("cuda", memory_format=LAST)
    x = torch.randn(16, 256, 28, 28, device="cuda").to(torch.bfloat16, memory_format=LAST)
    return block, x


def step(block, x):
    """Output, gradients and buffers of a step under autocast."""
    twin, given = copy.deepcopy(block), x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        output = twin(given)
    output.float().square().mean().backward()
    found = {"output": output.detach(), "input": given.grad} | dict(twin.named_buffers())
    return found | {name: parameter.grad for name, parameter in twin.named_parameters()}


@pytest.mark.parametrize("name", BLOCKS)
def test_beside_the_sites_one_by_one(name):
    """Of the same rounded values: another order of sums moves a few of them by a unit of bf16."""
    block, x = block_and_input(name)
    ours = step(block, x)
    with fastres.chained(False):
        theirs = step(block, x)
    for key, expected in theirs.items():
        error = (ours[key].double() - expected.double()).norm()
        assert error <= 2e-2 * expected.double().norm(), key


def test_two_runs_give_the_same_bits():
    block, x = block_and_input("bottleneck")
    first, second = step(block, x), step(block, x)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_less_is_kept():
    block, x = block_and_input("bottleneck")
    x.requires_grad_()
    kept = {}
    for together in (True, False):
        before = torch.cuda.memory_allocated()
        with fastres.chained(together), torch.autocast("cuda", torch.bfloat16):
            output = block(x)
        kept[together] = torch.cuda.memory_allocated() - before
        del output
    inner = 2 * 16 * 64 * 28 * 28 * 2  # two activations in bf16
    assert kept[False] - kept[True] >= 0.9 * inner


def test_cuda_graph():
    block, x = block_and_input("bottleneck")
    expected = step(block, x)["input"]
    given = x.clone().requires_grad_()

    def run():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            output = block(given)
        return torch.autograd.grad(output.float().square().mean(), given)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_inductor():
    block, x = block_and_input("bottleneck")
    expected = step(block, x)
    block.compile(fullgraph=True)
    twin, given = block, x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        output = twin(given)
    output.float().square().mean().backward()
    for found, like in ((output, expected["output"]), (given.grad, expected["input"])):
        assert F.mse_loss(found.float(), like.float()) <= 1e-3 * like.float().square().mean()
