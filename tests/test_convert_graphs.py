"""What makes a graph of a model makes one of a converted model, or calls it as it is."""

import copy

import pytest
import torch
from converting import assert_same, randomized
from test_convert_lifecycle import Block, Net, images
from torch import nn

import fastres
from fastres import sites

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> nn.Module:
    return randomized(Net()).double()


@pytest.fixture
def converted(model) -> nn.Module:
    return fastres.convert(model, inplace=False)


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(model, converted, training):
    x = images()
    for m in (model, converted):
        m.train(training)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    assert_same(converted.state_dict(), model.state_dict())
    copied = copy.deepcopy(converted)
    torch.testing.assert_close(
        torch.compile(copied, fullgraph=True, backend="aot_eager")(x), model(x)
    )


class Optional(Block):
    """A forward with arguments that may be left out, as in timm's DLA."""

    def forward(self, x, shortcut=None, scale=1.0):
        return super().forward(x)


class Callers(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_name, self.by_place = Optional(), Optional()

    def forward(self, x):
        return self.by_place(self.by_name(x, scale=1.0, shortcut=None), None)


def test_compile_of_arguments_that_are_given_though_they_need_not_be():
    model = Callers().eval()
    converted, x = fastres.convert(model, inplace=False), torch.randn(2, 8, 9, 9)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export(model, converted, strict):
    x = images()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            converted.eval(), (x,), dynamic_shapes={"x": {0: batch}}, strict=strict
        )
    assert sum("fastres.conv_bn_relu" in str(node.target) for node in program.graph.nodes) == 6
    larger = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(larger), model.eval()(larger))


def test_jit_trace_and_fx(model, converted):
    x = images()
    with torch.no_grad():
        traced = torch.jit.trace(converted.eval(), x)
    torch.testing.assert_close(traced(x), model.eval()(x))
    graph = torch.fx.symbolic_trace(converted)
    torch.testing.assert_close(graph(x), model(x))


def test_the_first_call_may_be_a_jit_trace():
    """Of a convolution without batch norm: what is made for it must not become a part of the trace."""
    model = nn.Sequential(nn.Conv2d(5, 7, 1), nn.Sigmoid(), nn.Conv2d(7, 5, 1)).eval()
    sites._unchanging.cache_clear()
    x = torch.randn(2, 5, 4, 6)
    with torch.no_grad():
        traced = torch.jit.trace(fastres.convert(model, inplace=False), x)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_jit_trace_that_records_gradients(model, converted, training):
    """Its own check looks at another run, without gradients: that one takes other operators."""
    x = images()
    traced = torch.jit.trace(converted.train(training), x, check_trace=False)
    converted.load_state_dict(model.state_dict())  # tracing was a step of the statistics
    ours, eager = traced(x), model.train(training)(x)
    torch.testing.assert_close(ours, eager)
    ours.sum().backward()
    eager.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(converted.get_parameter(name).grad, parameter.grad)


def test_functional_call(model, converted):
    x = images()
    state = {name: tensor * 1.1 for name, tensor in model.eval().state_dict().items()}
    torch.testing.assert_close(
        torch.func.functional_call(converted.eval(), state, x),
        torch.func.functional_call(model, state, x),
    )
