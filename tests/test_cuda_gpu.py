"""The CUDA backend on a GPU: the error rule at real shapes, streams, graphs, large tensors, memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_rule, assert_same_bits, batch_norm_operands

import fastres
from fastres import functional, ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fastres.backends()["cuda"], reason="the backend cuda cannot serve here"),
]

LAST, FIRST = torch.channels_last, torch.contiguous_format
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAPS = [(64, 64, 56, 56), (64, 256, 56, 56), (32, 2048, 7, 7), (1, 2048, 7, 7), (8, 3, 300, 300)]
# input, filters, kernel, stride, dilation, groups: ResNet-50's kinds, ResNeXt's, a stem, odd ones
CONVOLUTIONS = [
    ((32, 64, 56, 56), 64, 3, 1, 1, 1),
    ((32, 64, 56, 56), 256, 1, 1, 1, 1),
    ((32, 256, 56, 56), 512, 1, 2, 1, 1),
    ((32, 128, 56, 56), 128, 3, 2, 1, 1),
    ((32, 512, 7, 7), 512, 3, 1, 1, 1),
    ((1, 512, 7, 7), 2048, 1, 1, 1, 1),
    ((1, 512, 7, 7), 512, 3, 1, 1, 1),  # sums between eight blocks
    ((32, 3, 224, 224), 64, 7, 2, 1, 1),
    ((32, 128, 28, 28), 128, 3, 1, 1, 32),
    ((25, 128, 56, 56), 128, 3, 1, 1, 1),  # an odd number of rows of tiles that come in pairs
    ((5, 64, 56, 56), 256, 1, 1, 1, 1),
    ((8, 64, 28, 28), 64, 3, 1, 2, 1),
    ((5, 24, 13, 11), 72, 3, 2, 1, 1),
    ((300, 24, 13, 11), 72, 3, 2, 1, 1),  # the same for more tiles than multiprocessors
    ((2, 64, 300, 280), 64, 3, 1, 128, 1),  # beyond the tensor maps of sm_90: the portable kernel
    ((4, 64, 60, 57), 128, 3, 9, 1, 1),
]
MARGIN = 0.1  # around zero, where another rounding flips the ReLU's mask


@pytest.fixture(autouse=True)
def served_by_cuda():
    with fastres.backend("cuda"):
        yield


def activation(shape, dtype, layout=LAST, mean=0.5):
    values = torch.randn(shape, device="cuda") * 1.5 + mean
    return values.to(dtype).to(memory_format=layout)


def vectors(channels):
    return {name: v.cuda() for name, v in batch_norm_operands(channels, torch.float32).items()}


def widened(operands):
    return {name: None if t is None else t.double() for name, t in operands.items()}


def outcome(call, operands, grad):
    """Output, gradients and buffers of one call; the operands stay as they are."""
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


def check(ours, eager, operands, dtype, training):
    """The error rule for everything that both directions give."""
    exact = widened(operands)
    buffers = {name: t.clone() for name, t in exact.items() if t is not None and "running" in name}
    before_relu = eager(**exact | buffers, training=training, relu=False)
    grad = activation(before_relu.shape, dtype, mean=0)
    grad = torch.where(before_relu.abs() < MARGIN, 0, grad)
    calls = [functools.partial(call, training=training) for call in (ours, eager, eager)]
    results = [
        outcome(call, given, grad)
        for call, given in zip(calls, (operands, operands, exact), strict=True)
    ]
    # fp32 sums of a million values in another order than eager's
    assert_rule(*results, scale=4 if dtype == torch.float32 else 1)


# --- batch norm -----------------------------------------------------------------------------------


def bn(input, residual, running_mean, running_var, weight, bias, training=True, relu=True):
    return functional.batch_norm(
        input, residual, running_mean, running_var, weight, bias, training, 0.1, 1e-5, relu
    )


def eager_bn(input, residual, running_mean, running_var, weight, bias, training=True, relu=True):
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.1, 1e-5)
    output = output if residual is None else output + residual
    return F.relu(output) if relu else output


def bn_operands(shape, dtype, layout, residual=True):
    return {
        "input": activation(shape, dtype, layout),
        "residual": activation(shape, dtype, layout) if residual else None,
        **vectors(shape[1]),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("layout", [LAST, FIRST], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_bn_relu(shape, dtype, layout, residual, training):
    check(bn, eager_bn, bn_operands(shape, dtype, layout, residual), dtype, training)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_has_eagers_bits(dtype):
    for shape in [*MAPS, (3, 5, 7, 11)]:
        a, b = (activation(shape, dtype, mean=0) for _ in range(2))
        assert torch.equal(functional.add_relu(a, b), F.relu(a + b))


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=str)
def test_statistics_survive_cancellation(layout):
    x = (torch.randn(64, 64, 56, 56, device="cuda") + 1e4).to(memory_format=layout)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, found, invstd = ops.bn_relu(x, None, None, None, None, None, True, 0.1, 1e-5, False)
    assert (found - mean).abs().max() < 1e-3
    torch.testing.assert_close(invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


# --- convolutions ---------------------------------------------------------------------------------


def convolution(geometry):
    """Ours and eager's, as functions of their operands."""
    _, _, kernel, stride, dilation, groups = geometry
    window = (stride, dilation * (kernel // 2), dilation, groups)

    def ours(
        input, weight, residual, bn_weight, bn_bias, running_mean, running_var, training, relu=True
    ):
        statistics = (running_mean, running_var, bn_weight, bn_bias)
        return functional._conv_bn(
            input, residual, weight, None, *window, *statistics, training, 0.1, 1e-5, relu
        )

    def eager(
        input, weight, residual, bn_weight, bn_bias, running_mean, running_var, training, relu=True
    ):
        y = F.conv2d(input, weight, None, *window)
        return eager_bn(y, residual, running_mean, running_var, bn_weight, bn_bias, training, relu)

    return ours, eager


def conv_operands(geometry, dtype, residual=True):
    shape, filters, kernel, stride, dilation, groups = geometry
    weight = torch.randn(filters, shape[1] // groups, kernel, kernel, device="cuda")
    weight = (weight / weight[0].numel() ** 0.5).to(dtype).to(memory_format=LAST)
    x = activation(shape, dtype)
    like = F.conv2d(x, weight, None, stride, dilation * (kernel // 2), dilation, groups)
    v = vectors(filters)
    return {
        "input": x,
        "weight": weight,
        "residual": activation(like.shape, dtype) if residual else None,
        "bn_weight": v["weight"],
        "bn_bias": v["bias"],
        "running_mean": v["running_mean"],
        "running_var": v["running_var"],
    }


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolution_in_eval(geometry, dtype, residual):
    ours, eager = convolution(geometry)
    operands = conv_operands(geometry, dtype, residual)
    results = []
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for call, given in ((ours, operands), (eager, operands), (eager, widened(operands))):
            results.append({"output": call(**given, training=False)})
    assert_rule(*results, scale=4 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolution_in_training(geometry, dtype):
    """Forward and backward; batch norm's backward sees the convolution's rounding, so eager's."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        check(*convolution(geometry), conv_operands(geometry, dtype), dtype, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolution_of_a_normalised_input(geometry, dtype):
    """bn_relu_conv beside its two halves, whose intermediate result is rounded as ours is, and its
    gradients under one mask."""
    shape, _, kernel, stride, dilation, groups = geometry
    window = ([stride] * 2, [dilation * (kernel // 2)] * 2, [dilation] * 2, groups)
    weight = conv_operands(geometry, dtype, residual=False)["weight"]
    v = vectors(shape[1])
    x, scale, shift = activation(shape, dtype), v["weight"], v["bias"]
    mean, invstd = ops.bn_relu_moments(x, None, None, 0.0, 1e-5)
    mask = ops.bn_relu_apply(x, None, mean, invstd, scale, shift, True) > 0
    dy = activation(F.conv2d(x, weight, None, *window).shape, dtype, mean=0)

    def ours(x, scale, shift, weight, dy):
        running = torch.zeros_like(dy[0, :, 0, 0]).float(), torch.ones_like(dy[0, :, 0, 0]).float()
        y, *moments = ops.bn_relu_conv(
            x, mean, invstd, scale, shift, weight, None, *running, *window, 0.1, 1e-5, True
        )
        gradients = ops.bn_relu_conv_backward(
            dy, x, mean, invstd, scale, shift, weight, *window, [True, True, True, False]
        )
        return (y, *moments, *running, *gradients[:4])

    def halves(x, scale, shift, weight, dy):
        leaves = [t.detach().requires_grad_() for t in (x, scale, shift, weight)]
        y = F.batch_norm(leaves[0], None, None, *leaves[1:3], True, 0.1, 1e-5)
        y = F.conv2d(torch.where(mask, y, 0), leaves[3], None, *window)
        gradients = torch.autograd.grad(y, leaves, dy)
        wide = y.detach() if y.dtype == torch.float64 else y.detach().float()
        moments = reference.batch_statistics(wide, 1e-5)
        running = torch.zeros_like(moments[0]), torch.ones_like(moments[0])
        reference.bn_relu_moments(wide, *running, 0.1, 1e-5)
        return (y.detach(), *moments, *running, *gradients)

    operands = (x, scale, shift, weight, dy)
    names = ("output", "mean", "invstd", "running_mean", "running_var", "grad of input",
             "grad of bn_weight", "grad of bn_bias", "grad of weight")  # fmt: skip
    with torch.backends.cudnn.flags(allow_tf32=False):
        found, eager = ours(*operands), halves(*operands)
        exact = halves(*(t.double() for t in operands))
    results = (dict(zip(names, each, strict=True)) for each in (found, eager, exact))
    assert_rule(*results, atol_dtype=dtype, scale=4 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("geometry", [*CONVOLUTIONS[:5], *CONVOLUTIONS[-3:]], ids=str)
def test_two_runs_give_the_same_bits(geometry):
    """Forward and backward, statistics and gradients."""
    ours, _ = convolution(geometry)
    operands = conv_operands(geometry, torch.bfloat16)
    grad = torch.randn_like(operands["residual"])
    call = functools.partial(ours, training=True)
    first = outcome(call, operands, grad)
    for _ in range(3):
        assert_same_bits(first, outcome(call, operands, grad))


def test_bn_relu_gives_the_same_bits():
    for layout in (LAST, FIRST):
        operands = bn_operands((64, 64, 56, 56), torch.bfloat16, layout)
        grad = activation((64, 64, 56, 56), torch.bfloat16, layout)
        assert_same_bits(outcome(bn, operands, grad), outcome(bn, operands, grad))


# --- streams, graphs, devices, sizes --------------------------------------------------------------


def training_step():
    geometry = CONVOLUTIONS[0]
    ours, _ = convolution(geometry)
    return functools.partial(ours, training=True), conv_operands(geometry, torch.bfloat16)


def test_another_stream():
    """Launched on the current stream: a slow producer there is waited for."""
    call, operands = training_step()
    expected = call(**{name: t.clone() for name, t in operands.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: t.clone() for name, t in operands.items()}
        late["input"].zero_()
        torch.cuda._sleep(50_000_000)
        late["input"].copy_(operands["input"])
        found = call(**late)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_cuda_graph():
    """A captured forward pass is replayed on new data."""
    call, operands = training_step()
    static = {name: t.clone() for name, t in operands.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(**static)
    _, fresh = training_step()
    for name, tensor in static.items():
        tensor.copy_(fresh[name])
    graph.replay()
    assert torch.equal(output, call(**fresh))
    assert torch.equal(static["running_mean"], fresh["running_mean"])


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
def test_kernels_that_begin_early_wait_for_their_operands(graph):
    """Convolutions of few tiles, each of the output of the one before, beside the same with a pause
    between any two; memory is used again, too."""
    ours, _ = convolution(((1, 256, 14, 14), 256, 3, 1, 1, 1))
    operands = conv_operands(((1, 256, 14, 14), 256, 3, 1, 1, 1), torch.bfloat16)
    static = operands.pop("input")

    def run(pause=lambda: None):
        x = static
        for _ in range(30):
            x = ours(x, **operands, training=False)
            pause()
        return x

    with torch.no_grad():
        expected = run(torch.cuda.synchronize)
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                found = run()
        for _ in range(20):
            if graph:
                captured.replay()
            else:
                found = run()
            assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_another_device():
    x = torch.randn(4, 64, 14, 14, device="cuda:1")
    v = torch.ones(64, device="cuda:1")
    assert torch.cuda.current_device() == 0
    found = functional.bn_relu(x, v, v)
    torch.testing.assert_close(found, F.relu(F.batch_norm(x, v, v)))
    assert found.device == x.device and torch.cuda.current_device() == 0


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=str)
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
        found = output.detach()[:, channel].double()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        assert x.grad[:, channel].double().mean().abs() < 1e-3  # they sum to nothing


def test_out_of_memory_leaves_things_usable():
    free, _ = torch.cuda.mem_get_info()
    side = 1 << 14
    x = torch.empty((1, 1, 1, 1), dtype=torch.bfloat16, device="cuda").expand(
        max(1, 2 * free // (2 * side * side)) + 1, 1, side, side
    )
    v = torch.ones(1, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        functional.bn_relu(x, v, v)
    small = activation((2, 64, 7, 7), torch.bfloat16)
    assert torch.equal(functional.add_relu(small, small), F.relu(small + small))


def test_kernels_are_loaded_without_spills():
    kernels = ops.extension.cuda_kernels()
    assert {k["name"] for k in kernels} >= {"bn_relu_moments", "bn_relu_apply"}
    for kernel in kernels:
        assert kernel["local_bytes"] == 0 and kernel["blocks_per_multiprocessor"] > 0, kernel
