"""The convolutions of the Triton backend as operators, under Triton's interpreter: who serves, with
what numbers, inside what. fp32 and fp16: bf16 goes to the vendor's convolution there."""

import copy
import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    Calls,
    assert_like_eager,
    assert_rule,
    batch_norm_operands,
    outcome,
    spread,
    widened,
)
from test_conv_bn_relu import check, operands_for
from torch import nn

import fastres
from fastres import functional, ops

pytestmark = pytest.mark.usefixtures("served_by_interpreted_triton")

TRITON = ops.OPERATORS["triton"]
LAST = "channels_last"
GEOMETRIES = ("1x1", "1x1 stride 2", "3x3 stride 2", "7x7 stem", "grouped", "uneven")


@pytest.fixture
def kernels():
    """Gives a module of ``fastres.kernels`` as it is interpreted."""
    return lambda name: importlib.import_module(f"fastres.kernels.{name}")


@pytest.fixture
def launched(kernels, monkeypatch):
    """The convolution kernels that were launched, in order."""
    names = []
    for module, launcher in (
        ("conv", "fprop"), ("conv_bn_relu", "fprop"), ("conv", "dgrad"), ("conv", "wgrad"),
        ("bn_relu_conv", "fprop"), ("bn_relu_conv", "dgrad"), ("bn_relu_conv", "wgrad"),
    ):  # fmt: skip
        call = getattr(kernels(module), launcher)

        def record(*args, launcher=launcher, call=call, **keywords):
            names.append(launcher)
            return call(*args, **keywords)

        monkeypatch.setattr(kernels(module), launcher, record)
    return names


@pytest.mark.parametrize("variant", ["conv_bn", "conv_bn_add_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_agrees_with_eager(launched, geometry, dtype, variant):
    """In inference by one kernel, in training by one and a pass; every gradient."""
    operands, how = operands_for(geometry, (2, 7, 6), dtype, LAST, variant)
    with torch.no_grad(), Calls() as calls:
        check(variant, operands, how, gradients=False)
    assert calls.names == ["triton_conv_bn_relu"] and launched == ["fprop"]
    for training in (True, False):
        launched.clear()
        check(variant, operands, how | {"training": training}, gradients=True)
        assert launched == ["fprop", "dgrad", "wgrad"]


@pytest.mark.parametrize("refused", ["the table", "fp64", "bf16", "contiguous"])
def test_the_vendors_convolution_serves_the_rest(launched, kernels, monkeypatch, refused):
    """With the same operators around it, and the same rule for the numbers."""
    if refused == "the table":
        monkeypatch.setattr(kernels("conv_choice"), "serves", lambda *args, **keywords: False)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(refused, torch.float32)
    layout = "contiguous" if refused == "contiguous" else LAST
    for geometry in ("3x3 stride 2", "1x1 stride 2"):
        operands, how = operands_for(geometry, (2, 7, 6), dtype, layout, "conv_bn_add_relu")
        with torch.no_grad(), Calls() as calls:
            check("conv_bn_add_relu", operands, how, gradients=False)
        assert calls.names[0] == "triton_conv_bn_relu"
        check("conv_bn_add_relu", operands, how | {"training": True}, gradients=True)
    assert not launched


def test_the_table_decides_on_a_gpu(kernels, monkeypatch):
    choice, configs = kernels("conv_choice"), kernels("configs")
    monkeypatch.setattr(configs, "architecture", lambda device: 90)

    class Activation:
        dtype, device = torch.bfloat16, torch.device("cuda")

    def serves(what, weight_size, stride=(1, 1), last=True, dtype=torch.bfloat16, pixels=10**6):
        Activation.dtype = dtype
        return choice.serves(
            what, Activation, weight_size, stride, (1, 1), 1, last=last, most_pixels=pixels,
            allow_tf32=True,
        )  # fmt: skip

    assert not serves("eval", (256, 64, 1, 1)), "nothing was measured"
    table = {(90, "half"): {"eval": frozenset({"1x1 c64"})}, (90, "tf32"): {}}
    monkeypatch.setattr(choice, "SERVED", table)
    assert serves("eval", (256, 64, 1, 1)) and serves("eval", (100, 300, 1, 1))
    assert not serves("eval", (256, 64, 1, 1), last=False)
    assert not serves("eval", (256, 64, 1, 1), dtype=torch.float32)
    assert not serves("eval", (256, 64, 1, 1), dtype=torch.float64)
    assert not serves("eval", (256, 64, 1, 1), pixels=2**31)
    assert not serves("training", (256, 64, 1, 1))
    assert not serves("eval", (256, 128, 1, 1)) and not serves("eval", (256, 64, 1, 1), (2, 2))
    monkeypatch.setattr(configs, "architecture", lambda device: 80)
    assert not serves("eval", (256, 64, 1, 1))


def test_a_single_image_has_a_choice_of_its_own(kernels, monkeypatch):
    asked = []
    monkeypatch.setattr(
        kernels("conv_choice"), "serves", lambda what, *_, **__: asked.append(what) or True
    )
    for images in (1, 2):
        operands, how = operands_for("3x3", (images, 7, 6), torch.float32, LAST, "conv_bn")
        with torch.no_grad():
            check("conv_bn", operands, how, gradients=False)
    assert asked == ["eval, one image", "eval"]


def test_classes_of_shapes(kernels):
    class_of = kernels("conv_class").class_of
    assert class_of((64, 3, 7, 7), (2, 2), (1, 1), 1) == "7x7/2 c2"
    assert class_of((512, 512, 3, 3), (1, 1), (1, 1), 1) == "3x3 c512"
    assert class_of((128, 4, 3, 3), (1, 1), (1, 1), 32) == "3x3 grouped c4"
    assert class_of((17, 18, 2, 3), (2, 3), (3, 1), 1) == "2x3/2x3 dilated c16"


@pytest.mark.parametrize("weight_layout", ["contiguous", LAST])
@pytest.mark.parametrize("layout", ["contiguous", LAST])
def test_formats_are_eagers(layout, weight_layout):
    x, w = spread((2, 5, 6, 7), torch.float32, layout), spread((4, 5, 3, 3), torch.float32)
    w = w.to(
        memory_format=torch.channels_last if weight_layout == LAST else torch.contiguous_format
    )
    window = ((1, 1), (1, 1), (1, 1), 1)
    y = TRITON.conv(x, w, None, *window)
    assert y.stride() == F.conv2d(x, w, None, *window).stride()
    gradients = (
        TRITON.conv_dgrad(y, x, w, *window), TRITON.conv_wgrad(y, x, w, *window, [True, False])[0],
    )  # fmt: skip
    assert [g.stride() for g in gradients] == [x.stride(), w.stride()]


@pytest.mark.parametrize("geometry", ["3x3 stride 2", "grouped"])
@pytest.mark.parametrize("layout, weight_layout", [
    (LAST, LAST), (LAST, "contiguous"), ("contiguous", LAST), ("sliced", "contiguous"),
])  # fmt: skip
def test_opcheck(geometry, layout, weight_layout):
    operands, how = operands_for(
        geometry, (2, 5, 6), torch.float32, layout, "conv_bn_add_relu", False, weight_layout
    )
    x, residual, w, bias, *bn = operands.values()
    window = [[how[name]] * 2 for name in ("stride", "padding", "dilation")] + [how["groups"]]
    dy = torch.randn_like(residual)
    for operator, arguments in [
        (TRITON.conv, (x, w, bias, *window)),
        (TRITON.conv_dgrad, (dy, x, w, *window)),
        (TRITON.conv_wgrad, (dy, x, w, *window, [True, bias is not None])),
        (TRITON.conv_bn_relu, (x, w, bias, residual, *bn, *window, 1e-5, True)),
        (TRITON.conv_bn_relu_training, (x, w, bias, residual, *bn, *window, 0.1, 1e-5, True)),
        (ops.conv_bn_relu_training, (x, w, bias, None, *bn, *window, 0.1, 1e-5, False)),
    ]:
        copies = (a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(operator, tuple(copies))


def test_operators_refuse_what_does_not_fit():
    x, w, v = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.ones(6)
    window = ([1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(RuntimeError, match="groups: expected a divisor"):
        TRITON.conv(x, w, None, *window[:3], 3)
    for call in (
        lambda dy: TRITON.conv_dgrad(dy, x, w, *window),
        lambda dy: TRITON.conv_wgrad(dy, x, w, *window, [True, True]),
    ):
        with pytest.raises(RuntimeError, match=r"grad_output: expected torch.float32 of shape"):
            call(torch.randn(2, 6, 4, 5))
    with pytest.raises(RuntimeError, match=r"residual: expected shape \(2, 6, 5, 5\)"):
        TRITON.conv_bn_relu(x, w, None, x, v, v, v, v, *window, 1e-5, True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        TRITON.conv_bn_relu_training(
            x[:1, :, :1, :1], w, None, None, v, v, v, v, *window, 0.1, 1e-5, True
        )


def test_nothing_to_convolve():
    x, w, v = torch.randn(0, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.ones(6)
    window = ([1, 1], [1, 1], [1, 1], 1)
    y = TRITON.conv_bn_relu(x, w, None, None, v, v, v, v, *window, 1e-5, True)
    assert y.shape == TRITON.conv(x, w, None, *window).shape == (0, 6, 5, 5)
    assert TRITON.conv_dgrad(y, x, w, *window).shape == x.shape
    found, bias = TRITON.conv_wgrad(y, x, w, *window, [True, True])
    assert torch.equal(found, torch.zeros_like(w)) and torch.equal(bias, torch.zeros(6))


def test_second_derivatives_are_eagers():
    """A graph of the backward is spelled in PyTorch's own operators."""
    operands, how = operands_for("3x3 stride 2", (2, 5, 5), torch.float64, LAST, "conv_bn_relu")
    x, w, gamma, beta = (
        operands[name].requires_grad_() for name in ("input", "weight", "bn_weight", "bn_bias")
    )

    def call(x, w, gamma, beta):
        return functional.conv_bn_relu(
            x, w, operands["bias"], **how, bn_weight=gamma, bn_bias=beta, training=True
        )

    with Calls() as calls:
        call(x, w, gamma, beta)
    assert calls.names == ["triton_conv_bn_relu_training"]
    assert torch.autograd.gradcheck(call, (x, w, gamma, beta), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, w, gamma, beta), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(launched, dtype):
    """fp32 parameters, activations in autocast's dtype, as eager's autocast has them."""
    operands, how = operands_for("3x3 stride 2", (2, 7, 6), torch.float32, LAST, "conv_bn_relu")
    results = []
    for backend in ("triton", "eager"):
        results.append([])
        for training in (False, True):

            def call(training=training, **given):
                with torch.autocast("cpu", dtype):
                    return functional.conv_bn_relu(**given, **how, training=training)

            given = {name: t for name, t in operands.items() if name != "residual"}
            grad = torch.ones(call(**{k: v.clone() for k, v in given.items()}).shape)
            with fastres.backend(backend):
                results[-1].append(outcome(call, given, grad if training else None))
    truth = [
        outcome(
            functools.partial(functional.conv_bn_relu, **how, training=training),
            widened(given), torch.ones_like(grad) if training else None,
        )
        for training in (False, True)
    ]  # fmt: skip
    for ours, eager, exact in zip(*results, truth, strict=True):
        assert ours["output"].dtype == dtype
        for result in (ours, eager, exact):  # zero but for rounding
            result.pop("grad of bias", None)
        assert_rule(ours, eager, exact, atol_dtype=dtype)
    expected = {"fprop", "dgrad", "wgrad"} if dtype == torch.float16 else set()
    assert set(launched) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend, training):
    torch._dynamo.reset()
    w, inputs = spread((6, 4, 3, 3), torch.float32, LAST), spread((2, 4, 5, 6), torch.float32, LAST)

    def call(x, w, gamma, beta, mean, var):
        y = functional.conv_bn_relu(
            x, w, None, 1, 1, 1, 1, mean, var, gamma, beta, training=training
        )
        return functional.add_relu(y, y.flip(0))

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        x = inputs.clone()
        bn = {name: torch.arange(1.0, 7.0) / 5 for name in ("weight", "bias", "mean", "var")}
        leaves = [t.clone().requires_grad_(training) for t in (x, w, bn["weight"], bn["bias"])]
        output = function(*leaves, bn["mean"], bn["var"])
        named = {"output": output.detach(), "mean": bn["mean"], "var": bn["var"]}
        if training:
            output.square().sum().backward()
            named |= {f"grad {i}": leaf.grad for i, leaf in enumerate(leaves)}
        results.append(named)
    assert_like_eager(results[1], results[0], rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def blocks(torchvision, groups: int, width: int):
    from torchvision.models.resnet import Bottleneck

    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(3, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    sizes = {"groups": groups, "base_width": width}
    net = nn.Sequential(Bottleneck(3, 8, 2, shortcut, **sizes), Bottleneck(32, 8, **sizes))
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups, width", [(1, 64), (8, 32)], ids=["ResNet", "ResNeXt"])
def test_a_converted_model_is_trained_beside_eager(torchvision, launched, groups, width):
    """Three steps in fp32, convolutions and all by Triton's kernels, branches as chains; then
    evaluated."""
    plain = blocks(torchvision, groups, width)
    fused = fastres.convert(copy.deepcopy(plain))
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    losses = {}
    for net, backend in ((plain, "eager"), (fused, "triton")):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with fastres.backend(backend), Calls() as calls:
            losses[backend] = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = net(images).square().mean()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.detach())
    assert calls.names.count("triton_conv_bn_relu_training") == 3
    assert calls.names.count("triton_bn_relu_conv") == 18 and launched.count("fprop") == 21
    assert all(name.startswith("triton_") for name in calls.names)
    assert launched.count("wgrad") == 21 and launched.count("dgrad") == 15  # none of the images
    assert_like_eager(
        {"losses": torch.stack(losses["triton"])} | fused.state_dict(),
        {"losses": torch.stack(losses["eager"])} | plain.state_dict(),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    plain.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(images), plain(images), rtol=1e-3, atol=1e-3)


def test_vectors_may_be_absent(launched):
    for absent in ("bn_weight", "bn_bias"):
        operands, how = operands_for("1x1", (2, 5, 5), torch.float32, LAST, "conv_bn_relu")
        operands[absent] = None
        with torch.no_grad():
            check("conv_bn_relu", operands, how, gradients=False)
        check("conv_bn_relu", operands, how | {"training": True}, gradients=True)
    assert launched.count("fprop") == 4


def test_batch_norm_of_a_large_mean():
    """Statistics of the fp32 sums: a mean of 1e4 beside a deviation of 1. A tile's mean is off by up
    to half of 2^-10 and, of 128 pixels, up to 1/4 from the whole's: 2.5e-4 of the variance."""
    x = spread((4, 16, 9, 11), torch.float32, LAST, mean=1e4)
    eye = torch.eye(16).view(16, 16, 1, 1).to(memory_format=torch.channels_last)
    bn = batch_norm_operands(16, torch.float32)
    _, convolved, mean, invstd = TRITON.conv_bn_relu_training(
        x, eye, None, None, *bn.values(), [1, 1], [0, 0], [1, 1], 1, 1.0, 1e-5, True
    )
    assert torch.equal(convolved, x)
    variance, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(invstd.double(), (variance + 1e-5).rsqrt(), rtol=1.3e-4, atol=0)
    assert torch.equal(bn["running_mean"], mean)
