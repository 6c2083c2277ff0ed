"""torch.compile in one graph and torch.export: the same numbers, the fused operators still inside,
buffers updated exactly once."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_like_eager, batch_norm_operands
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastres
from fastres import functional

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A torch.compile backend that runs the graphs as they are and keeps their operators."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph, inputs):
        def keep(operators):
            def compiler(module, _):
                operators.extend(
                    node.target for node in module.graph.nodes if node.op == "call_function"
                )
                return make_boxed_func(module.forward)

            return compiler

        return aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))(
            graph, inputs
        )

    @staticmethod
    def names(operators) -> list[str]:
        """Fused operators of a graph; functionalised, mutating ones are arguments of a wrapper."""
        return [str(o) for o in operators if "fastres" in str(o) or "auto_functionalized" in str(o)]


def block(training):
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    net = nn.ModuleDict({
        "block": fastres.nn.BasicBlock(3, 8, 2, shortcut),
        "bottleneck": fastres.nn.Bottleneck(8, 2),
        "bn": fastres.nn.BNReLU(8),
        "add": fastres.nn.AddReLU(),
        "conv": fastres.nn.ConvBNReLU(8, 4, bias=True),
    })  # fmt: skip
    return net.train(training)


def run(net, x):
    x = net["bottleneck"](net["block"](x))
    return net["conv"](net["add"](net["bn"](x), x))


def everything(net, call, x, backward=True):
    """Output, gradients and buffers of one call."""
    x = x.clone().requires_grad_(backward)
    output = call(net, x)
    result = {"output": output.detach().clone()}
    if backward:
        output.square().mean().backward()
        result |= {"input": x.grad} | {name: p.grad for name, p in net.named_parameters()}
    return result | {name: b.clone() for name, b in net.named_buffers()}


def images(batch=2, size=9):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_blocks_in_one_graph(training):
    expected = everything(block(training), run, images())
    net = block(training)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_like_eager(everything(net, compiled, images()), expected, rtol=1e-4, atol=1e-5)
    if training:
        counts = {int(b) for name, b in net.named_buffers() if name.endswith("batches_tracked")}
        assert counts == {1}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductor(training):
    """The default compiler generates code around the fused operators."""
    site = fastres.nn.ConvBNReLU(3, 3).train(training)
    twin = copy.deepcopy(site)

    def call(site, x):
        return site(x, residual=x * 2) + 1

    compiled = torch.compile(call, fullgraph=True)
    assert_like_eager(
        everything(site, compiled, images()), everything(twin, call, images()), 1e-4, 1e-5
    )


def test_eval_without_gradients_in_one_graph():
    recorder = Recorder()
    net = block(training=False)
    compiled = torch.compile(run, fullgraph=True, backend=recorder)
    with torch.no_grad():
        torch.testing.assert_close(compiled(net, images()), run(net, images()))
    # block 3, bottleneck 3, the last one; then bn_relu and add_relu
    assert str(recorder.forward).count("fastres.conv_bn_relu") == 7
    assert recorder.forward.count(torch.ops.fastres.add_relu.default) == 1


def test_the_fused_operators_are_in_the_compiled_graphs():
    """Forward and backward, instead of a decomposition into PyTorch's operators."""
    recorder = Recorder()
    everything(block(True), torch.compile(run, fullgraph=True, backend=recorder), images())
    backward = recorder.backward
    assert backward.count(torch.ops.fastres.bn_relu_backward.default) == 8
    assert backward.count(torch.ops.fastres.add_relu_backward.default) == 1
    assert torch.ops.fastres.add_relu.default in recorder.forward
    assert torch.ops.aten.native_batch_norm_backward.default not in backward


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_calls_in_one_graph(training):
    def call(input, residual, weight, mean, var, bn_weight, bn_bias):
        x = functional.conv_bn(
            input, weight, None, 1, "same", 1, 1, mean, var, bn_weight, bn_bias, training
        )
        x = functional.bn_relu(x, mean, var, bn_weight, bn_bias, training)
        x = functional.bn_add_relu(x, residual, None, None, bn_weight, None, True, eps=1e-3)
        return functional.add_relu(x, input)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        mean, var, *parameters = batch_norm_operands(3, torch.float32).values()
        leaves = [images(), images(3)[:2], torch.randn(3, 3, 3, 3), *parameters]
        input, residual, weight, *parameters = (leaf.requires_grad_() for leaf in leaves)
        output = function(input, residual, weight, mean, var, *parameters)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append(
            {"output": output.detach(), "mean": mean, "var": var} | dict(enumerate(gradients))
        )
    assert_like_eager(*results, rtol=1e-4, atol=1e-4)


def test_changing_sizes_and_modes():
    """Recompiled or dynamic, always right: batch, map size, train and eval in turn."""

    def call(site, x):
        return site(x, residual=x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, plain = (fastres.nn.ConvBNReLU(3, 3) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    for batch, size, training in [(2, 9, True), (3, 9, True), (3, 13, False), (5, 7, True)]:
        x = images(batch, size)
        for net in (ours, plain):
            net.train(training)
            net.zero_grad()
        assert_like_eager(
            everything(ours, compiled, x), everything(plain, call, x), rtol=1e-4, atol=1e-4
        )


def test_dynamic_shapes_in_one_graph():
    recorder = Recorder()
    compiled = torch.compile(run, fullgraph=True, backend=recorder, dynamic=True)
    net = block(training=False)
    with torch.no_grad():
        for batch, size in [(2, 9), (3, 11), (5, 17)]:
            x = images(batch, size)
            torch.testing.assert_close(compiled(net, x), run(net, x))
    assert str(recorder.forward).count("fastres.conv_bn_relu") == 7, "compiled more than once"


def test_the_backend_is_part_of_the_guards():
    recorder = Recorder()
    compiled = torch.compile(functional.add_relu, fullgraph=True, backend=recorder)
    x = images()
    compiled(x, x)
    assert recorder.forward == [torch.ops.fastres.add_relu.default]
    recorder.forward.clear()
    with fastres.backend("eager"):
        torch.testing.assert_close(compiled(x, x), F.relu(x + x))
    assert torch.ops.fastres.add_relu.default not in recorder.forward and recorder.forward


def test_autocast_in_one_graph():
    def call(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return run(net, x).float()

    expected = everything(block(True), call, images())
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    # the same kernels on the same bf16 values; only casts may move
    assert_like_eager(everything(block(True), compiled, images()), expected, rtol=2e-2, atol=2e-2)


def test_hooked_modules_keep_their_hooks():
    net, seen = block(training=False), []
    net["bn"].bn.register_forward_hook(lambda *_: seen.append("bn"))
    compiled = torch.compile(run, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(net, images()), run(net, images()))
    assert seen == ["bn", "bn"]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_export_of_an_eval_model(strict, grad):
    torch.manual_seed(0)
    model = fastres.models.resnet18(num_classes=10).eval()
    x = images(2, 64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), strict=strict)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
        lowered = program.run_decompositions()
        assert not lowered.graph_signature.buffers_to_mutate, "eval writes no buffer"
        torch.testing.assert_close(lowered.module()(x), expected, rtol=1e-4, atol=1e-5)
    if not grad:
        names = [str(node.target) for node in program.graph.nodes]
        operators = {"conv_bn_relu": 19, "conv_bn_relu_pool": 1, "mean_linear": 1}
        for name, count in operators.items():
            assert names.count(f"fastres.{name}.default") == count


def test_export_with_a_dynamic_batch_saves_and_loads():
    model = fastres.models.resnet18(num_classes=10).eval()
    with torch.no_grad():
        program = torch.export.export(
            model, (images(2, 64),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for batch in (1, 2, 5):
            x = images(batch, 64)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiled_and_plain_models_share_their_parameters():
    """A step on one is seen by the other: no folded weights are baked into the graph."""
    net = block(training=False)
    twin = copy.deepcopy(net)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(net, images())
        for model in (net, twin):
            model["block"].conv1.weight.mul_(-1)
            model["block"].bn1.running_var.data.mul_(2)
        after = compiled(net, images())
    assert not torch.allclose(before, after)
    with torch.no_grad(), fastres.backend("eager"):
        torch.testing.assert_close(after, run(twin, images()), rtol=1e-4, atol=1e-5)


def test_compiled_autograd():
    """The backward of a net that ran uncompiled, traced and compiled as a whole."""
    net, x = block(training=True), images()
    expected = everything(copy.deepcopy(net), run, x)
    compiler = functools.partial(torch.compile, backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        ours = everything(net, run, x)
    assert_like_eager(ours, expected, rtol=1e-5, atol=1e-6)


class Written(nn.Module):
    """As tutorials write it: the forward calls ReLU and pooling through ``F``."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, images):
        features = F.relu(self.bn(self.conv(images)))
        return F.avg_pool2d(features, 4)


def test_forwards_that_call_functions_in_one_graph():
    # Dynamo compared the names of the generated forward's globals with plain strings.
    torch.manual_seed(0)
    model, images = fastres.convert(Written()).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(compiled, expected)
