"""The drop-in modules: eager's numbers, torchvision's names, and what people do to modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls, assert_like_eager, assert_rule
from torch import nn

import fastres
from fastres.nn import AddReLU, BasicBlock, BNReLU, Bottleneck, ConvBNReLU


def filled(module):
    """Parameters and statistics away from their defaults."""
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    return module


def block_pairs(torchvision):
    """Every shape of ResNet block, ours and torchvision's, with the same parameters."""
    ours, theirs = fastres.nn, torchvision.models.resnet

    def shortcut(inputs, outputs, stride):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    for kind, inplanes, planes, options in [
        ("BasicBlock", 7, 7, {}),
        ("BasicBlock", 5, 7, {"stride": 2, "downsample": (5, 7, 2)}),
        ("Bottleneck", 20, 5, {}),
        ("Bottleneck", 7, 5, {"stride": 2, "downsample": (7, 20, 2)}),
        ("Bottleneck", 16, 4, {"groups": 2, "base_width": 32}),
        ("Bottleneck", 12, 3, {"dilation": 2}),
        ("Bottleneck", 12, 3, {"base_width": 128}),
    ]:
        pair = []
        for module in (ours, theirs):
            given = dict(options)
            if "downsample" in given:
                given["downsample"] = shortcut(*given["downsample"])
            pair.append(getattr(module, kind)(inplanes, planes, **given))
        filled(pair[1])
        pair[0].load_state_dict(pair[1].state_dict(), strict=True)
        yield inplanes, pair


def results_of(block, input, training):
    block = copy.deepcopy(block).train(training)
    input = input.clone().requires_grad_()
    output = block(input)
    output.square().mean().backward()
    results = {"output": output.detach(), "input": input.grad}
    results |= {name: p.grad for name, p in block.named_parameters()}
    return results | {name: b for name, b in block.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_blocks_agree_with_torchvisions(torchvision, one_thread, training, layout):
    for inplanes, (ours, theirs) in block_pairs(torchvision):
        for size in ((3, 11, 13), (2, 3, 3)):
            input = torch.randn(size[0], inplanes, *size[1:]).to(memory_format=layout)
            exact = results_of(theirs.double(), input.double(), training)
            theirs.float()
            # several roundings in a row, each as good as eager's: eight times the one-step atol
            assert_rule(
                results_of(ours, input, training), results_of(theirs, input, training), exact,
                scale=8,
            )  # fmt: skip
            ours.eval(), theirs.eval()
            with torch.inference_mode():
                assert_like_eager({"": ours(input)}, {"": theirs(input)}, 1e-4, 1e-4)


def test_names_and_arguments_are_torchvisions(torchvision):
    for _, (ours, theirs) in block_pairs(torchvision):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert type(ours).expansion == type(theirs).expansion
        assert ours.stride == theirs.stride
    for block, options in [(BasicBlock, {"groups": 2}), (BasicBlock, {"base_width": 128})]:
        with pytest.raises(ValueError, match="groups, base_width"):
            block(8, 8, **options)
    with pytest.raises((ValueError, NotImplementedError), match="dilation"):
        BasicBlock(8, 8, dilation=2)


@pytest.mark.parametrize("training", [True, False])
def test_small_modules(training):
    x, residual = torch.randn(2, 5, 7, 11), torch.randn(2, 5, 7, 11)
    module = filled(ConvBNReLU(5, 5)).train(training)
    twin = copy.deepcopy(module)
    plain = twin.bn(twin.conv(x))
    torch.testing.assert_close(module(x), plain.relu(), rtol=1e-4, atol=1e-4)
    plain = twin.bn(twin.conv(x))
    torch.testing.assert_close(module(x, residual), (plain + residual).relu(), rtol=1e-4, atol=1e-4)
    bn = filled(BNReLU(5)).train(training)
    twin = copy.deepcopy(bn)
    torch.testing.assert_close(bn(x), twin.bn(x).relu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        bn(x, residual), (twin.bn(x) + residual).relu(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(AddReLU()(x, residual), F.relu(x + residual))


def test_conv_bn_relu_arguments():
    x = torch.randn(2, 6, 9, 9)
    assert ConvBNReLU(6, 4, 5)(x).shape == (2, 4, 9, 9), "the default padding keeps the size"
    assert ConvBNReLU(6, 4, 3, 2, dilation=2)(x).shape == (2, 4, 5, 5)
    assert ConvBNReLU(6, 4, 3, padding=0, groups=2)(x).shape == (2, 4, 7, 7)
    assert ConvBNReLU(6, 4).conv.bias is None and ConvBNReLU(6, 4, bias=True).conv.bias is not None
    projection = ConvBNReLU(6, 4, 1, relu=False)
    assert (projection(x) < 0).any()
    torch.testing.assert_close(
        projection.eval()(x, torch.ones(2, 4, 9, 9)), projection(x) + 1, rtol=1e-4, atol=1e-5
    )
    group_norm = ConvBNReLU(6, 4, norm_layer=lambda n: nn.GroupNorm(2, n))
    torch.testing.assert_close(group_norm(x), group_norm.bn(group_norm.conv(x)).relu())


def network():
    return filled(nn.Sequential(
        ConvBNReLU(3, 8), BasicBlock(8, 8), Bottleneck(8, 2), BNReLU(8),
    ))  # fmt: skip


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


def through_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
@pytest.mark.parametrize("used_before", [False, True])
def test_copies_are_the_same_network(copied, used_before):
    net, x = network(), torch.randn(2, 3, 9, 9)
    if used_before:
        with torch.inference_mode():
            net.eval()(x)
        net.train()(x).sum().backward()
    twin = copied(net)
    for training in (True, False):
        net.train(training), twin.train(training)
        with torch.no_grad():
            before = copy.deepcopy(twin.state_dict())
            expected = net(x)
            if copied is copy.copy:  # shares the buffers that the call just moved
                net.load_state_dict(before)
            assert torch.equal(twin(x), expected)
    if copied is not copy.copy:
        with torch.no_grad():
            net[0].conv.weight.zero_()
        assert twin[0].conv.weight.abs().sum() > 0


@pytest.mark.parametrize("change", [
    lambda net: net.double(),
    lambda net: net.bfloat16(),
    lambda net: net.to(memory_format=torch.channels_last),
    lambda net: net.share_memory(),
    lambda net: net.requires_grad_(False),
    lambda net: net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else 0),
], ids=["double", "bfloat16", "channels_last", "share_memory", "frozen", "reset"])  # fmt: skip
def test_what_modules_go_through(change):
    net, x = network().eval(), torch.randn(2, 3, 9, 9)
    for _ in range(2):
        with torch.no_grad():
            x = x.to(net[0].conv.weight.dtype)
            with fastres.backend("eager"):
                expected = net(x)
            tolerance = 5e-2 if x.dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(net(x), expected, rtol=tolerance, atol=tolerance)
        change(net)


def test_the_output_keeps_the_memory_format():
    net = network()
    for layout in (torch.contiguous_format, torch.channels_last):
        for training in (True, False):
            x = torch.randn(2, 3, 9, 9).to(memory_format=layout)
            assert net.train(training)(x).is_contiguous(memory_format=layout)
            with torch.no_grad():
                assert net(x).is_contiguous(memory_format=layout)


def test_sync_batch_norm_conversion():
    """The sites see another class there, and call it: in eval it is batch norm."""
    net = network().eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = net(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert type(converted[0].bn) is nn.SyncBatchNorm
        with Calls() as calls:
            torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)
        assert not calls.made


@pytest.mark.parametrize(
    "options", [{"kernel_size": (3, 5)}, {"kernel_size": (1, 3), "dilation": (1, 2)}, {}], ids=str
)
def test_padding_keeps_the_size_of_a_map(options):
    """With pairs too, as ``nn.Conv2d`` takes them."""
    module = ConvBNReLU(3, 4, **options).eval()
    images = torch.randn(2, 3, 7, 9)
    expected = torch.relu(module.bn(module.conv(images)))
    torch.testing.assert_close(module(images), expected)
    assert expected.shape == (2, 4, 7, 9)
