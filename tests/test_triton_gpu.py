"""The elementwise Triton kernels on a CUDA device: real shapes, streams, graphs, large tensors."""

import functools

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_rule, assert_same_bits, batch_norm_operands

import fastres
from fastres import functional, launches, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(launches.INTERPRETS, reason="TRITON_INTERPRET is set"),
]

# ResNet-50's maps at a large and a small batch, one tall and thin, one short and wide
SHAPES = [(64, 64, 56, 56), (64, 256, 56, 56), (32, 2048, 7, 7), (1, 2048, 7, 7), (8, 3, 600, 600)]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
MARGIN = 0.1  # around zero, where another rounding flips the ReLU's mask


@pytest.fixture(autouse=True)
def served_by_triton():
    with fastres.backend("triton"):
        yield


def activation(shape, dtype, layout):
    values = torch.randn(shape, device="cuda", dtype=torch.float32) * 1.5 + 0.5
    return values.to(dtype).to(memory_format=layout)


def operands_for(shape, dtype, layout, residual=True):
    vectors = batch_norm_operands(shape[1], torch.float32)
    return {
        "input": activation(shape, dtype, layout),
        "residual": activation(shape, dtype, layout) if residual else None,
        **{name: vector.cuda() for name, vector in vectors.items()},
    }


def ours(input, residual, running_mean, running_var, weight, bias, training=True, relu=True):
    return functional.batch_norm(
        input, residual, running_mean, running_var, weight, bias, training, 0.1, 1e-5, relu
    )


def eager(input, residual, running_mean, running_var, weight, bias, training=True, relu=True):
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.1, 1e-5)
    output = output if residual is None else output + residual
    return F.relu(output) if relu else output


def outcome(call, operands, grad):
    """As :func:`agreement.outcome`, which the running statistics leave as they were."""
    leaves = {
        name: None if t is None else t.clone().requires_grad_("running" not in name)
        for name, t in operands.items()
    }
    output = call(**leaves)
    output.backward(grad.to(output.dtype))
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            found[name] = leaf.detach() if "running" in name else leaf.grad
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_eager(shape, dtype, layout, residual, training):
    operands = operands_for(shape, dtype, layout, residual)
    exact = {name: None if t is None else t.double() for name, t in operands.items()}
    calls = [functools.partial(f, training=training) for f in (ours, eager)]
    copies = {name: t.clone() if "running" in name else t for name, t in exact.items()}
    before_relu = calls[1](**copies, relu=False)
    grad = activation(shape, dtype, layout)
    grad = torch.where(before_relu.abs() < MARGIN, 0, grad)
    assert_rule(
        outcome(calls[0], operands, grad),
        outcome(calls[1], operands, grad),
        outcome(calls[1], exact, grad),
        # fp32 sums of a million values in another order than eager's
        scale=4 if dtype == torch.float32 else 1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_add_relu_has_eagers_bits(dtype):
    for shape in [*SHAPES, (3, 5, 7, 11)]:
        a, b = (activation(shape, dtype, torch.channels_last) - 0.5 for _ in range(2))
        assert torch.equal(functional.add_relu(a, b), F.relu(a + b))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_deterministic(shape, layout):
    operands = operands_for(shape, torch.bfloat16, layout)
    grad = activation(shape, torch.bfloat16, layout)
    first = outcome(ours, operands, grad)
    for _ in range(3):
        assert_same_bits(first, outcome(ours, operands, grad))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_relu_mask_is_the_forwards(layout):
    """Recomputed in backward by another kernel: it must be forward's, bit by bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operands = operands_for((64, 64, 56, 56), dtype, layout, residual=False)
        operands["weight"] *= 1e-3
        operands["bias"].zero_()
        found = outcome(
            functools.partial(ours, training=False),
            operands,
            torch.ones_like(operands["input"]),
        )
        assert torch.equal(found["input"] != 0, found["output"] > 0)


def test_statistics_survive_cancellation():
    input = torch.randn(64, 64, 56, 56, device="cuda") + 1e4
    variance, mean = torch.var_mean(input.double(), (0, 2, 3), correction=0)
    _, save_mean, save_invstd = ops.OPERATORS["triton"].bn_relu(
        input, None, None, None, None, None, True, 0.1, 1e-5, False
    )
    assert (save_mean - mean).abs().max() < 2e-3
    torch.testing.assert_close(save_invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


def test_another_stream():
    """Launched on the current stream: a slow producer there must be waited for."""
    operands = operands_for((64, 64, 56, 56), torch.bfloat16, torch.channels_last)
    expected = ours(**{name: t.clone() for name, t in operands.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: t.clone() for name, t in operands.items()}
        late["input"].zero_()
        torch.cuda._sleep(50_000_000)
        late["input"].copy_(operands["input"])
        found = ours(**late)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_cuda_graph():
    """A captured training step is replayed on new data."""
    operands = operands_for((16, 64, 28, 28), torch.bfloat16, torch.channels_last)
    static = {name: t.clone() for name, t in operands.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before the capture
        ours(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ours(**static)
    fresh = operands_for((16, 64, 28, 28), torch.bfloat16, torch.channels_last)
    for name, tensor in static.items():
        tensor.copy_(fresh[name])
    graph.replay()
    expected = ours(**fresh)
    assert torch.equal(output, expected)
    assert torch.equal(static["running_mean"], fresh["running_mean"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_another_device():
    x = torch.randn(4, 64, 14, 14, device="cuda:1")
    v = torch.ones(64, device="cuda:1")
    assert torch.cuda.current_device() == 0
    found = functional.bn_relu(x, v, v)
    torch.testing.assert_close(found, F.relu(F.batch_norm(x, v, v)))
    assert found.device == x.device and torch.cuda.current_device() == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 2048, 725, 729), (1, 1100, 1398, 1400)], ids=str)
def test_beyond_2_to_the_31_elements(shape, layout):
    """Forward and backward, the last values too; the second is a single image."""
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    channels = shape[1]
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)
    assert x.numel() > 2**31
    x.uniform_(0.5, 1.5).requires_grad_()
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    output = functional.bn_relu(x, mean, var, training=True, momentum=1.0)
    output.backward(torch.ones_like(output))
    for channel in (0, channels // 2, channels - 1):
        plane = x.detach()[:, channel].double()
        variance, exact = torch.var_mean(plane, correction=0)
        torch.testing.assert_close(mean[channel].double(), exact, rtol=1e-5, atol=0)
        expected = F.relu((plane - exact) * (variance + 1e-5).rsqrt())
        torch.testing.assert_close(
            output.detach()[:, channel].double(), expected, rtol=1e-2, atol=1e-2
        )
        # gradients of a batch norm's input sum to nothing
        assert x.grad[:, channel].double().mean().abs() < 1e-3
    assert torch.equal(functional.add_relu(x.detach(), x.detach())[-1, -1], 2 * x.detach()[-1, -1])


@pytest.mark.parametrize("training", [True, False])
def test_inductor(training):
    """The kernels inside the compiled graph: one graph, equal numbers, buffers updated once."""
    torch._dynamo.reset()
    operands = operands_for((8, 64, 28, 28), torch.bfloat16, torch.channels_last)
    grad = activation((8, 64, 28, 28), torch.bfloat16, torch.channels_last)
    call = functools.partial(ours, training=training)
    compiled = torch.compile(call, fullgraph=True)
    found, expected = outcome(compiled, operands, grad), outcome(call, operands, grad)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, n=name: f"{n}: {text}")
    torch._dynamo.reset()
