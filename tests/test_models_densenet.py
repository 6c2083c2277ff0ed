"""DenseNet: torchvision's numbers and names, and no copy of all channels once a layer."""

import copy

import pytest
import torch
from agreement import FLOATS, Calls
from families import assert_same_network, count, fill, trace
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import ops


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_state_dicts_are_torchvisions(torchvision, depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"densenet{depth}")()
        ours = fastres.models.densenet(depth)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert count(f"densenet{depth}") == sum(p.numel() for p in theirs.parameters())


def test_parameters_and_shapes_of_the_paper():
    assert count("densenet121") == 7_978_856 and count("densenet161") == 28_681_000
    assert trace("densenet121", 224) == [
        (64, 112), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (1024, 7),
        (1000,),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [
    {"block_config": (2, 3), "growth_rate": 8, "num_init_features": 12},
    {"block_config": (1, 2, 1), "growth_rate": 5, "bn_size": 2, "num_init_features": 7},
], ids=["even", "odd"])  # fmt: skip
@pytest.mark.parametrize("size", [(64, 64), (61, 67)], ids=str)
def test_it_is_torchvisions_network(one_thread, torchvision, options, size):
    theirs = torchvision.models.DenseNet(num_classes=5, **options)
    ours = fastres.models.DenseNet(num_classes=5, **options)
    assert_same_network(ours, theirs, torch.randn(3, 3, *size))


class Copies(TorchDispatchMode):
    """Counts elements that are copied or concatenated."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name in ("aten::cat", "aten::copy_", "aten::clone"):
            self.elements += output.numel()
        return output


def test_inference_copies_every_channel_once(one_thread):
    block = fill(fastres.models.DenseNet(8, (6,), 16, num_classes=2).eval()).features.denseblock1
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad(), Copies() as copies, Calls() as calls:
        output = block(x)
    assert output.shape == (2, 64, 8, 8) and output.is_contiguous(memory_format=torch.channels_last)
    assert copies.elements == output.numel()
    assert calls.names == ["bn_relu", "conv_bn_relu", "conv_bn_relu"] * 6
    with torch.no_grad(), torch.profiler.profile() as profile:
        block(x)
    written = [e.name for e in profile.events() if e.name in ("aten::cat", "aten::copy_")]
    assert len(written) == 7, "the block's input, and each layer's channels"
    torch.testing.assert_close(output, _copied(block, x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(ops.extension is None, reason="a fallback keeps what the extension recomputes")
def test_training_keeps_every_channel_once(one_thread):
    block = fastres.models.DenseNet(8, (6,), 16, num_classes=2).features.denseblock1
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    kept = fastres.models.measure.activation_bytes(block, x)
    read = [16 + 8 * index for index in range(6)]  # channels, by layer
    channels = 64 + 6 * 32  # the common buffer; the input of the second batch norm of each layer
    statistics = 2 * 4 * (sum(read) + 6 * 32)
    assert kept == channels * 2 * 8 * 8 * 4 + statistics


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_in_one_buffer_has_the_gradients_of_copies(one_thread, layout):
    block = fill(fastres.models.DenseNet(5, (4,), 7, num_classes=2).double()).features.denseblock1
    x = torch.randn(3, 7, 5, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    grad = torch.randn(3, 27, 5, 4, dtype=torch.float64)
    wanted = (x, *block.parameters())
    output = block(x)
    gradients = torch.autograd.grad(output, wanted, grad)
    expected = _copied(block, x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, grad))


def test_derivatives_of_a_block(one_thread):
    """By differences, and once more of the gradients: batch norm in eval, without kinks near 0."""
    block = fill(fastres.models.DenseNet(2, (2,), 3, num_classes=2).double()).features.denseblock1
    block.eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(block, x)
    torch.autograd.gradgradcheck(block, x)
    forward = torch.func.jvp(block, (x.detach(),), (torch.ones_like(x),))[1]
    twice_back = torch.autograd.functional.jvp(block, x, torch.ones_like(x))[1]
    torch.testing.assert_close(forward, twice_back)


def test_a_block_under_autocast_keeps_the_types_of_copies(one_thread):
    block = fill(fastres.models.DenseNet(5, (3,), 7, num_classes=2)).features.denseblock1
    x = torch.randn(2, 7, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = block(x), _copied(block, x)
    assert output.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=5e-2, atol=5e-2)
    output.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_norm_of_a_slice_of_channels_is_that_of_its_copy(dtype):
    """The same bits, for maps of every kind of size, and other slices and strides beside it."""
    bn = fill(torch.nn.BatchNorm2d(19)).to(dtype).eval()
    arguments = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    for n, h, w in ((2, 5, 7), (1, 1, 1), (3, 1, 1), (1, 4, 1), (2, 1, 6), (2, 33, 35)):
        whole = torch.randn(n, 40, h, w).to(dtype).to(memory_format=torch.channels_last)
        for part in (
            whole[:, :19], whole[:, 21:], whole[:, 2::2], whole[:, :19, :, ::2],
            whole[:, :19, ::2], whole[::2, :19], whole[:, :19].expand(n, 19, h, w),
            whole[:, :19].mT, whole[:1, :19].expand(3, 19, h, w),
        ):  # fmt: skip
            copy_ = part.clone(memory_format=torch.channels_last)
            with torch.no_grad():
                ours = fastres.functional.bn_relu(part, *arguments)
                assert torch.equal(ours, fastres.functional.bn_relu(copy_, *arguments))
                close = {"rtol": 2e-2, "atol": 5e-2} if dtype.itemsize == 2 else {}
                torch.testing.assert_close(ours, bn(copy_).relu(), **close)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_block_in_any_format(layout):
    block = fill(fastres.models.DenseNet(5, (3,), 7, num_classes=2).eval()).features.denseblock1
    for size in ((2, 7, 5, 3), (1, 7, 1, 1), (3, 7, 1, 4)):
        x = torch.randn(size).to(memory_format=layout)
        with torch.no_grad():
            torch.testing.assert_close(block(x), _copied(block, x), rtol=1e-4, atol=1e-5)


def _copied(block, x):
    for layer in block.values():
        out = layer.conv1(layer.norm1(x).relu())
        x = torch.cat((x, layer.conv2(layer.norm2(out).relu())), 1)
    return x


def test_dropout_is_training_only():
    net = fastres.models.DenseNet(8, (4,), 16, drop_rate=0.5, num_classes=3)
    twin = copy.deepcopy(net)
    for layer in twin.features.denseblock1.values():
        layer.drop_rate = 0.0
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(net(x), twin(x))
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), twin.eval()(x))
