"""First and second derivatives by finite differences, the operators' contracts, frozen tensors,
checkpointing, and what autograd is asked to do beside plain backward."""

import functools

import pytest
import torch
import torch.nn.functional as F
from agreement import FLOATS, Calls, assert_like_eager, batch_norm_operands, spread
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import functional, ops, reference, sites
from fastres.arguments import accumulation_dtype, conv_output_size

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 3, 3, 2)
OPERATORS = [  # residual, relu
    pytest.param(False, True, id="bn_relu"),
    pytest.param(True, True, id="bn_add_relu"),
    pytest.param(False, False, id="bn"),
    pytest.param(True, False, id="bn_add"),
]


def away_from_kinks(call, *leaves):
    """Moves the seed until no output is within 0.02 of the ReLU's kink: a finite difference across
    it is no derivative."""
    for seed in range(100):
        torch.manual_seed(seed)
        tensors = [spread(leaf.shape).requires_grad_() for leaf in leaves]
        if call(*tensors).abs().min() > 0.02:
            return tensors
    raise AssertionError("no seed keeps the pre-activations away from zero")


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_add_relu_derivatives(implementation, check):
    leaves = away_from_kinks(torch.add, *[torch.empty(SHAPE)] * 2)
    assert check(functional.add_relu, leaves)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual, relu", OPERATORS)
def test_bn_relu_derivatives(implementation, residual, relu, training, check):
    mean, var = (batch_norm_operands(3, torch.float64)[k] for k in ("running_mean", "running_var"))

    def call(input, weight, bias, residual=None, relu=relu):
        return functional.batch_norm(
            input, residual, mean.clone(), var.clone(), weight.flatten(), bias.flatten(),
            training, 0.1, 1e-2, relu,
        )  # fmt: skip

    vectors = [torch.empty(1, 1, 1, 3)] * 2
    leaves = away_from_kinks(
        functools.partial(call, relu=False),
        torch.empty(SHAPE), *vectors, *[torch.empty(SHAPE)] * residual,
    )  # fmt: skip
    assert check(call, leaves)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conv_bn_add_relu_derivatives(training, check):
    mean, var = (batch_norm_operands(2, torch.float64)[k] for k in ("running_mean", "running_var"))

    def call(input, residual, weight, bias, module=functional):
        function = module.conv_bn_add_relu if module is functional else module.conv_bn
        operands = (input, residual) if module is functional else (input,)
        output = function(
            *operands, weight, bias.flatten(), 1, 1, running_mean=mean.clone(),
            running_var=var.clone(), training=training, eps=1e-2,
        )  # fmt: skip
        return output if module is functional else output + residual

    shapes = [(2, 2, 3, 3), (2, 2, 3, 3), (2, 2, 3, 3), (1, 1, 1, 2)]
    leaves = away_from_kinks(
        functools.partial(call, module=reference), *(torch.empty(shape) for shape in shapes)
    )
    assert check(call, leaves)


# --- the operators' contracts --------------------------------------------------------------------


def operator_arguments(layout, dtype, shape=(2, 3, 5, 7)):
    """Arguments for every operator, in every combination that changes its outputs' metadata."""
    input, residual, grad = (spread(shape, dtype, layout) for _ in range(3))
    channels, wide = shape[1], accumulation_dtype(dtype)
    vectors = list(batch_norm_operands(channels, wide).values())
    mean, invstd = spread((1, 1, 1, channels), wide).flatten(), vectors[1]
    weight = spread((4, channels, 3, 3), dtype, layout)
    conv_vectors = list(batch_norm_operands(4, wide).values())
    geometry = ((2, 1), (1, 1), (1, 1), 1)
    size = conv_output_size(shape, weight.shape, *geometry[:3])
    yield ops.add_relu, (input, residual)
    yield ops.add_relu_backward, (grad, input)
    for training in (True, False):
        yield ops.bn_relu, (input, residual, *vectors, training, 0.1, 1e-5, True)
        yield ops.bn_relu, (input, None, *vectors, training, 0.1, 1e-5, False)
        for mask in ([True, True, True], [False, True, False], [False, False, False]):
            yield (
                ops.bn_relu_backward,
                (grad, input, residual, *vectors[2:], mean, invstd, training, True, mask),
            )
    yield ops.bn_relu, (input, None, None, None, None, None, True, 0.1, 1e-5, True)
    yield (
        ops.bn_relu_backward,
        (grad, input, None, None, None, mean, invstd, True, True, [True, False, True]),
    )
    yield ops.conv_bn_relu, (input, weight, None, None, *conv_vectors, *geometry, 1e-5, True)
    yield (
        ops.conv_bn_relu,
        (input, weight, conv_vectors[0].to(dtype), spread(size, dtype, layout),
         *conv_vectors[:2], None, None, *geometry, 1e-5, False),
    )  # fmt: skip


def test_opcheck():
    """Schema (aliases, mutations), fake against real (shapes, strides, dtypes), AOT dispatch."""
    for operator, arguments in operator_arguments("channels_last", torch.float32):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 1, 5, 3)], ids=str)
def test_schemas_and_fakes(implementation, layout, dtype, shape):
    for operator, arguments in operator_arguments(layout, dtype, shape):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(3, 5, 1, 1), (1, 1, 1, 3), (2, 1, 5, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fakes_where_both_memory_formats_fit(implementation, layout, shape):
    """C = 1 or one pixel: both formats are contiguous, the strides must still be predicted."""
    for operator, arguments in operator_arguments(layout, torch.float32, shape):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


# --- what autograd is asked to do ----------------------------------------------------------------


def small_net():
    """Every kind of site: conv-bn-relu, projection, residual, pre-activation, bare addition."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shortcut = nn.Sequential(nn.Conv2d(5, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
            self.stem = fastres.nn.ConvBNReLU(3, 5)
            self.block = fastres.nn.BasicBlock(5, 8, 2, shortcut)
            self.bn = fastres.nn.BNReLU(8)
            self.add = fastres.nn.AddReLU()

        def forward(self, x):
            x = self.block(self.stem(x))
            return self.add(self.bn(x), x)

    return Net()


def gradients(net, loss):
    loss.backward()
    result = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return result | {name: b.clone() for name, b in net.named_buffers()}


def eager_gradients(training, prepare=lambda net: None):
    net = small_net().train(training)
    prepare(net)
    with fastres.backend("eager"):
        return gradients(net, net(images()).square().mean())


def images():
    return torch.randn(4, 3, 11, 13, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_net_has_eagers_gradients(recorder, training):
    net = small_net().train(training)
    with Calls() as calls:
        ours = gradients(net, net(images()).square().mean())
    assert calls.names.count("bn_relu_backward") == 5 and calls.names.count("add_relu") == 1
    assert_like_eager(ours, eager_gradients(training), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_checkpointing(recorder, use_reentrant, training):
    """The forward runs twice, as in eager: so do the running statistics' updates."""
    results = []
    for name in ("auto", "eager"):
        net = small_net().train(training)
        with fastres.backend(name):
            output = checkpoint(net, images().requires_grad_(), use_reentrant=use_reentrant)
            results.append(gradients(net, output.square().mean()))
    assert_like_eager(*results, rtol=1e-4, atol=1e-6)


def freeze_batch_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False).eval()


def freeze_stem(net):
    net.stem.requires_grad_(False)


def freeze_all_but_the_last(net):
    net.requires_grad_(False)
    net.bn.requires_grad_(True)


@pytest.mark.parametrize("freeze, parameter_sums", [
    (freeze_batch_norms, 0), (freeze_stem, 4), (freeze_all_but_the_last, 1),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_frozen_weights_cost_nothing(recorder, freeze, parameter_sums):
    net = small_net()
    freeze(net)
    with Calls() as calls:
        ours = gradients(net, net(images()).square().mean())
    masks = [arguments[-1] for name, arguments in calls.made if name == "bn_relu_backward"]
    assert sum(mask[2] for mask in masks) == parameter_sums
    if freeze is freeze_all_but_the_last:
        assert masks == [[False, False, True]]
    assert_like_eager(ours, eager_gradients(True, freeze), rtol=1e-4, atol=1e-6)


def test_backward_twice_and_after_changes(recorder):
    """retain_graph works; a saved tensor that changed since is noticed, not used."""
    net = small_net()
    loss = net(images()).square().mean()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        net.bn.bn.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_two_forwards_before_one_backward(recorder, training):
    """The second forward moves the running statistics, not what the first one saved."""
    results = []
    for name in ("auto", "eager"):
        net = small_net().train(training)
        with fastres.backend(name):
            losses = [net(images() * factor).square().mean() for factor in (1, 2)]
            results.append(gradients(net, sum(losses)))
    assert_like_eager(*results, rtol=1e-4, atol=1e-6)


def test_gradient_penalty(recorder):
    """Double backward through a training net, gradients of gradients by create_graph."""
    results = []
    for name in ("auto", "eager"):
        net, input = small_net().double(), images().double().requires_grad_()
        with fastres.backend(name):
            (slope,) = torch.autograd.grad(net(input).square().mean(), input, create_graph=True)
            results.append(gradients(net, slope.square().sum()))
    assert_like_eager(*results, rtol=1e-9, atol=1e-12)


def test_forward_mode_is_right():
    """Jacobian-vector products: served by the eager maths, never silently without a tangent."""
    norm = batch_norm_operands(3, torch.float64)
    primals = (spread(SHAPE), spread(SHAPE))
    tangents = (spread(SHAPE), spread(SHAPE))
    for name, call in {
        "add": lambda m, x, y: m.add_relu(x, y),
        "train": lambda m, x, y: m.bn_add_relu(x, y, None, None, training=True),
        "eval": lambda m, x, y: m.bn_add_relu(x, y, *norm.values()),
    }.items():
        products = []
        for module in (functional, reference):
            with torch.autograd.forward_ad.dual_level():
                duals = map(torch.autograd.forward_ad.make_dual, primals, tangents)
                output = torch.autograd.forward_ad.unpack_dual(call(module, *duals))
                assert output.tangent is not None, f"{name}: the tangent was dropped"
                products.append(output.tangent)
        torch.testing.assert_close(*products, msg=name)


def test_forward_mode_through_a_folded_convolution():
    weight, (mean, var, *_) = spread((4, 3, 3, 3)), batch_norm_operands(4, torch.float64).values()
    products = []
    for module in (functional, reference):
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = torch.autograd.forward_ad.make_dual(*(torch.ones(2, 3, 5, 5).double(),) * 2)
            output = module.conv_bn_relu(dual, weight, running_mean=mean, running_var=var)
            products.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
    assert products[0] is not None, "the tangent was dropped"
    torch.testing.assert_close(*products)


def test_function_transforms():
    """torch.func.grad, jvp and vmap give eager's answer."""
    norm = list(batch_norm_operands(3, torch.float64).values())
    weight, conv_norm = spread((4, 3, 3, 3)), list(batch_norm_operands(4, torch.float64).values())
    inputs = torch.randn(3, 2, 3, 5, 7, dtype=torch.float64)
    for call in (
        lambda m, x: m.add_relu(x, x * x),
        lambda m, x: m.bn_relu(x, *norm),
        lambda m, x: m.bn_add_relu(x, x * x, None, None, *norm[2:], training=True),
        lambda m, x: m.conv_bn_relu(x, weight, running_mean=conv_norm[0], running_var=conv_norm[1]),
    ):
        results = []
        for module in (functional, reference):
            run = functools.partial(call, module)
            results.append({
                "vmap": torch.vmap(run)(inputs),
                "grad": torch.func.grad(lambda x, run=run: run(x).square().sum())(inputs[0]),
                "jvp": torch.func.jvp(run, (inputs[0],), (inputs[1],))[1],
                "per-sample": torch.vmap(
                    torch.func.grad(lambda x, run=run: run(x).square().sum())
                )(inputs),
            })  # fmt: skip
        assert_like_eager(*results, rtol=1e-9, atol=1e-9)


def test_inference_mode_then_training():
    """Tensors of inference mode stay there; the same module trains before and after."""
    net = small_net()
    gradients(net, net(images()).square().mean())
    net.eval()
    with torch.inference_mode():
        output = net(images())
    assert output.is_inference()
    with fastres.backend("eager"), torch.no_grad():
        torch.testing.assert_close(output, net(images()), rtol=1e-4, atol=1e-5)
    net.train()
    net(images()).square().mean().backward()


def test_autocast_training_has_eagers_dtypes_and_gradients(recorder):
    results = []
    for name in ("auto", "eager"):
        net = small_net()
        with fastres.backend(name):
            with torch.autocast("cpu", torch.bfloat16):
                output = net(images())
            assert output.dtype == torch.bfloat16
            results.append(gradients(net, output.float().square().mean()))
    for name, value in results[0].items():
        assert value.dtype == results[1][name].dtype
        scale = max(1e-3, results[1][name].abs().max().item())
        # eight significant bits through four layers, compared as a whole
        assert (value - results[1][name]).abs().max() < 0.05 * scale, name


def test_autocast_with_a_residual_of_another_dtype(recorder):
    """bf16 from the convolution, fp32 from the shortcut: promoted as eager does."""
    conv, bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    x = images()
    for context in (torch.enable_grad(), torch.no_grad()):
        for training in (True, False):
            bn.train(training)
            with context, torch.autocast("cpu", torch.bfloat16):
                ours = sites.conv_bn_act(x, conv, bn, F.relu, x)
                with fastres.backend("eager"):
                    eager = sites.conv_bn_act(x, conv, bn, F.relu, x)
            assert ours.dtype == eager.dtype == torch.float32
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
