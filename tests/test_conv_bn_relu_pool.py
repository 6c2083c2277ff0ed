"""max_pool2d(relu(batch_norm(conv2d(input)))) in inference: agreement, special values, threads; and
the stems of models, fused or left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import FLOATS, Calls, assert_close, assert_like_eager, batch_norm_operands, spread
from converting import assert_agrees, assert_exports_and_compiles, kinds, reasons
from torch import nn

import fastres
from fastres import functional, ops, reference
from fastres.compat import import_timm, import_torchvision

timm, torchvision = import_timm(), import_torchvision()


def arguments(shape, filters, kernel, stride, pool, dtype=torch.float32, layout="channels_last"):
    """Of the operator: input, parameters, geometry, pooling."""
    bn = batch_norm_operands(filters, dtype)
    weight = torch.randn(filters, shape[1], kernel, kernel, dtype=torch.float64)
    return [
        spread(shape, dtype, layout), (weight / (kernel * shape[1] ** 0.5)).to(dtype), None,
        (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1,
        bn["running_mean"], bn["running_var"].abs(), bn["weight"], bn["bias"], 1e-5, *pool,
    ]  # fmt: skip


def widened(given):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in given]


# (N, C, H, W), filters, kernel, stride, (pool's kernel, stride, padding): odd sizes; several bands;
# windows that overlap, touch, leave gaps, reach over an end
CASES = {
    "stem": ((1, 3, 61, 53), 64, 7, 2, (3, 2, 1)),
    "several bands": ((2, 3, 131, 257), 40, 7, 2, (3, 2, 1)),
    "small images": ((3, 3, 17, 9), 5, 7, 2, (3, 2, 1)),
    "3x3 stem": ((2, 16, 35, 33), 24, 3, 1, (3, 2, 1)),
    "strided 3x3": ((2, 32, 35, 33), 24, 3, 2, (2, 2, 0)),
    "direct": ((2, 5, 19, 21), 7, 1, 1, ((5, 3), (1, 2), (2, 1))),
    "gaps": ((1, 8, 23, 29), 16, 3, 1, (2, 5, 1)),
    "many filters": ((1, 128, 11, 13), 128, 3, 1, (2, 2, 0)),
    "one window": ((1, 8, 5, 6), 16, 3, 1, ((5, 6), 1, 0)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_eager(implementation, dtype, case):
    for layout in ("channels_last", "contiguous"):
        given = arguments(*CASES[case], dtype, layout)
        ours = functional.conv_bn_relu_pool(*given)
        eager = reference.conv_bn_relu_pool(*given)
        assert ours.dtype == dtype and ours.shape == eager.shape
        if layout == "channels_last":
            assert ours.is_contiguous(memory_format=torch.channels_last)
        # Winograd's bound: tests/test_winograd.py
        assert_close(ours, eager, reference.conv_bn_relu_pool(*widened(given)), scale=8)


@pytest.mark.parametrize("case", ["several bands", "3x3 stem", "direct"])
def test_pooled_bands_are_the_whole_convolution_pooled(threads, case):
    """Bit for bit, and whatever the number of threads."""
    given = arguments(*CASES[case])
    (input, weight, bias, stride, padding, dilation, groups, *bn, eps, kernel, step, pad) = given
    threads(1)
    whole = ops.conv_bn_relu(
        input, weight, bias, None, *bn, stride, padding, dilation, groups, eps, True
    )
    expected = F.max_pool2d(whole, kernel, step, pad)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(functional.conv_bn_relu_pool(*given), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values_behave_as_eager(implementation, dtype, value):
    for place in ("input", "weight", "bias"):
        given = arguments(*CASES["stem"], dtype)
        target = {"input": given[0][:, 1, 20:22, 31], "weight": given[1][7, 0, 3, 3:4]}
        target.get(place, given[10][5:6]).fill_(value)
        ours, eager = (f.conv_bn_relu_pool(*given) for f in (functional, reference))
        assert_like_eager({"output": ours}, {"output": eager}, rtol=0.02, atol=0.05)
        assert not ours.isfinite().all() or value < 0


def test_empty_batch_and_mistakes(implementation):
    given = arguments(*CASES["stem"])
    empty = [given[0][:0], *given[1:]]
    assert functional.conv_bn_relu_pool(*empty).shape == (0, 64, 16, 14)
    with pytest.raises((RuntimeError, ValueError), match="^input: expected 2 channels"):
        functional.conv_bn_relu_pool(given[0], given[1][:, :2], *given[2:])
    with pytest.raises(RuntimeError, match="pad"):
        functional.conv_bn_relu_pool(*given[:-1], 2)


def test_opcheck():
    given = arguments(*CASES["small images"])
    input, weight, bias, *geometry = given[:7]
    torch.library.opcheck(
        ops.conv_bn_relu_pool,
        (input, weight, bias, *given[7:11], *geometry, given[11], *((k, k) for k in given[12:])),
    )


# --- models --------------------------------------------------------------------------------------


class Stem(nn.Module):
    def __init__(self, pool=None, act=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8)
        self.act, self.pool = act or nn.ReLU(), pool or nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return self.pool(self.act(self.bn(self.conv(x))))


class Functional(Stem):
    def forward(self, x):
        return self.pool(F.relu(self.bn(self.conv(x))))


class PooledAndKept(Stem):
    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.pool(x), x


@pytest.mark.parametrize("make", [Stem, Functional, lambda: Stem(nn.MaxPool2d(2))])
def test_fused(one_thread, make):
    converted = assert_agrees(make(), torch.randn(2, 3, 21, 23))
    assert kinds(converted.train()) == {"conv_bn_relu": 1}
    assert kinds(converted.eval()) == {"conv_bn_relu_pool": 1} and "pool" not in reasons(converted)
    with torch.no_grad(), Calls() as calls:
        converted(torch.randn(2, 3, 21, 23))
    assert calls.names == ["conv_bn_relu_pool"]


class Shifted(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "make",
    [
        PooledAndKept,
        lambda: Stem(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        lambda: Stem(nn.MaxPool2d(2, dilation=2)),
        lambda: Stem(nn.AvgPool2d(2)),
        lambda: Stem(Shifted(2)),
    ],
)
def test_pooling_left_alone(one_thread, make):
    converted = assert_agrees(make(), torch.randn(2, 3, 21, 23))
    assert kinds(converted.eval()) == {"conv_bn_relu": 1}


@pytest.mark.parametrize("watched", ["conv", "bn", "act", "pool"])
def test_hooks_see_their_values(one_thread, watched):
    model = Stem().eval()
    converted = fastres.convert(model, inplace=False)
    seen = {}
    for name, net in {"eager": model, "ours": converted}.items():
        net.get_submodule(watched).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    x = torch.randn(2, 3, 21, 23)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["ours"], seen["eager"], rtol=1e-4, atol=1e-5)
    assert "conv_bn_relu_pool" not in kinds(converted)
    assert (kinds(converted) == {"conv_bn_relu": 1}) == (watched == "pool")


@pytest.mark.parametrize("context", ["autocast", "grad", "training", "eager"])
def test_the_authors_modules_run(one_thread, context):
    model = Stem().eval()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 21, 23)
    contexts = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "grad": torch.enable_grad(),
        "training": torch.no_grad(),
        "eager": fastres.backend("eager"),
    }
    for net in (model, converted):
        net.bn.train(context == "training")
    with torch.set_grad_enabled(context == "grad"), contexts[context], Calls() as calls:
        output, expected = converted(x), model(x)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(converted.bn.running_mean, model.bn.running_mean)
    assert "conv_bn_relu_pool" not in calls.names


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: timm.create_model("resnet18", pretrained=False, num_classes=10),
        lambda: fastres.models.create("resnet18", num_classes=10),
    ],
    ids=["torchvision", "timm", "fastres"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resnets(one_thread, make, dtype):
    model = make().eval()
    converted = fastres.convert(copy.deepcopy(model).to(dtype))
    x = torch.randn(2, 3, 65, 71).to(dtype)
    with torch.no_grad(), Calls() as calls:
        output = converted(x)
    assert calls.names[0] == "conv_bn_relu_pool" and calls.names[-1] == "mean_linear"
    with torch.no_grad(), fastres.backend("eager"):
        truth, eager = copy.deepcopy(model).to(dtype).double()(x.double()), model.to(dtype)(x)
    assert_close(output, eager, truth, scale=16)


def test_export_and_compile(one_thread):
    model = fastres.convert(Stem().eval())
    assert_exports_and_compiles(model, torch.randn(1, 3, 64, 64), "conv_bn_relu_pool")
