"""A convolution behind ``bn_relu`` does not keep its input: backward makes it again."""

import pytest
import torch
from agreement import Calls, assert_like_eager
from torch.autograd.graph import saved_tensors_hooks

import fastres
from fastres import ops, reference
from fastres.arguments import accumulation_dtype
from fastres.functional import conv_bn, conv_bn_add_relu, conv_bn_relu
from fastres.memory import peak_bytes

pytestmark = pytest.mark.skipif(ops.extension is None, reason="needs the compiled extension")

CHANNELS = 32


def parameters(dtype=torch.float32):
    """Of two convolutions and their batch norms."""
    torch.manual_seed(0)
    weights = [torch.randn(CHANNELS, CHANNELS, k, k, dtype=dtype) / 8 for k in (1, 3)]
    vectors = [torch.rand(CHANNELS) + 0.5 for _ in range(4)]
    return [tensor.requires_grad_() for tensor in (*weights, *vectors)]


def image(layout=torch.channels_last, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, 9, 11, generator=generator).to(dtype, memory_format=layout)
    return x.requires_grad_()


def first(x, parameters, training=True):
    weight, _, scale, shift, *_ = parameters
    statistics = (None, None) if training else (torch.zeros(CHANNELS), torch.ones(CHANNELS))
    return conv_bn_relu(x, weight, None, 1, 0, 1, 1, *statistics, scale, shift, training)


def second(z, parameters):
    _, weight, _, _, scale, shift = parameters
    return conv_bn(z, weight, None, 1, 1, 1, 1, None, None, scale, shift, True)


def loss(output):
    """Not the sum of squares: batch norm makes that a constant."""
    generator = torch.Generator().manual_seed(2)
    return (output * torch.randn(output.shape, generator=generator)).sum()


def assert_eager_agrees(gradients, **tolerance):
    """``gradients()``, of ours and of eager."""
    ours = gradients()
    with fastres.backend("eager"):
        eager = gradients()
    assert_like_eager(dict(enumerate(ours)), dict(enumerate(eager)), **tolerance)


def kept(call):
    """``call()``, with whatever is saved kept: hooks on saved tensors ask for that."""
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return call()


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits(dtype, layout, training):
    x, leaves = image(layout, dtype), parameters(dtype)

    def run():
        return second(first(x, leaves, training), leaves)

    grad = torch.randn(x.shape, dtype=dtype)
    with Calls() as calls:
        ours = torch.autograd.grad(run(), (x, *leaves), grad)
    assert calls.names.count("bn_relu_apply") == 1
    with Calls() as calls:
        beside = torch.autograd.grad(kept(run), (x, *leaves), grad)
    assert "bn_relu_apply" not in calls.names
    assert all(map(torch.equal, ours, beside))


def test_memory():
    """What a deep branch keeps is each convolution's output; eager keeps what ReLU makes of it too."""
    leaves, x = parameters(), torch.randn(4, CHANNELS, 56, 56, requires_grad=True)
    x = x.to(memory_format=torch.channels_last)

    def step():
        z = x
        for _ in range(8):
            z = first(z, leaves)
        z.sum().backward()

    def peak():
        step()  # memory that stays
        return peak_bytes(step, torch.device("cpu")) / (x.numel() * x.itemsize)

    ours = peak()
    with fastres.backend("eager"):
        eager = peak()
    assert eager > 16 and ours < eager - 5


def test_an_activation_that_was_changed_is_kept():
    """In place, where autograd does not look: eager's gradient is of the changed values."""
    x, leaves = image(), parameters()

    def run():
        z = first(x, leaves)
        with torch.no_grad():
            z[:, ::2] *= 2
        return torch.autograd.grad(loss(second(z, leaves)), leaves[1])

    with Calls() as calls:
        assert_eager_agrees(run)
    assert "bn_relu_apply" not in calls.names


def test_a_batch_norm_whose_backward_has_run():
    """What it saved is gone: the convolution keeps its input."""
    x, leaves = image(), parameters()

    def run():
        z = first(x, leaves)
        torch.autograd.grad(z.sum(), leaves[3])
        return torch.autograd.grad(loss(second(z, leaves)), leaves[1])

    assert_eager_agrees(run)


def test_frozen_filters_need_no_activation():
    x, leaves = image(), parameters()
    leaves[1].requires_grad_(False)
    with Calls() as calls:
        second(first(x, leaves), leaves).sum().backward()
    assert "bn_relu_apply" not in calls.names


def test_behind_a_residual_the_output_serves():
    """Its backward keeps the output for ReLU's mask: a convolution has it for nothing."""
    x, leaves = image(), parameters()
    with Calls() as calls:
        z = conv_bn_add_relu(x, x, leaves[0], training=True, running_mean=None, running_var=None)
        second(z, leaves).sum().backward()
    assert "bn_relu_apply" not in calls.names


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_second_derivatives(training):
    """The gradient's graph reaches what the activation was made of."""
    x, leaves = image(), parameters()

    def run():
        output = second(first(x, leaves, training), leaves)
        (grad,) = torch.autograd.grad(loss(output.square()), leaves[1], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, *leaves))

    assert_eager_agrees(run, rtol=2e-3, atol=1)  # of up to 1e5


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 32, 8, 8), (2, 1, 4, 4), (0, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_apply(shape, dtype, layout):
    """The operator gives the output of ``bn_relu`` to the last bit, of a slice of channels too."""
    torch.manual_seed(0)
    wide = accumulation_dtype(dtype)
    scale, shift = torch.randn(2, shape[1], dtype=wide)
    x = torch.randn(shape).to(dtype, memory_format=layout)
    training = x.numel() > 0
    statistics = (None, None) if training else (torch.zeros_like(shift), torch.ones_like(shift))
    output, mean, invstd = ops.bn_relu(
        x, None, *statistics, scale, shift, training, 0.1, 1e-5, True
    )
    known = (mean, invstd, scale, shift, True)
    assert torch.equal(ops.bn_relu_apply(x, None, *known), output)
    torch.library.opcheck(ops.bn_relu_apply, (x, None, *known))
    expected = reference.bn_relu_apply(x, None, *known)
    torch.testing.assert_close(expected, output)
    if shape[1] > 1:
        twice = torch.cat((x, x), 1).contiguous(memory_format=layout)
        part = twice[:, : shape[1]]
        assert torch.equal(ops.bn_relu_apply(part, None, *known), output)


@pytest.mark.parametrize("name", ["mean", "invstd", "weight", "bias"])
def test_refusals(name):
    vectors = dict.fromkeys(("weight", "bias", "mean", "invstd"), torch.ones(4))
    vectors[name] = torch.ones(3)
    with pytest.raises(RuntimeError, match=f"{name}: "):
        ops.bn_relu_apply(torch.ones(2, 4, 3, 3), None, relu=True, **vectors)
