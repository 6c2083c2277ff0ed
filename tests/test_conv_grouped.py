"""The CPU's own grouped convolutions: agreement with eager, their choice, their gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, spread

from fastres import ops, reference

pytestmark = pytest.mark.skipif(
    ops.extension is None or ops.extension.build_info()["cpu_capability"] == "DEFAULT",
    reason="needs the compiled extension and a processor with AVX2",
)

# N, groups, C and K of a group, H, W, filter, stride, padding, dilation
SHAPES = [
    (2, 32, 1, 1, 13, 11, 3, 1, 1, 1),
    (1, 19, 2, 2, 9, 7, 3, 1, 1, 1),  # groups do not fill the last vector
    (2, 9, 3, 3, 8, 9, 3, 1, 1, 1),  # nor any vector
    (2, 32, 4, 4, 17, 15, 3, 1, 1, 1),  # two tiles a row, and two blocks of rows
    (1, 32, 4, 4, 16, 13, 3, 2, 1, 1),
    (1, 8, 8, 8, 15, 29, 3, 1, 1, 1),
    (1, 8, 8, 8, 14, 14, 3, 2, 1, 1),
    (3, 4, 16, 16, 14, 5, 3, 1, 1, 1),
    (1, 3, 16, 16, 9, 10, 3, 2, 2, 2),
    (1, 2, 32, 32, 7, 7, 3, 1, 1, 1),
    (2, 2, 32, 32, 14, 14, 3, 2, 1, 1),
    (1, 12, 4, 2, 11, 9, 3, 1, 2, 2),  # dilated, fewer outputs than inputs
    (2, 7, 2, 6, 5, 6, 5, 3, 2, 1),
    (1, 2, 20, 10, 7, 7, 1, 1, 0, 1),
    (1, 2, 24, 80, 6, 5, 3, 1, 1, 1),  # a group has several panels
    (1, 6, 2, 2, 3, 3, 7, 1, 5, 1),  # padding is wider than the input
    (1, 4, 4, 4, 1, 1, 1, 2, 0, 1),
]


def operands(shape, dtype=torch.float32, layout="channels_last"):
    n, groups, c, k, h, w, r, *_ = shape
    input = spread((n, groups * c, h, w), dtype, layout)
    weight = spread((groups * k, c, r, r), dtype, layout, std=(c * r * r) ** -0.5)
    return input, weight, spread((1, groups * k, 1, 1), dtype).flatten()


def agrees(algorithm, shape, dtype):
    input, weight, bias = operands(shape, dtype)
    geometry = shape[7:]
    ours = ops.extension.conv_by(algorithm, input, weight, bias, *geometry)
    eager = F.conv2d(input, weight, bias, *geometry, shape[1])
    truth = F.conv2d(input.double(), weight.double(), bias.double(), *geometry, shape[1])
    assert_close(ours, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_eager(shape, dtype):
    agrees("grouped", shape, dtype)


def chosen(n, width, channels, size, stride=1, dtype=torch.float32, training=False):
    x = torch.empty(n, channels, size, size, device="meta", dtype=dtype)
    weight = torch.empty(channels, width, 3, 3, device="meta", dtype=dtype)
    return ops.extension.conv_algorithm(x, weight, stride, 1, 1, training)


@pytest.mark.skipif(
    "chosen(1, 4, 128, 56, dtype=torch.bfloat16) != 'grouped_bf16'",
    reason="products of bfloat16 gain nothing here",
)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] % 2 == 0], ids=str)
def test_products_of_bfloat16_agree_with_eager(shape):
    agrees("grouped_bf16", shape, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [3, 4, 16, 32])
def test_sites_agree_with_eager(width, residual, dtype):
    """With batch normalisation, residual and ReLU in the same pass."""
    shape = (2, 6, width, width, 16, 15, 3, 1, 1, 1)
    input, weight, shift = operands(shape, dtype)
    k = weight.shape[0]
    mean, var, scale = (torch.rand(k, dtype=torch.float64).add(0.5).to(dtype) for _ in range(3))
    added = spread((2, k, 16, 15), dtype, "channels_last") if residual else None

    def eager(input, weight, added, mean, var, scale, shift):
        y = F.conv2d(input, weight, None, 1, 1, 1, 6)
        y = F.batch_norm(y, mean, var, scale, shift, eps=1e-5)
        return (y if added is None else y + added).relu()

    tensors = (input, weight, added, mean, var, scale, shift)
    ours = ops.conv_bn_relu(
        input, weight, None, added, mean, var, scale, shift,
        [1, 1], [1, 1], [1, 1], 6, 1e-5, True,
    )  # fmt: skip
    truth = eager(*(t if t is None else t.double() for t in tensors))
    assert_close(ours, eager(*tensors), truth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_agrees_with_eager(shape, dtype, layout):
    input, weight, bias = operands(shape, dtype, layout)
    geometry = (*([value] * 2 for value in shape[7:]), shape[1])
    eager = F.conv2d(input, weight, bias, *geometry)
    grad = spread(eager.shape, dtype, layout)

    def pytorch(grad, input, weight, bias):
        gradients = reference.conv_gradients(grad, input, weight, *geometry, [True, False, False])
        return F.conv2d(input, weight, bias, *geometry), gradients[0]

    ours = (
        ops.conv(input, weight, bias, *geometry),
        ops.conv_dgrad(grad, input, weight, *geometry),
    )
    theirs = pytorch(grad, input, weight, bias)
    truth = pytorch(*(t.double() for t in (grad, input, weight, bias)))
    for name, a, b, t in zip(("output", "grad of input"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert_close(a, b, t, name)


def test_who_computes_what():
    """ResNeXt's groups are ours, single channels oneDNN's. Where filters are packed for one call,
    only groups that do not fill a vector are ours."""
    resnext = ((4, 128, 56), (8, 256, 28), (16, 512, 14), (32, 1024, 7))
    for n, (width, channels, size) in itertools.product((1, 8), resnext):
        assert chosen(n, width, channels, size) == "grouped"
        assert chosen(n, width, channels, 2 * size, stride=2) == "grouped"
    assert chosen(1, 1, 64, 56) == chosen(1, 128, 256, 28) == "onednn"
    assert chosen(8, 4, 128, 56, training=True) == "grouped"
    assert chosen(8, 32, 1024, 7, training=True) == "onednn"
    fewer = torch.empty(8, 4, 3, 3, device="meta")  # one output a group: most lanes would be idle
    images = torch.empty(1, 32, 9, 9, device="meta")
    assert ops.extension.conv_algorithm(images, fewer, 1, 1, 1, False) == "onednn"


def test_what_is_not_finite_stays_in_its_group():
    """A lane that multiplied another group's values by zero would spread NaN."""
    for width in (1, 3, 4, 8, 16, 32):
        input, weight, _ = operands((1, 6, width, width, 9, 9, 3, 1, 1, 1))
        input[0, width, 4, 4] = float("inf")
        eager = F.conv2d(input, weight, None, 1, 1, 1, 6)
        ours = ops.extension.conv_by("grouped", input, weight, None, 1, 1, 1)
        assert torch.equal(ours.isfinite(), eager.isfinite())


def test_refusals():
    input, weight, _ = operands((1, 2, 4, 4, 5, 5, 3, 1, 1, 1))
    for algorithm in ("direct", "winograd4"):
        with pytest.raises(ValueError, match=f"algorithm: {algorithm} does not compute"):
            ops.extension.conv_by(algorithm, input, weight, None, 1, 1, 1)
    whole = spread((8, 8, 3, 3), layout="channels_last").float()
    with pytest.raises(ValueError, match="algorithm: grouped does not compute"):
        ops.extension.conv_by("grouped", input, whole, None, 1, 1, 1)
