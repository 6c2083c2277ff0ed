"""The Triton backend under Triton's interpreter, from the kernels to a trained block."""

import copy
import functools
import itertools
import sys

import pytest
import torch
from agreement import (
    FLOATS,
    Calls,
    assert_close,
    assert_like_eager,
    assert_rule,
    assert_same_bits,
    away_from_zero,
    outcome,
    spread,
    widened,
)
from test_bn_relu import VARIANTS, check, eager, operands_for, ours
from torch import nn

import fastres
from fastres import functional, launches, ops, reference

pytestmark = pytest.mark.usefixtures("served_by_interpreted_triton")

TRITON = ops.OPERATORS["triton"]
# masked tails on every side, one pixel, one channel, several tiles and segments
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 5), (7, 19, 1, 1)]
# two blocks of channels, or a program for each channel
LARGER = {"contiguous": (5, 4, 11, 13), "channels_last": (5, 70, 11, 13)}
LAYOUTS = list(LARGER)


def all_operators_are_tritons(call):
    with Calls() as calls:
        call()
    assert calls.names and all(name.startswith("triton_") for name in calls.names)
    return calls.names


@pytest.mark.parametrize("layout, other", itertools.product([*LAYOUTS, "sliced"], LAYOUTS))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_relu(dtype, layout, other):
    for shape in SHAPES:
        operands = {
            "input": spread(shape, dtype, layout),
            "residual": spread(shape, dtype, other),
        }
        exact = widened(operands)
        grad = away_from_zero(spread(shape, dtype, other), exact["input"] + exact["residual"])
        found = outcome(functional.add_relu, operands, grad)
        expected = outcome(reference.add_relu, operands, grad)
        assert_rule(found, expected, outcome(reference.add_relu, exact, grad.double()))
        last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert found["output"].is_contiguous(memory_format=last)
        if dtype != torch.bfloat16:  # which the interpreter does not round
            for name, value in found.items():
                assert torch.equal(value, expected[name])


@pytest.mark.parametrize("residual, relu", VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_relu(layout, training, residual, relu):
    for shape in [*SHAPES, LARGER[layout]]:
        operands = operands_for(shape, torch.float32, layout, residual)
        check(operands, training=training, relu=relu)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bn_relu_in_other_dtypes(dtype, mixed, layout):
    operands = operands_for(LARGER[layout], dtype, layout, True, mixed and dtype.itemsize == 2)
    check(operands, training=True)
    check(operands | {"residual": None}, training=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_segments(monkeypatch, layout):
    """Tall and thin, short and wide, a single large map; merged in several rounds."""
    launchers = sys.modules[launches.launcher("bn_relu").__module__]
    monkeypatch.setattr(launchers, "_MERGE", {"BLOCK_S": 4, "BLOCK_C": 64})
    for shape in [(9, 3, 41, 43), (49, 301, 1, 1), (1, 2, 131, 137), (40, 5, 7, 7)]:
        check(operands_for(shape, torch.float32, layout, True), training=True)


@pytest.mark.parametrize(
    "layout, residual_layout", [("sliced_last", "contiguous"), ("transposed", "expanded")]
)
def test_operands_of_different_layouts(layout, residual_layout):
    operands = operands_for((3, 5, 7, 11), torch.float32, layout, True)
    operands["residual"] = spread((3, 5, 7, 11), torch.float32, residual_layout)
    check(operands, training=True)


@pytest.mark.parametrize("how", [
    {"running_mean": None, "running_var": None},
    {"weight": None, "bias": None},
    {"weight": None},
    {"bias": None},
], ids=",".join)  # fmt: skip
def test_absent_vectors(how):
    operands = operands_for((3, 5, 7, 11), torch.float32, "channels_last", True) | how
    grad = spread((3, 5, 7, 11), torch.float32)
    call, plain = (functools.partial(f, training=True) for f in (ours, eager))
    assert_rule(
        outcome(call, operands, grad),
        outcome(plain, operands, grad),
        outcome(plain, widened(operands), grad.double()),
    )


@pytest.mark.parametrize("momentum, eps", [(0.0, 1e-12), (0.3, 0.5), (1.0, 1e-5)])
def test_momentum_and_eps(momentum, eps):
    for dtype in (torch.float32, torch.float64):
        operands = operands_for((3, 5, 7, 11), dtype, "contiguous", False)
        check(operands, training=True, momentum=momentum, eps=eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outlier_first", [False, True])
def test_statistics_survive_cancellation(layout, outlier_first):
    """Mean 1e4 and std 1: E[x^2] - E[x]^2 would lose every digit in fp32."""
    input = spread((8, 3, 23, 29), torch.float32, layout, mean=1e4)
    if outlier_first:
        input[0, :, 0, 0] = 0.0
    variance, mean = torch.var_mean(input.double(), (0, 2, 3), correction=0)
    _, save_mean, save_invstd = TRITON.bn_relu(
        input, None, None, None, None, None, True, 0.1, 1e-5, False
    )
    assert (save_mean - mean).abs().max() < 2e-3  # two units in the last place of 1e4
    torch.testing.assert_close(save_invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


def test_statistics_are_kept_in_fp32():
    operands = operands_for((5, 7, 31, 29), torch.bfloat16, "contiguous", False, mixed=True)
    _, mean, invstd = TRITON.bn_relu(*operands.values(), True, 1.0, 1e-30, True)
    assert mean.dtype == invstd.dtype == torch.float32
    variance, exact = torch.var_mean(operands["input"].double(), (0, 2, 3), correction=0)
    assert_close(mean, mean, exact, "mean")
    assert_close(invstd, invstd, variance.rsqrt(), "invstd")
    torch.testing.assert_close(operands["running_mean"].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic(layout):
    operands = operands_for(LARGER[layout], torch.float32, layout, True)
    grad = spread(LARGER[layout], torch.float32, layout)
    call = functools.partial(ours, training=True)
    assert_same_bits(outcome(call, operands, grad), outcome(call, operands, grad))


@pytest.mark.parametrize("training", [True, False])
def test_relu_mask_is_the_forwards(training):
    """Tiny scales put every pre-activation next to zero, where another rounding differs."""
    shape = (3, 8, 7, 9)
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        operands = operands_for(shape, dtype, layout, False, mixed=True)
        operands |= {"weight": operands["weight"] * 1e-3, "bias": torch.zeros(8)}
        ones = torch.ones(shape, dtype=dtype)
        found = outcome(functools.partial(ours, training=training), operands, ones)
        assert torch.equal(found["grad of bias"], (found["output"] > 0).sum((0, 2, 3)).float())
        if not training:
            assert torch.equal(found["grad of input"] != 0, found["output"] > 0)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide):RuntimeWarning")  # numpy's
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_values_behave_as_eager(layout, training):
    operands = operands_for((3, 7, 5, 5), torch.float32, layout, True)
    operands["input"][0, 1, 2, 3] = float("nan")
    operands["input"][0, 2, 2, 3] = float("inf")
    operands["input"][0, 3, 2, 3] = -float("inf")
    operands["weight"][4] = float("nan")
    operands["bias"][5] = float("inf")
    operands["running_var"][6] = -1.0
    grad = torch.ones(3, 7, 5, 5)
    found, expected = (
        outcome(functools.partial(function, training=training), operands, grad)
        for function in (ours, eager)
    )
    assert_like_eager(found, expected)


@pytest.mark.parametrize("mask", itertools.product([True, False], repeat=3))
@pytest.mark.parametrize("training", [True, False])
def test_unwanted_gradients_are_empty(mask, training):
    operands = operands_for((3, 5, 7, 11), torch.float32, "channels_last", True)
    input, weight, bias = (operands[name] for name in ("input", "weight", "bias"))
    output, mean, invstd = TRITON.bn_relu(*operands.values(), training, 0.1, 1e-5, True)
    grad = spread((3, 5, 7, 11), torch.float32)
    rest = (output, weight, bias, mean, invstd, training, True)
    everything = reference.bn_relu_backward(grad, input, *rest, [True, True, True])
    some = TRITON.bn_relu_backward(grad, input, *rest, list(mask))
    wanted = (mask[0], mask[1], mask[2], mask[2])
    for given, full, want in zip(some, everything, wanted, strict=True):
        assert given.dtype == full.dtype
        if want:
            torch.testing.assert_close(given, full, rtol=1e-5, atol=1e-5)
        else:
            assert given.shape == (0,)


def test_empty_tensors():
    for shape in [(0, 3, 5, 7), (2, 3, 0, 7)]:
        x, v = torch.empty(shape), torch.ones(3)
        assert TRITON.add_relu(x, x).shape == TRITON.add_relu_backward(x, x).shape == shape
        output, mean, invstd = TRITON.bn_relu(x, x, v, v, v, v, False, 0.1, 1e-5, True)
        backward = (x, x, output, v, v, mean, invstd, False, True, [True, True, True])
        shapes = [gradient.shape for gradient in TRITON.bn_relu_backward(*backward)]
        assert output.shape == shape and shapes == [shape, shape, (3,), (3,)]


def test_errors_come_before_a_launch():
    x, v = torch.randn(2, 3, 5, 7), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"residual: expected shape \(2, 3, 5, 7\)"):
        functional.add_relu(x, x[:1])
    with pytest.raises(RuntimeError, match=r"weight: expected shape \(3,\)"):
        functional.bn_relu(x, v, v, torch.ones(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.bn_relu(x[:1, :, :1, :1], v, v, training=True)
    with pytest.raises(RuntimeError, match="grad_output: expected torch.float32 of shape"):
        TRITON.add_relu_backward(x[:1], x)
    with pytest.raises(RuntimeError, match="output: expected torch.float32 of shape"):
        mask = [True, True, True]
        TRITON.bn_relu_backward(x, x, x.double(), v, v, v, v, True, True, mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, y = (spread((2, 3, 5, 7), torch.float32, layout) for _ in range(2))
    v, w = torch.rand(3) + 0.5, torch.rand(3) + 0.5
    mask = [True, True, True]
    for operator, arguments in [
        (TRITON.add_relu, (x, y)),
        (TRITON.add_relu_backward, (x, y)),
        (TRITON.bn_relu, (x, y, v, w, v, w, True, 0.1, 1e-5, True)),
        (TRITON.bn_relu, (x, None, v, w, None, None, False, 0.1, 1e-5, False)),
        (TRITON.bn_relu_backward, (x, y, x, v, w, v, w, True, True, mask)),
        (TRITON.bn_relu_backward, (x, y, None, v, w, v, w, False, True, mask)),
    ]:
        torch.library.opcheck(operator, tuple(map(_clone, arguments)))


def _clone(argument):
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


# --- the whole stack ------------------------------------------------------------------------------


def test_backward_stays_with_the_backend_that_served_forward():
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    v = torch.ones(3)
    output = functional.add_relu(functional.bn_relu(x, v, v, training=True), x)
    with fastres.backend("eager"), Calls() as calls:
        output.sum().backward()
    assert calls.names == ["triton_add_relu_backward", "triton_bn_relu_backward"]


def test_auto_does_not_interpret():
    x = torch.randn(2, 3, 5, 7)
    with fastres.backend("auto"), Calls() as calls:
        functional.add_relu(x, x)
    assert calls.names == ["add_relu"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    torch._dynamo.reset()

    def call(x, v, w, mean, var):
        return functional.add_relu(functional.bn_relu(x, mean, var, v, w, training=True), x)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 3, 5, 7), torch.rand(3), torch.rand(3)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        buffers = torch.zeros(3), torch.ones(3)
        output = function(*leaves, *buffers)
        output.square().sum().backward()
        named = {"output": output.detach(), "mean": buffers[0], "var": buffers[1]}
        results.append(named | {f"grad {i}": leaf.grad for i, leaf in enumerate(leaves)})
    assert_like_eager(results[1], results[0])
    torch._dynamo.reset()


def residual_block(torchvision):
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
    return nn.Sequential(BasicBlock(3, 4, 2, shortcut), BasicBlock(4, 4))


def test_a_converted_block_is_trained_beside_eager(torchvision):
    """Three steps in fp32: losses, parameters and buffers stay together, all by Triton's kernels,
    site by site."""
    plain = residual_block(torchvision)
    fused = fastres.convert(copy.deepcopy(plain))
    images, losses = torch.randn(3, 3, 8, 8), {}
    for net, backend in ((plain, "eager"), (fused, "triton")):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with fastres.backend(backend), fastres.chained(False), Calls() as calls:
            losses[backend] = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = net(images).square().mean()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.detach())
    forward, backward = "triton_conv_bn_relu_training", "triton_bn_relu_backward"
    assert calls.names.count(forward) == calls.names.count(backward) == 15
    assert all(name.startswith("triton_") for name in calls.names)
    assert_like_eager(
        {"losses": torch.stack(losses["triton"])} | fused.state_dict(),
        {"losses": torch.stack(losses["eager"])} | plain.state_dict(),
    )
    plain.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(images), plain(images), rtol=1e-4, atol=1e-4)
