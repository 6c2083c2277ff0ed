"""The CPU backend's own convolutions: every algorithm, its choice, its gradients, its limits."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from agreement import UNITS, assert_close, spread

import fastres
from fastres import ops, reference

pytestmark = pytest.mark.skipif(
    ops.extension is None or ops.extension.build_info()["cpu_capability"] == "DEFAULT",
    reason="needs the compiled extension and a processor with AVX2",
)

# N, C, H, W, K, filter, stride, padding, dilation
WINOGRAD_SHAPES = [
    (2, 16, 14, 14, 64, 3, 1, 1, 1),
    (1, 17, 9, 7, 33, 3, 1, 1, 1),  # tiles reach over every edge; channels fill no vector
    (3, 1, 5, 11, 1, 3, 1, 0, 1),
    (1, 40, 3, 3, 5, 3, 1, 1, 1),  # less than one tile
    (1, 8, 6, 6, 70, 3, 1, 2, 1),
    (1, 512, 7, 7, 32, 3, 1, 1, 1),
    (1, 33, 11, 14, 20, 3, 1, 1, 1),  # four tiles of every kind, in groups of four and one
]
POLYPHASE_SHAPES = [
    (2, 32, 12, 12, 40, 3, 2, 1, 1),
    (1, 17, 19, 11, 33, 3, 2, 1, 1),  # odd sizes, channels fill no vector
    (1, 512, 14, 14, 32, 3, 2, 1, 1),
    (1, 33, 21, 28, 20, 3, 2, 1, 1),  # tiles of every kind
    (1, 4, 21, 23, 70, 3, 2, 0, 1),  # four phases of four channels fill one chunk
    (3, 1, 8, 3, 1, 3, 2, 2, 1),
    (2, 3, 13, 11, 5, 7, 2, 3, 1),
    (1, 3, 32, 30, 64, 7, 2, 3, 1),
    (1, 20, 16, 9, 16, 7, 2, 2, 1),
]
SHAPES = [
    *WINOGRAD_SHAPES,
    *POLYPHASE_SHAPES,
    (1, 64, 7, 7, 48, 1, 1, 0, 1),
    (3, 40, 15, 9, 35, 1, 2, 0, 1),
    (1, 1, 1, 1, 2, 1, 1, 0, 1),
    (2, 19, 11, 9, 7, 3, 1, 2, 2),  # dilated
    (1, 5, 9, 9, 4, 5, 3, 2, 1),
]
CASES = [
    *((shape, "direct") for shape in SHAPES),
    *itertools.product(WINOGRAD_SHAPES, ("winograd2", "winograd4", "winograd4_plain")),
    *((shape, "polyphase") for shape in POLYPHASE_SHAPES),
    *((s, "polyphase_plain") for s in POLYPHASE_SHAPES if s[5] == 3 and s[1] > 4),
]


def operands(shape, dtype=torch.float32, layout="channels_last"):
    n, c, h, w, k, r, *_ = shape
    input = spread((n, c, h, w), dtype, layout)
    weight = spread((k, c, r, r), dtype, layout, std=(c * r * r) ** -0.5)
    return input, weight, spread((1, k, 1, 1), dtype).flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, algorithm", CASES, ids=str)
def test_algorithms_agree_with_eager(shape, algorithm, dtype):
    input, weight, bias = operands(shape, dtype)
    geometry = shape[6:]
    ours = ops.extension.conv_by(algorithm, input, weight, bias, *geometry)
    eager = F.conv2d(input, weight, bias, *geometry)
    truth = F.conv2d(input.double(), weight.double(), bias.double(), *geometry)
    assert_close(ours, eager, truth)


def gains_by_bfloat16() -> bool:
    x, w = torch.empty(1, 32, 8, 8, dtype=torch.bfloat16), torch.empty(8, 32, 1, 1)
    return ops.extension.conv_algorithm(x, w, 1, 0, 1, False) == "direct_bf16"


EVEN_SHAPES = [
    (2, 64, 13, 11, 70, 1, 1, 0, 1),  # whole chunks of 32 channels
    (1, 96, 9, 9, 33, 3, 2, 1, 1),
    (3, 40, 15, 9, 35, 1, 2, 0, 1),  # a chunk that is not full
    (2, 6, 13, 11, 5, 7, 2, 3, 1),
    (1, 2, 5, 5, 4, 3, 1, 2, 2),
    (1, 1024, 7, 7, 40, 1, 1, 0, 1),  # a sum of sums
]


@pytest.mark.skipif("not gains_by_bfloat16()", reason="products of bfloat16 gain nothing here")
@pytest.mark.parametrize("shape", EVEN_SHAPES, ids=str)
def test_products_of_bfloat16_agree_with_eager(shape):
    input, weight, bias = operands(shape, torch.bfloat16)
    geometry = shape[6:]
    ours = ops.extension.conv_by("direct_bf16", input, weight, bias, *geometry)
    eager = F.conv2d(input, weight, bias, *geometry)
    truth = F.conv2d(input.double(), weight.double(), bias.double(), *geometry)
    assert_close(ours, eager, truth)


@pytest.mark.skipif("not gains_by_bfloat16()", reason="products of bfloat16 gain nothing here")
def test_packing_winograds_filters_must_pay_in_training():
    """On 14x14 maps it took longer than oneDNN's whole convolution in bfloat16."""

    def chosen(c, size):
        x = torch.empty(8, c, size, size, device="meta", dtype=torch.bfloat16)
        weight = torch.empty(c, c, 3, 3, device="meta", dtype=torch.bfloat16)
        return ops.extension.conv_algorithm(x, weight, 1, 1, 1, True)

    assert chosen(64, 56) == chosen(128, 28) == "winograd4"
    assert chosen(256, 14) == "direct_bf16"


def test_products_of_bfloat16_are_refused_where_there_are_none():
    input, weight, _ = operands((1, 3, 9, 9, 4, 3, 2, 1, 1), torch.bfloat16)
    with pytest.raises(ValueError, match="algorithm: direct_bf16 does not compute"):
        ops.extension.conv_by("direct_bf16", input, weight, None, 2, 1, 1)


@pytest.mark.parametrize(
    "shape, algorithms",
    [
        ((2, 512, 14, 14, 64, 3, 1, 1, 1), ("direct", "winograd2", "winograd4", "winograd4_plain")),
        ((2, 512, 14, 14, 64, 3, 2, 1, 1), ("direct", "polyphase", "polyphase_plain")),
        ((1, 3, 96, 96, 64, 7, 2, 3, 1), ("direct", "polyphase")),
    ],
)
def test_winograd_is_as_accurate_as_documented(shape, algorithms):
    """On the deepest of ResNet's sums: twice what a direct sum loses, 4e-6 of the largest."""
    input, weight, bias = operands(shape)
    geometry = shape[6:]
    truth = F.conv2d(input.double(), weight.double(), bias.double(), *geometry)
    for algorithm in algorithms:
        ours = ops.extension.conv_by(algorithm, input, weight, bias, *geometry)
        assert (ours - truth).abs().max() <= 4e-6 * truth.abs().max()


# Plain filters are for processors with so many registers.
WIDE = ops.extension and ops.extension.build_info()["cpu_capability"] == "AVX512"


def chosen(n, c, size, k, r, stride=1, training=False):
    x, w = torch.empty(n, c, size, size, device="meta"), torch.empty(k, c, r, r, device="meta")
    return ops.extension.conv_algorithm(x, w, stride, r // 2, 1, training)


def test_who_computes_what():
    """Of ResNet's convolutions: Winograd has 3x3 at stride 1, its polyphase form 7x7 and the larger
    maps of 3x3 at stride 2, the direct kernel 1x1, and oneDNN the others. Deep filters on few pixels
    are read once for little work: there they stay as they are."""
    plain = WIDE * "_plain"
    assert [chosen(8, 64, 56, 64, 3), chosen(8, 128, 28, 128, 3)] == ["winograd4"] * 2
    assert chosen(1, 64, 56, 64, 3) == chosen(1, 128, 28, 128, 3) == "winograd4"
    assert chosen(1, 512, 7, 512, 3) == ("winograd4_plain" if WIDE else "winograd2")
    assert chosen(1, 256, 14, 256, 3) == "winograd4" + plain
    assert chosen(8, 256, 14, 256, 3) == "winograd4"
    assert chosen(8, 64, 56, 256, 1) == chosen(1, 2048, 7, 512, 1) == "direct"
    assert chosen(1, 256, 56, 512, 1, 2) == "direct"
    assert chosen(8, 512, 7, 512, 3, training=True) != "winograd4"  # packing costs too much


def test_who_computes_what_at_stride_2():
    assert chosen(1, 3, 224, 64, 7, 2) == chosen(8, 3, 224, 64, 7, 2) == "polyphase"
    for planes in (64, 128):  # the inputs of ResNet-18's and of ResNet-50's second stage
        assert chosen(1, planes, 56, 128, 3, 2) == chosen(8, planes, 56, 128, 3, 2) == "polyphase"
    assert chosen(8, 128, 28, 256, 3, 2) == chosen(8, 256, 28, 256, 3, 2) == "polyphase"
    assert chosen(8, 256, 14, 512, 3, 2) == ("polyphase_plain" if WIDE else "polyphase")
    for size, planes, narrow in ((28, 256, "polyphase"), (14, 512, "onednn")):
        few = "polyphase_plain" if WIDE else narrow
        assert chosen(1, planes // 2, size, planes, 3, 2) == few
        assert chosen(1, planes, size, planes, 3, 2) == few
    assert chosen(1, 64, 56, 64, 5, 2) == chosen(8, 3, 224, 32, 3, 2) == "onednn"
    assert chosen(1, 128, 28, 256, 3, 2, training=True) == "onednn"  # packing costs too much


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_it_is(bad):
    """A transform would spread it over a whole tile."""
    for stride, algorithm in (
        (1, "winograd4"), (1, "winograd4_plain"), (2, "polyphase"), (2, "polyphase_plain"),
    ):  # fmt: skip
        input, weight, _ = operands((1, 64, 40, 40, 64, 3, stride, 1, 1))
        input[0, 3, 11, 12] = bad
        with pytest.raises(RuntimeError, match="not finite"):
            ops.extension.conv_by(algorithm, input, weight, None, stride, 1, 1)
        eager = F.conv2d(input, weight, None, stride, 1)
        ours, activated = site(input, weight, stride), eager.relu()
        assert torch.equal(ours.isnan(), activated.isnan())
        assert torch.equal(ours.isinf(), activated.isinf())
        torch.testing.assert_close(ours, activated, equal_nan=True, rtol=1e-4, atol=1e-4)
        trained = ops.conv(input, weight, None, [stride] * 2, [1, 1], [1, 1], 1)
        assert torch.equal(trained.isfinite(), eager.isfinite())


def test_values_that_only_a_transform_overflows():
    input, weight, _ = operands((1, 16, 24, 24, 32, 3, 1, 1, 1))
    input *= 2e37 / input.abs().max()
    eager = F.conv2d(input, weight, padding=1).relu()
    assert eager.isfinite().all()
    torch.testing.assert_close(site(input, weight) / 1e37, eager / 1e37, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride, algorithm", [(1, "winograd4_plain"), (2, "polyphase_plain")])
def test_filters_that_are_not_finite(stride, algorithm):
    """Whichever tap it is, what it meets is not finite; other channels are as they were."""
    for row, column in itertools.product(range(3), repeat=2):
        input, weight, _ = operands((1, 64, 13, 13, 64, 3, stride, 1, 1))
        weight[5, 7, row, column] = float("inf")
        with pytest.raises(RuntimeError, match="not finite"):
            ops.extension.conv_by(algorithm, input, weight, None, stride, 1, 1)
        eager = F.conv2d(input, weight, None, stride, 1).relu()
        ours = site(input, weight, stride)
        assert torch.equal(ours.isnan(), eager.isnan())
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not WIDE, reason="plain filters are for AVX-512")
@pytest.mark.parametrize("stride, algorithm", [(1, "winograd4_plain"), (2, "polyphase_plain")])
def test_plain_filters_follow_their_parameter(stride, algorithm):
    """The few tiles of one image meet plain filters, those of many images transformed ones; both
    are kept and neither outlives a change of the weight."""
    shape = (1, 256, 7 * stride, 7 * stride, 256, 3, stride, 1, 1)
    few, weight, _ = operands(shape)
    assert ops.extension.conv_algorithm(few, weight, stride, 1, 1, False) == algorithm
    many = few.expand(32, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert not ops.extension.conv_algorithm(many, weight, stride, 1, 1, False).endswith("plain")
    for change in (lambda: None, weight.zero_, lambda: weight.add_(0.01)):
        change()
        for input in (few, many):
            expected = F.conv2d(input, weight, None, stride, 1).relu()
            ours = [site(input, weight, stride) for _ in "ab"]
            assert torch.equal(*ours)
            torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-4)


def site(input, weight, stride=1):
    """``relu(conv2d(input, weight))`` as a fused site of eval."""
    k, padding = weight.shape[0], [weight.shape[2] // 2] * 2
    statistics = (torch.zeros(k), torch.ones(k), None, None)
    return ops.conv_bn_relu(
        input, weight, None, None, *statistics, [stride] * 2, padding, [1, 1], 1, 0.0, True
    )


@pytest.mark.parametrize("biased", [True, False], ids=["biased", ""])  # products have no bias
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 24, 5, 5, 9, 1, 1, 0, 1)], ids=str)
def test_gradients_agree_with_eager(shape, dtype, layout, biased):
    input, weight, bias = operands(shape, dtype, layout)
    bias = bias if biased else None
    stride, padding, dilation = ([value] * 2 for value in shape[6:])
    geometry = (stride, padding, dilation, 1)
    keywords = {"stride": stride, "padding": padding, "dilation": dilation}
    eager = F.conv2d(input, weight, bias, *geometry)
    grad = spread(eager.shape, dtype, layout)

    def everything(forward, backward):
        return [forward, *backward]

    def pytorch(*tensors):
        grad, input, weight, *bias = tensors
        gradients = reference.conv_gradients(grad, input, weight, *geometry, [True, True, biased])
        return everything(F.conv2d(input, weight, *bias, **keywords), gradients[: 2 + biased])

    ours = everything(
        ops.conv(input, weight, bias, *geometry),
        [
            ops.conv_dgrad(grad, input, weight, *geometry),
            *ops.conv_wgrad(grad, input, weight, *geometry, [True, biased])[: 1 + biased],
        ],
    )
    tensors = [t for t in (grad, input, weight, bias) if t is not None]
    theirs = pytorch(*tensors)
    truth = pytorch(*(t.double() for t in tensors))
    names = ("output", "grad of input", "grad of weight", "grad of bias")[: len(ours)]
    for name, a, b, t in zip(names, ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # a gradient of the weight is one long sum, in another order than eager's
        assert_close(a, b, t, name, scale=4 if "grad" in name else 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        expected = eager.is_contiguous(memory_format=memory_format)
        assert ours[0].is_contiguous(memory_format=memory_format) or not expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4)])
@pytest.mark.parametrize("size", [2, 20], ids=["more weights", "more activations"])
def test_activations_and_weights_in_formats_of_their_own(size, stride, groups, dtype):
    """What a network in channels_last computes with weights that are not: everything comes back in
    the format of its own operand."""
    input = spread((2, 16, size, size), dtype, "channels_last")
    weight = spread((32, 16 // groups, 3, 3), dtype)
    geometry = ([stride] * 2, [1, 1], [1, 1], groups)
    output = ops.conv(input, weight, None, *geometry)
    grad = torch.randn_like(output)

    def everything(forward, grad, input, weight):
        gradients = reference.conv_gradients(grad, input, weight, *geometry, [True, True, False])
        return forward(input, weight, None, *geometry), *gradients[:2]

    ours = (
        output, ops.conv_dgrad(grad, input, weight, *geometry),
        ops.conv_wgrad(grad, input, weight, *geometry, [True, False])[0],
    )  # fmt: skip
    theirs = everything(F.conv2d, grad, input, weight)
    truth = everything(F.conv2d, grad.double(), input.double(), weight.double())
    for index, like in enumerate((input, input, weight)):
        assert_close(ours[index], theirs[index], truth[index], str(index), scale=4 if index else 1)
        last = like.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if last else torch.contiguous_format
        assert ours[index].is_contiguous(memory_format=memory_format), index


@pytest.mark.parametrize(
    "stride, algorithm",
    [(1, "winograd4"), (1, "winograd4_plain"), (2, "polyphase"), (2, "polyphase_plain")],
)
def test_the_same_bits_again(stride, algorithm):
    input, weight, bias = operands((2, 64, 28, 28, 64, 3, stride, 1, 1))
    results = [ops.extension.conv_by(algorithm, input, weight, bias, stride, 1, 1) for _ in "ab"]
    assert torch.equal(*results)


def test_eight_callers_at_once():
    input, weight, _ = operands((1, 48, 20, 20, 64, 3, 1, 1, 1))
    expected = site(input, weight)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: site(input, weight), range(64)))
    assert all(torch.equal(result, expected) for result in results)


def test_refusals():
    input, weight, _ = operands((1, 4, 9, 9, 4, 3, 2, 1, 1))
    with pytest.raises(ValueError, match="algorithm: expected direct"):
        ops.extension.conv_by("fft", input, weight, None, 1, 1, 1)
    with pytest.raises(ValueError, match="algorithm: winograd4 does not compute"):
        ops.extension.conv_by("winograd4", input, weight, None, 2, 1, 1)
    with pytest.raises(ValueError, match="algorithm: polyphase does not compute"):
        ops.extension.conv_by("polyphase", input, weight, None, 1, 1, 1)
    with pytest.raises(ValueError, match="algorithm: polyphase_plain does not compute"):
        ops.extension.conv_by("polyphase_plain", input, weight, None, 2, 1, 1)  # four channels


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("k, c, filter", [(24, 16, 1), (24, 1, 3), (1, 16, 3), (64, 64, 3)])
def test_gradient_in_the_strides_of_the_weight(k, c, filter, memory_format):
    """Also where a dimension has one element: DistributedDataParallel compares them."""
    weight = torch.randn(k, c, filter, filter).to(memory_format=memory_format)
    input = torch.randn(2, c, 14, 14).to(memory_format=torch.channels_last)
    grad = torch.randn(2, k, 14, 14).to(memory_format=torch.channels_last)
    geometry = [1, 1], [filter // 2] * 2, [1, 1], 1
    for mask in ([True, False], [True, True]):
        assert ops.conv_wgrad(grad, input, weight, *geometry, mask)[0].stride() == weight.stride()


def test_conv_operators_pass_opcheck():
    input, weight, bias = operands((2, 16, 8, 8, 16, 3, 1, 1, 1))
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    grad = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    torch.library.opcheck(ops.conv, (input, weight, bias, *geometry))
    torch.library.opcheck(ops.conv_dgrad, (grad, input, weight, *geometry))
    torch.library.opcheck(ops.conv_wgrad, (grad, input, weight, *geometry, [True, True]))


def test_double_backward():
    input = torch.randn(1, 2, 5, 5, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float32, requires_grad=True)
    mean, var = torch.zeros(2), torch.ones(2)

    def second(conv_bn):
        out = conv_bn(input, weight, None, 1, 1, 1, 1, mean, var)
        (first,) = torch.autograd.grad(out.square().sum(), input, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (input, weight))

    ours, eager = second(fastres.functional.conv_bn), second(fastres.reference.conv_bn)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=UNITS[torch.float32] * 1e-5)
