"""Every mistake is refused before any kernel runs: the message names the argument, what was expected
and what came, and nothing is changed. What eager accepts or refuses, we do too."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import Calls, assert_like_eager, batch_norm_operands, outcome, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastres
from fastres import functional, ops, reference, sites

X = torch.zeros(2, 3, 5, 7)
W = torch.zeros(4, 3, 3, 3)


def vectors(n, dtype=torch.float32, device="cpu"):
    return torch.zeros(n, dtype=dtype, device=device), torch.ones(n, dtype=dtype, device=device)


def bn(input=X, statistics=None, **how):
    return functional.bn_relu(input, *(statistics or vectors(3)), **how)


def bn_add(residual):
    return functional.bn_add_relu(X, residual, *vectors(3))


def conv(input=X, weight=W, bias=None, statistics=None, **how):
    mean, var = statistics or vectors(4)
    return functional.conv_bn_relu(input, weight, bias, running_mean=mean, running_var=var, **how)


def conv_add(residual):
    return functional.conv_bn_add_relu(
        X, residual, W, running_mean=torch.zeros(4), running_var=torch.ones(4)
    )


# name: call, exception, words of the message (the argument first)
MISTAKES = {
    # dimensionality
    "bn 3-D": (lambda: bn(X[0]), ValueError, "input: expected 4 dim", "(3, 5, 7)"),
    "add 3-D": (lambda: functional.add_relu(X[0], X[0]), ValueError, "input: expected 4", "3"),
    "conv 5-D": (lambda: conv(X[None]), ValueError, "input: expected 4", "5"),
    "weight 3-D": (lambda: conv(weight=W[0]), RuntimeError, "weight: expected 4", "(3, 3, 3)"),
    # channels
    "statistics": (lambda: bn(statistics=vectors(5)), RuntimeError, "running_mean", "(3,)", "(5,)"),
    "bn weight": (lambda: bn(weight=torch.ones(2)), RuntimeError, "weight", "(3,)", "(2,)"),
    "bn bias 2-D": (lambda: bn(bias=torch.ones(3, 1)), RuntimeError, "bias", "(3,)", "(3, 1)"),
    "filters": (lambda: conv(weight=W[:, :2]), RuntimeError, "input: expected 2", "(4, 2, 3, 3)"),
    "conv bias": (lambda: conv(bias=torch.ones(3)), RuntimeError, "bias", "(4,)", "(3,)"),
    "conv bn_weight": (lambda: conv(bn_weight=torch.ones(3)), RuntimeError, "bn_weight", "(4,)"),
    "conv bn_bias": (lambda: conv(bn_bias=torch.ones(5)), RuntimeError, "bn_bias", "(4,)", "(5,)"),
    "conv statistics": (lambda: conv(statistics=vectors(3)), RuntimeError, "running_mean", "(3,)"),
    # residual
    "residual shape": (lambda: bn_add(X[:1]), RuntimeError, "residual", "(2, 3, 5, 7)", "(1, 3, 5"),
    "residual dtype": (lambda: bn_add(X.double()), TypeError, "residual", "float32", "float64"),
    "residual device": (lambda: bn_add(X.to("meta")), RuntimeError, "residual", "cpu", "meta"),
    "residual kind": (lambda: bn_add(1.0), TypeError, "residual: expected a Tensor", "float"),
    "no residual": (lambda: bn_add(None), TypeError, "residual: expected a Tensor", "None"),
    "conv no residual": (lambda: conv_add(None), TypeError, "residual: expected a Tensor", "None"),
    "add shape": (lambda: functional.add_relu(X, X[:, :1]), RuntimeError, "residual", "(2, 1, 5"),
    "add dtype": (lambda: functional.add_relu(X, X.half()), TypeError, "residual", "float16"),
    "add device": (lambda: functional.add_relu(X, X.to("meta")), RuntimeError, "residual", "meta"),
    "conv residual": (lambda: conv_add(X), RuntimeError, "residual", "(2, 4, 3, 5)", "(2, 3, 5, 7)"),
    "conv residual dtype": (
        lambda: conv_add(torch.zeros(2, 4, 3, 5).bfloat16()), TypeError, "residual", "bfloat16",
    ),
    # devices
    "weight device": (lambda: conv(weight=W.to("meta")), RuntimeError, "weight", "cpu", "meta"),
    "statistics device": (
        lambda: bn(statistics=vectors(3, device="meta")), RuntimeError, "running_mean", "meta",
    ),
    # dtypes
    "int": (lambda: bn(X.int()), TypeError, "input: expected float32", "int32"),
    "bool": (lambda: functional.add_relu(X > 0, X > 0), TypeError, "input", "bool"),
    "complex": (lambda: conv(X.to(torch.complex64)), TypeError, "input", "complex64"),
    "weight dtype": (lambda: conv(weight=W.double()), RuntimeError, "weight", "float32", "float64"),
    "weight bf16": (lambda: conv(weight=W.bfloat16()), RuntimeError, "weight", "bfloat16"),
    "weight int": (lambda: conv(weight=W.int()), RuntimeError, "weight", "float32", "int32"),
    "bias dtype": (
        lambda: conv(bias=torch.ones(4).double()), RuntimeError, "bias", "float32", "float64",
    ),
    "statistics dtype": (
        lambda: bn(statistics=vectors(3, torch.float64)), RuntimeError, "running_mean", "float64",
    ),
    "statistics bf16": (
        lambda: bn(statistics=vectors(3, torch.bfloat16)), RuntimeError, "running_mean", "bfloat16",
    ),
    "no tensor": (lambda: bn([1.0]), TypeError, "input: expected a Tensor", "list"),
    "weight no tensor": (lambda: conv(weight=None), TypeError, "weight", "NoneType"),
    "bn weight no tensor": (lambda: bn(weight=1.0), TypeError, "weight", "float"),
    # geometry
    "stride 0": (lambda: conv(stride=0), RuntimeError, "stride", "at least 1", "(0, 0)"),
    "stride -1": (lambda: conv(stride=(1, -1)), RuntimeError, "stride", "(1, -1)"),
    "stride of three": (lambda: conv(stride=(1, 1, 1)), RuntimeError, "stride", "(1, 1, 1)"),
    "stride 1.5": (lambda: conv(stride=1.5), TypeError, "stride", "1.5"),
    "stride text": (lambda: conv(stride="2"), TypeError, "stride: expected an int", "'2'"),
    "padding -1": (lambda: conv(padding=-1), RuntimeError, "padding", "at least 0", "(-1, -1)"),
    "padding name": (lambda: conv(padding="full"), (RuntimeError, ValueError), "padding", "'full'"),
    "padding same": (lambda: conv(padding="same", stride=2), RuntimeError, "padding", "(2, 2)"),
    "dilation 0": (lambda: conv(dilation=0), RuntimeError, "dilation", "at least 1", "(0, 0)"),
    "groups": (lambda: conv(groups=2), RuntimeError, "groups", "divisor", "2"),
    "groups 0": (lambda: conv(groups=0), RuntimeError, "groups", "0"),
    "small map": (lambda: conv(X[:, :, :2]), RuntimeError, "weight: kernel (3, 3)", "(0, 5)"),
    # batch norm
    "one value": (
        lambda: bn(X[:1, :, :1, :1], training=True), ValueError, "input", "more than 1 value",
        "(1, 3, 1, 1)",
    ),
    "one value behind conv": (
        lambda: conv(X[:1, :, :3, :3], training=True), ValueError, "more than 1 value",
        "(1, 4, 1, 1)",
    ),
    "no statistics": (
        lambda: functional.bn_relu(X, None, None), RuntimeError, "running_mean", "training=False",
    ),
    "no variance": (lambda: functional.bn_relu(X, torch.ones(3), None), RuntimeError, "running_var"),
    "conv no statistics": (lambda: functional.conv_bn(X, W), RuntimeError, "running_mean", "None"),
    "half the statistics": (
        lambda: functional.bn_relu(X, torch.ones(3), None, training=True), ValueError,
        "running_var", "None",
    ),
    "eps": (lambda: bn(eps=-1.0), ValueError, "eps", "-1.0"),
    "eps 0 in training": (lambda: bn(eps=0.0, training=True), ValueError, "eps", "0.0"),
    # backends, conversion
    "backend": (lambda: fastres.backend("tpu"), ValueError, "name", "auto, cuda", "'tpu'"),
    "backend kind": (lambda: fastres.backend(None), ValueError, "name", "None"),
    "chained": (lambda: fastres.chained("0"), TypeError, "chained: expected a bool", "'0'"),
    "convert": (lambda: fastres.convert(5), TypeError, "model", "Module", "int"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused_by_name_before_anything_runs(mistake):
    call, kind, *words = MISTAKES[mistake]
    with Calls() as calls, pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert not calls.made, "a kernel ran"


def _iadd_block():
    """A site whose addition is in place, which a converted model calls in another way."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, residual):
            out = self.bn(self.conv(x))
            out += residual
            return F.relu(out)

    return fastres.convert(Block())


# each takes a map of 8 channels, or 3
MODULES = {
    "ConvBNReLU": lambda: fastres.nn.ConvBNReLU(8, 8),
    "BNReLU": lambda: fastres.nn.BNReLU(8),
    "AddReLU": lambda: functools.partial(fastres.nn.AddReLU(), residual=torch.zeros(2, 8, 5, 5)),
    "BasicBlock": lambda: fastres.nn.BasicBlock(8, 8),
    "Bottleneck": lambda: fastres.nn.Bottleneck(8, 2),
    "cifar_resnet8": lambda: fastres.models.create("cifar_resnet8"),
    "cifar_resnetv2_11": lambda: fastres.models.create("cifar_resnetv2_11"),
    "teaching_resnet18": lambda: fastres.models.create("teaching_resnet18"),
    "converted": lambda: fastres.convert(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))),
    "converted, +=": lambda: functools.partial(_iadd_block(), residual=torch.zeros(2, 8, 3, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_refuse_what_is_no_tensor_by_name(name):
    module = MODULES[name]()
    for wrong in ([1.0], None, np.zeros((2, 8, 5, 5), "float32")):
        message = f"input: expected a Tensor, got {type(wrong).__name__}"
        with Calls() as calls, pytest.raises(TypeError, match=message):
            module(wrong)
        assert not calls.made, "a kernel ran"


@pytest.mark.parametrize("case", ["one value", "channels", "residual", "dtype", "kernel"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_refused_calls_leave_the_buffers_unchanged(case, momentum):
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum)
    input, residual = torch.randn(2, 3, 5, 7), None
    if case == "one value":
        input = input[:1, :, :3, :3]
    elif case == "channels":
        norm = nn.BatchNorm2d(5, momentum=momentum)
    elif case == "residual":
        residual = torch.randn(2, 4, 2, 2)
    elif case == "dtype":
        input = input.double()
    else:
        input = input[:, :, :2]
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        sites.conv_bn_act(input, conv, norm, F.relu, residual)
    if case == "residual":  # eager too notices that one only behind the batch norm
        return
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed by a refused call"


def test_a_residual_of_another_shape_changes_nothing_in_the_functional_form():
    mean, var = vectors(3)
    with pytest.raises(RuntimeError, match="residual"):
        functional.bn_add_relu(X + 1, X[:1], mean, var, training=True)
    with pytest.raises(RuntimeError, match="residual"):
        functional.conv_bn_add_relu(X, X, W[:3], running_mean=mean, running_var=var, training=True)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


@pytest.mark.parametrize("operator", ["add_relu", "bn_relu", "conv_bn_relu"])
def test_the_operators_themselves_refuse(operator):
    """torch.ops.fastres.* can be called directly: nothing is read before it was checked."""
    if not ops.has_kernel(operator, "cpu"):
        pytest.skip("the compiled extension is not installed")
    mean, var = vectors(3)
    wrong = {
        "add_relu": [(X, X[:1]), (X, X.double()), (X.int(), X.int())],
        "bn_relu": [
            (X, None, torch.zeros(2), torch.ones(2), None, None, False, 0.1, 1e-5, True),
            (X, None, mean, var, torch.ones(4), None, False, 0.1, 1e-5, True),
            (X, X[:1], mean, var, None, None, False, 0.1, 1e-5, True),
            (X, None, None, None, None, None, False, 0.1, 1e-5, True),
            (X[0], None, mean, var, None, None, False, 0.1, 1e-5, True),
            (X, None, mean.int(), var.int(), None, None, True, 0.1, 1e-5, True),
        ],
        "conv_bn_relu": [
            (X, W, None, None, *vectors(4), None, None, stride, padding, dilation, groups, 0.1, True)
            for stride, padding, dilation, groups in [
                ((0, 0), (0, 0), (1, 1), 1), ((1, 1), (-1, 0), (1, 1), 1),
                ((1, 1), (0, 0), (0, 1), 1), ((1, 1), (0, 0), (1, 1), 2),
                ((1, 1), (0, 0), (1, 1), 0), ((1, 1), (0, 0), (9, 9), 1),
            ]
        ] + [
            (X, W, None, None, mean, var, None, None, (1, 1), (0, 0), (1, 1), 1, 0.1, True),
            (X, W, None, X, *vectors(4), None, None, (1, 1), (0, 0), (1, 1), 1, 0.1, True),
            (X, W[0], None, None, *vectors(4), None, None, (1, 1), (0, 0), (1, 1), 1, 0.1, True),
        ],
    }  # fmt: skip
    for arguments in wrong[operator]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            getattr(ops, operator)(*arguments)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


# --- drawn at random, compared with eager, errors included ---------------------------------------

DRAWN = settings(max_examples=250, deadline=None, derandomize=True, database=None)
LAYOUT = st.sampled_from(["contiguous", "channels_last", "sliced", "transposed", "expanded"])
DTYPE = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 6e-2}


def attempt(call, operands, how):
    """What a call gives, with gradients in fp64 (there no ReLU flips), or the error it raises."""
    call = functools.partial(call, **how)
    try:
        with torch.no_grad():
            inference = outcome(call, operands)
        if operands["input"].dtype != torch.float64:
            return inference
        gradients = outcome(call, operands, torch.ones_like(inference["output"]))
        return gradients | {"inference": inference["output"]}
    except Exception as error:  # noqa: BLE001 - whatever eager raises is the answer
        return error


def compare(variant, operands, how):
    ours, eager = (
        attempt(getattr(module, variant), operands, how) for module in (functional, reference)
    )
    if isinstance(eager, Exception):
        assert isinstance(ours, type(eager)), f"eager raises {eager!r}, ours gives {ours!r}"
    elif isinstance(ours, Exception):
        raise ours
    else:
        tolerance = TOLERANCE[operands["input"].dtype]
        assert_like_eager(ours, eager, rtol=tolerance, atol=tolerance)


def takes_no_eps() -> bool:
    """Whether eager takes an eps of 0 in eval, as fastres does; PyTorch 2.11 does not."""
    one = torch.ones(1)
    try:
        F.batch_norm(one.view(1, 1), one, one, eps=0.0)
    except ValueError:
        return False
    return True


EPS = [1e-5, 1e-2, -1e-5, *([0.0] if takes_no_eps() else [])]


@given(st.data())
@DRAWN
def test_batch_norm_of_anything(data):
    draw = data.draw
    size = st.integers(0, 5)
    shape = draw(st.tuples(size, st.integers(1, 5), size, size), label="shape")
    dtype, layout = draw(DTYPE, label="dtype"), draw(LAYOUT, label="layout")
    # eager looks at the running statistics of no values at all only now and then
    empty = 0 in shape
    length = shape[1] + draw(st.sampled_from([0] if empty else [0] * 9 + [1]), label="too many")
    given_vectors = batch_norm_operands(length, dtype)
    names = ["weight", "bias"] if empty else list(given_vectors)
    for name in draw(st.sets(st.sampled_from(names), max_size=2), label="absent"):
        given_vectors[name] = None
    operands = {"input": spread(shape, dtype, layout)}
    variant = draw(st.sampled_from(["bn_relu", "bn_add_relu"]), label="variant")
    if variant == "bn_add_relu":
        operands["residual"] = spread(shape, dtype, draw(LAYOUT, label="layout of the residual"))
    how = {
        "training": draw(st.booleans(), label="training"),
        "momentum": draw(st.sampled_from([0.1, 0.0, 1.0]), label="momentum"),
        "eps": draw(st.sampled_from(EPS), label="eps"),
    }
    compare(variant, operands | given_vectors, how)


@given(st.data())
@DRAWN
def test_convolution_of_anything(data):
    draw = data.draw
    batch, channels, *size = draw(
        st.tuples(st.integers(0, 3), st.integers(1, 3), *[st.integers(0, 9)] * 2), label="input"
    )
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2), label="kernel")
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 0, -1]), label="groups")
    channels, filters = (n * max(groups, 1) for n in (channels, draw(st.integers(0, 3))))
    channels += draw(st.sampled_from([0] * 9 + [1]), label="channels too many")
    dtype, layout = draw(DTYPE, label="dtype"), draw(LAYOUT, label="layout")
    weight = spread((filters, channels // max(groups, 1), *kernel), dtype, draw(LAYOUT), std=0.3)
    operands = {
        "input": spread((batch, channels, *size), dtype, layout),
        "weight": weight,
        "bias": draw(st.sampled_from([None, torch.linspace(-1, 1, filters, dtype=dtype)])),
        **{
            name if name.startswith("running") else f"bn_{name}": value
            for name, value in batch_norm_operands(filters, dtype).items()
        },
    }
    how = {
        "stride": draw(st.sampled_from([1, 2, (1, 3), (2,), 0, (1, -1)]), label="stride"),
        "padding": draw(st.sampled_from([0, 1, 2, (0, 3), "same", "valid", -1]), label="padding"),
        "dilation": draw(st.sampled_from([1, 2, (1, 2), 0]), label="dilation"),
        "groups": groups,
        "training": draw(st.booleans(), label="training"),
    }
    variant = draw(st.sampled_from(["conv_bn", "conv_bn_relu"]), label="variant")
    if how["padding"] == "same" and any(k % 2 == 0 for k in kernel):
        how["padding"] = 1  # eager pads one side more there: documented as not covered
    compare(variant, operands, how)


SERVED_BY_EAGER = {
    "broadcast": (lambda x: functional.add_relu(x, x[:, :1]), RuntimeError),
    "promotion": (lambda x: functional.add_relu(x, x.double()), TypeError),
    "int": (lambda x: functional.add_relu(x.int(), x), TypeError),
    "3-D": (lambda x: functional.add_relu(x[0], x[0]), ValueError),
    "bn 3-D": (lambda x: functional.bn_relu(x[0], None, None, training=True), ValueError),
    "bn broadcast": (
        lambda x: functional.bn_add_relu(x, x[:, :1], None, None, training=True), RuntimeError,
    ),
    "conv 3-D": (
        lambda x: functional.conv_bn_relu(x[0], torch.ones(2, 3, 1, 1), training=True), ValueError,
    ),
    "conv broadcast": (
        lambda x: functional.conv_bn_add_relu(x, x[:1], torch.ones(3, 3, 1, 1), training=True),
        RuntimeError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED_BY_EAGER)
def test_what_eager_would_serve_is_refused_in_training_too(name):
    call, error = SERVED_BY_EAGER[name]
    with pytest.raises(error, match="input|residual"):
        call(torch.randn(2, 3, 5, 7, requires_grad=True))
