"""Convolution, batch norm, optional residual, optional ReLU: agreement in every geometry, and
folded weights that are never stale."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    FLOATS,
    Calls,
    assert_close,
    assert_like_eager,
    assert_rule,
    assert_same_bits,
    away_from_zero,
    batch_norm_operands,
    outcome,
    spread,
    widened,
)
from torch import nn

from fastres import arguments, functional, reference, sites

# channels, filters, kernel, stride, padding, dilation, groups, bias; odd and prime throughout
GEOMETRIES = {
    "1x1": (7, 11, 1, 1, 0, 1, 1, False),
    "1x1 stride 2": (7, 11, 1, 2, 0, 1, 1, True),
    "3x3": (5, 7, 3, 1, 1, 1, 1, False),
    "3x3 stride 2": (5, 7, 3, 2, 1, 1, 1, True),
    "3x3 dilated": (5, 7, 3, 1, 2, 2, 1, False),
    "3x3 unpadded": (3, 17, 3, 1, 0, 1, 1, True),
    "5x5": (3, 5, 5, 1, 2, 1, 1, False),
    "7x7 stem": (3, 13, 7, 2, 3, 1, 1, False),
    "one channel": (1, 1, 3, 1, 1, 1, 1, True),
    "grouped": (6, 10, 3, 1, 1, 1, 2, False),
    "depthwise": (7, 7, 3, 2, 1, 1, 7, True),
    "uneven": (3, 5, (3, 1), (1, 2), (1, 0), (2, 1), 1, True),
    "16 channels": (16, 32, 3, 1, 1, 1, 1, False),  # oneDNN's blocked layouts need no padding here
}
MAPS = [(2, 11, 13), (1, 7, 7)]
VARIANTS = ["conv_bn", "conv_bn_relu", "conv_bn_add_relu"]


def operands_for(geometry, size, dtype, layout, variant, mixed=False, weight_layout="contiguous"):
    channels, filters, kernel, stride, padding, dilation, groups, bias = GEOMETRIES[geometry]
    kernel = arguments.pair("kernel", kernel)
    input = spread((size[0], channels, *size[1:]), dtype, layout)
    fan_in = channels // groups * kernel[0] * kernel[1]
    weight = spread((filters, channels // groups, *kernel), dtype, weight_layout, std=fan_in**-0.5)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    norm = batch_norm_operands(filters, torch.float32 if mixed else dtype)
    operands = {
        "input": input,
        "residual": None,
        "weight": weight,
        "bias": spread((1, 1, 1, filters), dtype).flatten() if bias else None,
        "running_mean": norm["running_mean"],
        "running_var": norm["running_var"],
        "bn_weight": norm["weight"],
        "bn_bias": norm["bias"],
    }
    if variant == "conv_bn_add_relu":
        shape = F.conv2d(input.float(), weight.float(), None, **how).shape
        operands["residual"] = spread(shape, dtype, layout)
    return operands, how


def call(module, variant, how, input, residual, **rest):
    tensors = (input,) if residual is None else (input, residual)
    return getattr(module, variant)(*tensors, **rest, **how)


def check(variant, operands, how, gradients: bool):
    """The error rule for one call, as inference or with every gradient."""
    exact = widened(operands)
    dtype = operands["input"].dtype
    grad = None
    if gradients:
        buffers = {name: exact[name].clone() for name in ("running_mean", "running_var")}
        rest = {k: v for k, v in exact.items() if k != "residual"} | buffers
        before_relu = reference.conv_bn(**rest, **how)
        if exact["residual"] is not None:
            before_relu = before_relu + exact["residual"]
        grad = away_from_zero(spread(before_relu.shape), before_relu).to(dtype)
    results = [
        outcome(functools.partial(call, module, variant, how), given, grad)
        for module, given in ((functional, operands), (reference, operands), (reference, exact))
    ]
    # The gradient of a bias before batch norm in training is zero: m rounded terms that cancel.
    if gradients and how.get("training") and operands["bias"] is not None:
        terms = grad.numel() / grad.shape[1]
        cancelling = [result.pop("grad of bias") for result in results]
        assert_close(*cancelling, "grad of bias", dtype, scale=terms**0.5)
    # Eager rounds the convolution's output to the activations' dtype, so do we in training, and
    # gradients of fp32 parameters behind it are as uncertain as that.
    assert_rule(*results, atol_dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_inference_agrees_with_eager(one_thread, geometry, dtype, layout, variant):
    for size, mixed in itertools.product(MAPS, {False, dtype in (torch.bfloat16, torch.float16)}):
        operands, how = operands_for(geometry, size, dtype, layout, variant, mixed)
        with Calls() as calls, torch.no_grad():
            check(variant, operands, how, gradients=False)
        assert calls.names == ["conv_bn_relu"], "the folded convolution did not serve"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_agree_with_eager(one_thread, dtype, layout, training, variant):
    for geometry in GEOMETRIES:
        operands, how = operands_for(geometry, (3, 7, 11), dtype, layout, variant)
        check(variant, operands, how | {"training": training}, gradients=True)


def test_fallback_agrees_with_eager(implementation, one_thread):
    for geometry, variant in itertools.product(GEOMETRIES, VARIANTS):
        operands, how = operands_for(geometry, (2, 7, 11), torch.float32, "channels_last", variant)
        with torch.no_grad():
            check(variant, operands, how, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_maps_on_two_threads(threads, dtype):
    threads(2)
    for geometry, layout in (("16 channels", "channels_last"), ("7x7 stem", "contiguous")):
        operands, how = operands_for(geometry, (3, 61, 67), dtype, layout, "conv_bn_add_relu")
        with torch.no_grad():
            check("conv_bn_add_relu", operands, how, gradients=False)
            run = functools.partial(call, functional, "conv_bn_add_relu", how)
            assert_same_bits(outcome(run, operands), outcome(run, operands))


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("geometry", ["3x3", "1x1"])
def test_output_format_is_eagers(geometry, layout, weight_layout):
    """channels_last where the input or the weight suggests it, else contiguous."""
    operands, how = operands_for(
        geometry, (2, 7, 11), torch.float32, layout, "conv_bn_add_relu", False, weight_layout
    )
    with torch.no_grad():
        check("conv_bn_add_relu", operands, how, gradients=False)
        ours, eager = (
            call(m, "conv_bn_add_relu", how, **operands) for m in (functional, reference)
        )
    assert ours.stride() == eager.stride()


@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_residual_of_another_layout_stays_untouched(residual_layout):
    operands, how = operands_for(
        "3x3", (2, 7, 11), torch.float32, "channels_last", "conv_bn_add_relu"
    )
    residual = spread(operands["residual"].shape, torch.float32, residual_layout)
    before = residual.clone()
    operands["residual"] = residual
    with torch.no_grad():
        check("conv_bn_add_relu", operands, how, gradients=False)
    assert torch.equal(residual, before), "the sum was accumulated into the caller's residual"


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("absent", ["bn_weight", "bn_bias", "both"])
def test_padding_by_name_and_absent_vectors(padding, absent):
    operands, how = operands_for("3x3 dilated", (2, 11, 13), torch.float32, "contiguous", "conv_bn")
    names = ("bn_weight", "bn_bias") if absent == "both" else (absent,)
    operands |= dict.fromkeys(names)
    how |= {"padding": padding}
    with torch.no_grad():
        check("conv_bn_relu", operands, how, gradients=False)
    check("conv_bn_relu", operands, how, gradients=True)
    check("conv_bn_relu", operands, how | {"training": True}, gradients=True)


@pytest.mark.parametrize("variant, where", [
    *itertools.product(VARIANTS, ["input", "weight", "bias", "bn_bias", "running_var"]),
    ("conv_bn_add_relu", "residual"),
])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_behave_as_eager(variant, where, value):
    operands, how = operands_for("3x3 unpadded", (2, 7, 11), torch.float32, "contiguous", variant)
    operands[where] = operands[where].clone()
    operands[where].view(-1)[3] = value
    results = []
    with torch.no_grad():
        for module in (functional, reference):
            results.append(outcome(functools.partial(call, module, variant, how), operands))
    assert_like_eager(*results)


@pytest.mark.parametrize("training", [False, True])
def test_empty_batches_behave_as_eager(training):
    operands, how = operands_for("3x3", (2, 7, 11), torch.float32, "contiguous", "conv_bn_relu")
    operands["input"] = operands["input"][:0]
    how |= {"training": training}
    results = []
    for module in (functional, reference):
        run = functools.partial(call, module, "conv_bn_relu", how)
        results.append(outcome(run, operands, torch.empty(0, 7, 7, 11)))
        with torch.no_grad():
            assert run(**operands | {"input": operands["input"]}).shape == (0, 7, 7, 11)
    assert_like_eager(*results)


# --- folded weights are never stale --------------------------------------------------------------


def make_site(dtype=torch.float32):
    conv = nn.Conv2d(5, 7, 3, padding=1)
    bn = nn.BatchNorm2d(7)
    for name, value in batch_norm_operands(7, torch.float32).items():
        getattr(bn, name).data.copy_(value)
    return nn.ModuleDict({"conv": conv, "bn": bn}).to(dtype).eval()


def site_outputs(site, input):
    with torch.inference_mode():
        fused = sites.conv_bn_act(input, site["conv"], site["bn"], F.relu)
        return fused, site["bn"](site["conv"](input)).relu()


def in_place(site, input):
    with torch.no_grad():
        site["conv"].weight.mul_(-2)


def in_place_under_inference_mode(site, input):
    with torch.inference_mode():
        site["conv"].weight.mul_(-2)


def through_data(site, input):
    site["conv"].weight.data.mul_(-2)


def through_numpy(site, input):
    site["conv"].weight.detach().numpy()[...] *= -2


def conv_bias_through_data(site, input):
    site["conv"].bias.data.add_(1)


def data_replaced(site, input):
    site["conv"].weight.data = torch.randn(7, 5, 3, 3)


def parameter_replaced(site, input):
    site["conv"].weight = nn.Parameter(torch.randn(7, 5, 3, 3))


def parameter_swapped(site, input):
    torch.utils.swap_tensors(site["conv"].weight, nn.Parameter(torch.randn(7, 5, 3, 3)))


def optimizer_step(site, input):
    sgd = torch.optim.SGD(site.parameters(), 0.5)
    for parameter in site.parameters():
        parameter.grad = torch.randn_like(parameter)
    sgd.step()


def state_dict_loaded(site, input):
    site.load_state_dict(make_site().state_dict())


def state_dict_assigned(site, input):
    site.load_state_dict(make_site().state_dict(), assign=True)


def statistics_in_place(site, input):
    site["bn"].running_mean.add_(1)
    site["bn"].running_var.mul_(3)


def statistics_through_data(site, input):
    site["bn"].running_mean.data.add_(1)


def statistics_reset(site, input):
    site["bn"].reset_running_stats()


def fused_training_step(site, input):
    site.train()
    sites.conv_bn_act(input, site["conv"], site["bn"], F.relu)
    site.eval()


def fused_training_step_without_grad(site, input):
    site.train()
    with torch.no_grad():
        sites.conv_bn_act(input, site["conv"], site["bn"], F.relu)
    site.eval()


def eager_training_step(site, input):
    """F.batch_norm writes the running statistics without raising their version."""
    site.train()
    site["bn"](site["conv"](input))
    site.eval()


def bn_parameters_through_data(site, input):
    site["bn"].weight.data.mul_(-1)
    site["bn"].bias.data.add_(1)


def eps_changed(site, input):
    site["bn"].eps = 0.5


CHANGES = [
    in_place, in_place_under_inference_mode, through_data, through_numpy,
    conv_bias_through_data, data_replaced, parameter_replaced, parameter_swapped, optimizer_step,
    state_dict_loaded, state_dict_assigned, statistics_in_place, statistics_through_data,
    statistics_reset, fused_training_step, fused_training_step_without_grad, eager_training_step,
    bn_parameters_through_data, eps_changed,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parameters_are_seen(change):
    site, input = make_site(), spread((2, 5, 7, 11), torch.float32, "channels_last")
    for _ in range(2):  # the second call finds the folded weights of the first
        before, eager = site_outputs(site, input)
        torch.testing.assert_close(before, eager, rtol=1e-4, atol=1e-4)
    change(site, input)
    after, eager = site_outputs(site, input)
    torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3), "the change has no effect here"


@pytest.mark.parametrize("size", [3, 24])
def test_one_pruned_filter_is_seen(size):
    """By one job, and where several share the look at the filters. Pruning scripts write
    ``weight.data[filter] = 0``, which leaves the version as it was."""
    conv, bn = nn.Conv2d(32, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128).eval()
    input = torch.randn(1, 32, size, size)
    missed = []
    with torch.inference_mode():
        for index in range(128):
            sites.conv_bn_act(input, conv, bn)
            conv.weight.data[index] = 0
            if sites.conv_bn_act(input, conv, bn)[0, index].any():
                missed.append(index)
                conv.weight.mul_(1)  # a new version: the next filter starts from a fresh entry
    assert not missed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_changed_dtype_is_seen(dtype):
    site, input = make_site(), spread((2, 5, 7, 11), torch.float32)
    site_outputs(site, input)
    fused, eager = site_outputs(site.to(dtype), input.to(dtype))
    assert fused.dtype == dtype
    torch.testing.assert_close(fused, eager, rtol=2e-2, atol=2e-2)


def test_new_weights_at_an_old_address_are_seen():
    """The allocator hands the freed weight's memory to the next one, version 0 again."""
    input = spread((2, 5, 7, 11), torch.float32)
    addresses = set()
    for _ in range(20):
        site = make_site()
        addresses.add(site["conv"].weight.data_ptr())
        fused, eager = site_outputs(site, input)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
        del site
    assert len(addresses) < 20, "no address came back, so nothing was tried"


def test_one_convolution_before_two_batch_norms():
    """Shared modules: the folded weights belong to the pair, not to the convolution."""
    first, second = make_site(), make_site()
    second["conv"] = first["conv"]
    input = spread((2, 5, 7, 11), torch.float32)
    for _ in range(2):
        for site in (first, second):
            torch.testing.assert_close(*site_outputs(site, input), rtol=1e-4, atol=1e-4)


def test_inputs_of_changing_size_and_format():
    site = make_site()
    for shape in [(2, 5, 7, 11), (1, 5, 13, 5), (7, 5, 3, 3), (2, 5, 7, 11)]:
        for layout in ("contiguous", "channels_last", "sliced"):
            torch.testing.assert_close(
                *site_outputs(site, spread(shape, torch.float32, layout)), rtol=1e-4, atol=1e-4
            )


def test_parameters_made_in_inference_mode():
    """Inference tensors have no version counter."""
    with torch.inference_mode():
        site = make_site()
    input = spread((2, 5, 7, 11), torch.float32)
    torch.testing.assert_close(*site_outputs(site, input), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        site["conv"].weight.mul_(-2)
    torch.testing.assert_close(*site_outputs(site, input), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast(dtype):
    """Result dtypes are eager's (bf16, but fp64 stays), and so are the values."""
    site, input = make_site(dtype), spread((2, 5, 7, 11), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        fused, eager = site_outputs(site, input)
        torch.testing.assert_close(fused, eager, rtol=2e-2, atol=2e-2)
        assert fused.dtype == eager.dtype
        site.train()
        trained = sites.conv_bn_act(input, site["conv"], site["bn"], F.relu)
        assert trained.dtype == eager.dtype
        trained.float().square().mean().backward()
    assert site["conv"].weight.grad.dtype == dtype
