"""Convolutions on tensor descriptors under Triton's interpreter, by the error rule, and the boxes
that their tiles are."""

import importlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from agreement import assert_close, assert_same_bits, spread
from interpreting import interpreted, launchers
from test_triton_conv import Case, merged, per_channel

triton = pytest.importorskip("triton")

# N, C, H, W, K, (R, S), stride, padding, dilation, groups: beside tiles of 64 pixels, 32 filters and
# 64 channels there are tails in every direction
SHAPES = {
    "1x1": (3, 72, 7, 11, 104, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 padded": (2, 16, 4, 5, 24, (1, 1), (1, 1), (1, 1), (1, 1), 1),
    "1x1 stride 2": (3, 40, 8, 6, 40, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x3": (3, 72, 9, 7, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "35 filters": (37, 16, 3, 5, 35, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 of 64 channels": (5, 64, 7, 7, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 unpadded": (2, 24, 6, 5, 24, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "3x3 dilated": (2, 16, 11, 9, 16, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "3x3 stride 2": (3, 40, 10, 14, 24, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "3x3 stride 2 padded by 2": (2, 16, 6, 8, 16, (3, 3), (2, 2), (2, 2), (1, 1), 1),
    "3x3 dilated stride 2": (1, 16, 12, 10, 16, (3, 3), (2, 2), (2, 2), (2, 2), 1),
    "1x3": (2, 24, 9, 14, 40, (1, 3), (1, 1), (0, 1), (1, 1), 1),
    "2x3 uneven": (1, 24, 10, 15, 16, (2, 3), (2, 3), (0, 2), (3, 1), 1),
    "5x5": (2, 16, 7, 9, 16, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    "7x7 stride 2": (2, 16, 12, 14, 24, (7, 7), (2, 2), (3, 3), (1, 1), 1),
}
# what the gradient is not computed of: pixels without a tap, and 35 is no multiple of 8
NOT_BACK = ("1x1 stride 2", "3x3 dilated stride 2", "35 filters")


@pytest.fixture(scope="module")
def kernels():
    names = ("configs", "conv_boxes")
    with interpreted():
        modules = {name: importlib.import_module(f"fastres.kernels.{name}") for name in names}
        tile = modules["configs"].Tile(64, 32, 64, 2, 4, 3, descriptors=True)
        yield SimpleNamespace(launch=launchers(), tile=tile, **modules)


@pytest.mark.parametrize("name", SHAPES)
def test_eval(kernels, name):
    """With bias, batch norm, residual and ReLU."""
    case = Case(SHAPES[name], torch.float16)
    mean, scale, shift = case.k_vectors
    variance, bias = shift.abs() + 0.5, scale.flip(0)

    def eager(x, w, residual):
        y = case.conv(x, w)
        wide = y if y.dtype == torch.float64 else y.float()
        m, v, a, b, c = (per_channel(t, wide) for t in (mean, variance, scale, shift, bias))
        return ((wide + c - m) * (v + 1e-3).rsqrt() * a + b + residual).relu().to(x.dtype)

    operands = case.x, case.w, case.residual
    ours, _ = kernels.launch.fprop(
        case.x, case.w, *case.arguments,
        bias=bias, norm=kernels.launch.Norm(mean, variance, scale, shift, 1e-3),
        residual=case.residual, relu=True, tile=kernels.tile,
    )  # fmt: skip
    assert_close(ours, eager(*operands), eager(*(t.double() for t in operands)))


@pytest.mark.parametrize("name", SHAPES)
def test_statistics(kernels, name):
    """Of pixels that there are, also where a box hangs over the edge of its map; the same bits
    again."""
    case = Case(SHAPES[name], torch.float16)

    def run():
        return kernels.launch.fprop(
            case.x, case.w, *case.arguments, statistics=True, tile=kernels.tile
        )

    ours, moments = run()
    again, found = run()
    assert_same_bits({"y": ours} | moments._asdict(), {"y": again} | found._asdict())
    eager, truth = case.conv(case.x, case.w), case.conv(case.x.double(), case.w.double())
    assert_close(ours, eager, truth)
    mean, variance = merged(moments, truth)
    exact_variance, exact_mean = torch.var_mean(truth, (0, 2, 3), correction=0)
    rounded_variance, rounded_mean = torch.var_mean(eager.double(), (0, 2, 3), correction=0)
    assert_close(mean, rounded_mean, exact_mean, "mean", torch.float32)
    assert_close(variance, rounded_variance, exact_variance, "variance", torch.float32)


@pytest.mark.parametrize("name", [n for n in SHAPES if n not in NOT_BACK])
def test_dgrad(kernels, name):
    """With a residual, masked by the ReLU behind, and the sums of the batch norm behind; alone; the
    same bits again."""
    case, launch = Case(SHAPES[name], torch.float16), kernels.launch
    other = spread(case.x.shape, case.x.dtype, "channels_last")
    behind = launch.Behind(case.x, launch.Affine(*case.vectors), case.activated(case.x))

    def run(**keywords):
        return launch.dgrad(
            case.dy, case.w, case.x.shape, *case.arguments, tile=kernels.tile, **keywords
        )

    def expected(x, w, dy, other):
        plain = case.gradients(x, w, dy)[0]
        g = torch.where(behind.output <= 0, 0, plain + other)
        centred = x.double() - case.vectors[0].double().view(1, -1, 1, 1)
        return plain, g, g.double().sum((0, 2, 3)), (g.double() * centred).sum((0, 2, 3))

    operands = case.x, case.w, case.dy, other
    eager, truth = expected(*operands), expected(*(t.double() for t in operands))
    ours, again = (run(residual=other, behind=behind) for _ in range(2))
    assert_same_bits(*({str(i): t for i, t in enumerate(found)} for found in (ours, again)))
    assert_close(run()[0], eager[0], truth[0], "dx")
    assert_close(ours[0], eager[1], truth[1], "g")
    for what, sums, e, t in zip(("sum of g", "of g * x"), ours[1:], eager[2:], truth[2:]):
        assert_close(sums.double().sum(0), e, t, what, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "1x1"])
def test_nan_and_inf_reach_their_windows_alone(kernels, name):
    """Neither channels beyond the last one nor pixels beyond the edge are others' in disguise."""
    case = Case(SHAPES[name], torch.float16)
    case.x[0, -1, 2, 2], case.x[1, 0, 0, -1] = float("nan"), float("inf")
    ours, _ = kernels.launch.fprop(case.x, case.w, *case.arguments, tile=kernels.tile)
    expected = case.conv(case.x.float(), case.w.float())
    assert torch.equal(ours.isnan(), expected.isnan()) and ours.isnan().any()
    assert torch.equal(ours.isinf(), expected.isinf()) and ours.isinf().any()


def test_refused(kernels):
    """A tile on descriptors is never another kernel's in silence."""

    def refused(size, weight_size, *window, dtype=torch.float16, **keywords):
        x, w = torch.randn(size).to(dtype), torch.randn(weight_size).to(dtype)
        with pytest.raises(
            ValueError, match=r"^tile: no tensor descriptors for a .* with"
        ) as error:
            kernels.launch.fprop(x, w, *window, tile=kernels.tile, **keywords)
        return str(error.value).partition(" with ")[2]

    x, w = (2, 32, 5, 6), (16, 32, 1, 1)
    assert refused(x, w, dtype=torch.float32) == "torch.float32"
    assert refused(x, (16, 16, 1, 1), groups=2) == "groups"
    assert refused((2, 12, 5, 5), (16, 12, 1, 1)).startswith("pixels or addresses")
    assert refused(x, w, (2, 2)) == "a map of 5x6 that its stride does not divide"
    affine = kernels.launch.Affine(None, torch.ones(32), torch.ones(32))
    assert refused(x, w, prologue=affine) == "a prologue"
    assert refused((2, 8, 5, 5), (16, 8, 1, 1)).startswith("so few channels")
    dy, w = torch.randn(2, 16, 3, 3).half(), torch.randn(w).half()
    with pytest.raises(ValueError, match="for a gradient with a stride that leaves pixels without"):
        kernels.launch.dgrad(dy, w, (2, 32, 6, 6), (2, 2), tile=kernels.tile)


def test_boxes_cut_maps_into_the_fewest(kernels):
    """All maps of up to 17x17, few images and many, against every box there is."""
    box_of = kernels.conv_boxes.box_of

    def count(box, extent):
        return math.prod(math.ceil(length / side) for length, side in zip(extent, box))

    powers = [2**i for i in range(9)]
    for pixels in (64, 128, 256):
        every = [box for box in itertools.product(powers, repeat=3) if math.prod(box) == pixels]
        assert len(every) > 20
        for extent in itertools.product((1, 5, 256), range(1, 18), range(1, 18)):
            box = box_of(extent, pixels)
            fewest = [other for other in every if count(other, extent) == count(box, extent)]
            assert box in fewest
            assert count(box, extent) == min(count(other, extent) for other in every)
            squarest = min(1 / rows + 1 / columns for _, rows, columns in fewest)
            assert 1 / box[1] + 1 / box[2] == squarest


def test_boxes_of_resnet(kernels):
    """Nothing is wasted at a batch of 256; of a single image no more than must be."""
    box_of = kernels.conv_boxes.box_of
    found = {size: box_of((256, size, size), 128) for size in (56, 28, 14, 7)}
    assert found == {56: (2, 8, 8), 28: (8, 4, 4), 14: (32, 2, 2), 7: (128, 1, 1)}
    assert box_of((1, 7, 7), 64) == (1, 8, 8) and box_of((1, 1, 10**6), 128) == (1, 1, 128)
