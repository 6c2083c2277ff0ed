"""The weight's gradient by Winograd: its numbers, when it serves, its limits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, spread
from wgrads import algorithm_of, assert_agrees, eager, wgrad

import fastres
from fastres import ops

pytestmark = pytest.mark.skipif(
    ops.extension is None or ops.extension.build_info()["cpu_capability"] == "DEFAULT",
    reason="needs the compiled extension and a processor with AVX2",
)

# N, C, H, W, K, padding
SHAPES = [
    (2, 16, 14, 14, 64, 1),
    (1, 17, 9, 7, 33, 1),  # tiles reach over every edge; channels fill no vector
    (3, 1, 5, 11, 1, 0),
    (1, 40, 3, 3, 5, 0),  # one pixel
    (8, 5, 1, 1, 3, 1),
    (4, 70, 2, 3, 130, 1),  # several parts of filters and channels, none of them whole
    (1, 8, 6, 6, 70, 2),
    (5, 20, 15, 18, 7, 2),
    (3, 33, 21, 40, 20, 1),  # tiles of every kind, several groups of them
    (8, 64, 30, 30, 32, 1),  # split tiles
    (2, 512, 7, 7, 32, 1),
]
ALGORITHMS = ("winograd2", "winograd4")
POISON = (float("nan"), float("inf"), -float("inf"))


def operands(shape, dtype=torch.float32, layout="channels_last"):
    """grad_output, input, weight"""
    n, c, h, w, k, padding = shape
    grad = spread((n, k, h + 2 * padding - 2, w + 2 * padding - 2), dtype, layout)
    return grad, spread((n, c, h, w), dtype, layout).relu(), spread((k, c, 3, 3), dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_eager(shape, algorithm, dtype):
    tensors, padding = operands(shape, dtype), shape[-1]
    ours = ops.extension.conv_wgrad_by(algorithm, *tensors, 1, padding)
    assert ours.dtype == dtype and ours.shape == tensors[2].shape
    assert_agrees(ours, *tensors, padding)


def test_one_value_at_a_time():
    """Every tap of every place: one gradient meets one pixel, all else is zero."""
    grad, input, weight = operands((1, 32, 9, 10, 32, 1))
    for y, x in ((0, 0), (3, 4), (4, 3), (8, 9), (7, 0)):
        alone = torch.zeros_like(grad)
        alone[..., y, x] = grad[..., y, x]
        for algorithm in ALGORITHMS:
            ours = ops.extension.conv_wgrad_by(algorithm, alone, input, weight, 1, 1)
            assert_agrees(ours, alone, input, weight, 1)


@pytest.mark.parametrize("size, channels", [(56, 64), (14, 256), (7, 512)])
def test_the_error_at_the_sizes_of_resnet(size, channels):
    """Of gradients as training has them, against what eager's sums lose."""
    tensors = operands((4, channels, size, size, channels, 1))
    truth = eager(*(t.double() for t in tensors), 1)
    scale = truth.abs().max()
    for algorithm in ALGORITHMS:
        ours = ops.extension.conv_wgrad_by(algorithm, *tensors, 1, 1)
        assert (ours - truth).abs().max() <= 4e-6 * scale
    assert_agrees(ours, *tensors, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_the_operator_in_every_layout(layout, weights, dtype):
    grad, input, _ = operands((8, 32, 20, 20, 64, 1), dtype, layout)
    weight = spread((64, 32, 3, 3), dtype, weights)
    ours = wgrad(grad, input, weight, 1)
    last = weights == "channels_last"
    assert ours.is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    assert_agrees(ours, grad, input, weight, 1)


def serves(grad, input, weight, padding, stride=1, dilation=1) -> bool:
    return algorithm_of(grad, input, weight, padding, stride, dilation).startswith("winograd")


def test_serves_the_sizes_of_resnet():
    """...in float32, and leaves what it would do no faster: few channels, one pixel, other filters."""
    for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        for n in (1, 8):
            tensors = operands((n, channels, size, size, channels, 1))
            assert algorithm_of(*tensors, 1) == "winograd4"
            with fastres.winograd(2):
                assert algorithm_of(*tensors, 1) == "winograd2"
            with fastres.winograd("off"):
                assert not serves(*tensors, 1)
    assert not serves(*operands((8, 16, 32, 32, 16, 1)), 1)
    assert not serves(*operands((8, 3, 32, 32, 64, 1)), 1)
    assert not serves(*operands((8, 64, 1, 1, 64, 1)), 1)
    grad, input, weight = operands((8, 64, 8, 8, 64, 1))
    assert not serves(grad[..., ::2, ::2], input, weight, 1, stride=2)
    assert not serves(grad[..., 2:, 2:], input, weight, 1, dilation=2)
    assert not serves(grad.half(), input.half(), weight.half(), 1)
    assert not serves(grad.double(), input.double(), weight.double(), 1)


def test_serves_bfloat16():
    """...where AMD's products of it are the alternative, of pixels enough and by the larger tiles."""
    x, w = torch.empty(1, 32, 8, 8, dtype=torch.bfloat16), torch.empty(8, 32, 1, 1)
    if ops.extension.conv_algorithm(x, w, 1, 0, 1, False) != "direct_bf16":
        pytest.skip("needs AMD's products of bfloat16")
    for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        tensors = operands((8, channels, size, size, channels, 1), torch.bfloat16)
        assert algorithm_of(*tensors, 1) == "winograd4"
        with fastres.winograd(2):
            assert algorithm_of(*tensors, 1) in ("product", "aten")
    assert algorithm_of(*operands((1, 512, 7, 7, 512, 1), torch.bfloat16), 1) == "product"


def another_than_winograds(tensors):
    with fastres.winograd("off"):
        name = algorithm_of(*tensors, 1)
    assert name in ("direct", "aten")
    if name == "aten":
        return eager(*tensors, 1)
    return ops.extension.conv_wgrad_by(name, *tensors, 1, 1)


@pytest.mark.parametrize("tile", ["auto", 4, 2, "off"])
def test_the_switch(tile):
    tensors = operands((2, 64, 20, 20, 64, 1))
    expected = {
        "off": lambda: another_than_winograds(tensors),
        2: lambda: ops.extension.conv_wgrad_by("winograd2", *tensors, 1, 1),
    }.get(tile, lambda: ops.extension.conv_wgrad_by("winograd4", *tensors, 1, 1))()
    with fastres.winograd(tile):
        assert torch.equal(wgrad(*tensors, 1), expected)


@pytest.mark.parametrize("poisoned", ["grad", "input"])
@pytest.mark.parametrize("bad", POISON)
def test_what_is_not_finite_stays_where_eager_has_it(bad, poisoned):
    """A corner's pixel meets four taps; Winograd's transforms would spread it over all nine."""
    grad, input, weight = operands((2, 32, 12, 12, 32, 1))
    (grad if poisoned == "grad" else input)[1, 5, 0, 0] = bad
    with pytest.raises(RuntimeError, match="input: a sum was not finite"):
        ops.extension.conv_wgrad_by("winograd4", grad, input, weight, 1, 1)
    ours, expected = wgrad(grad, input, weight, 1), eager(grad, input, weight, 1)
    assert 0 < expected.isfinite().sum() < expected.numel()
    assert torch.equal(ours.isnan(), expected.isnan())
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_sums_that_overflow_in_the_transforms_only():
    grad, input, weight = operands((1, 32, 8, 8, 32, 1))
    grad *= 2.0**61
    input *= 2.0**60
    assert algorithm_of(grad, input, weight, 1) == "winograd4"
    with pytest.raises(RuntimeError, match="input: a sum was not finite"):
        ops.extension.conv_wgrad_by("winograd4", grad, input, weight, 1, 1)
    expected = eager(grad, input, weight, 1)
    assert expected.isfinite().all()
    torch.testing.assert_close(wgrad(grad, input, weight, 1), expected, rtol=1e-4, atol=1e33)


@pytest.mark.parametrize("shape", [(8, 64, 30, 30, 64, 1), (2, 128, 9, 9, 96, 1)], ids=str)
def test_the_same_bits_whatever_the_threads(shape, threads):
    tensors = operands(shape)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(wgrad(*tensors, 1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_eight_callers_at_once():
    problems = [operands((n, 64, 20, 20, 48, 1)) for n in (1, 2, 4, 8)]
    expected = [wgrad(*tensors, 1) for tensors in problems]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: wgrad(*problems[i % 4], 1), range(32)))
    assert all(torch.equal(result, expected[i % 4]) for i, result in enumerate(results))


def test_a_bias_has_its_gradient_too():
    grad, input, weight = operands((2, 32, 10, 10, 32, 1))
    ours, ours_bias = wgrad(grad, input, weight, 1, bias=True)
    assert_agrees(ours, grad, input, weight, 1)
    truth = grad.double().sum((0, 2, 3))
    assert_close(ours_bias, grad.sum((0, 2, 3)), truth, scale=4)


@pytest.mark.parametrize("channels, size", [(64, 16), (512, 7)])
def test_training_through_the_fused_site(channels, size):
    """conv_bn_relu's gradients in training, where eager's, both against fp64; no ReLU, whose mask
    would flip."""
    input = spread((4, channels, size, size), layout="channels_last")
    weight = spread((channels, channels, 3, 3), layout="channels_last", std=(9 * channels) ** -0.5)
    gamma, beta = torch.rand(channels).double() + 0.5, torch.randn(channels).double()
    grad = spread(input.shape)

    def gradient(function, dtype):
        x, w, g, b = (t.to(dtype).requires_grad_() for t in (input, weight, gamma, beta))
        return torch.autograd.grad(function(x, w, g, b), w, grad.to(dtype))[0]

    def reference(x, w, g, b):
        return F.batch_norm(F.conv2d(x, w, padding=1), None, None, g, b, training=True)

    def ours(x, w, g, b):
        mean, var = torch.zeros(channels), torch.ones(channels)
        return fastres.functional.conv_bn(
            x, w, running_mean=mean, running_var=var, bn_weight=g, bn_bias=b, padding=1,
            training=True,
        )  # fmt: skip

    with fastres.winograd("auto"):
        found = gradient(ours, torch.float32)
    truth = gradient(reference, torch.float64)
    assert_close(found, gradient(reference, torch.float32), truth, scale=4)


def test_refusals():
    grad, input, weight = operands((2, 32, 8, 8, 32, 1))
    by = ops.extension.conv_wgrad_by
    with pytest.raises(
        ValueError, match="algorithm: expected direct, winograd2 or winograd4, got fft"
    ):
        by("fft", grad, input, weight, 1, 1)
    with pytest.raises(ValueError, match="algorithm: winograd4 does not compute"):
        by("winograd4", grad[..., ::2, ::2], input, weight, 2, 1)
    with pytest.raises(ValueError, match="input: expected float32 or bfloat16 as grad_output"):
        by("winograd4", grad, input.double(), weight, 1, 1)
    with pytest.raises(ValueError, match="grad_output: expected the shape"):
        by("winograd4", grad[..., 1:], input, weight, 1, 1)
    for wrong in ((grad[..., 1:], input, weight), (grad, input[:, 1:], weight)):
        with pytest.raises(RuntimeError):  # PyTorch's
            wgrad(*wrong, 1)
