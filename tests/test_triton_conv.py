"""The convolution kernels under Triton's interpreter, by the error rule.

fp32 and fp16: the interpreter multiplies bf16's bit patterns.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, assert_same_bits, spread
from interpreting import interpreted, launchers

triton = pytest.importorskip("triton")

# N, C, H, W, K, (R, S), stride, padding, dilation, groups
SHAPES = {
    "1x1": (2, 35, 5, 7, 19, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 one pixel": (1, 64, 1, 1, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 stride 2": (3, 33, 9, 7, 40, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "1x1 padded": (2, 17, 4, 5, 17, (1, 1), (1, 1), (1, 1), (1, 1), 1),
    "3x3": (2, 40, 9, 11, 35, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 stride 2": (2, 19, 10, 13, 21, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "3x3 unpadded": (2, 20, 6, 5, 18, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "3x3 dilated": (2, 17, 11, 9, 16, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "3x3 dilated stride 2": (1, 16, 11, 12, 16, (3, 3), (2, 2), (2, 2), (2, 2), 1),
    "2x3 uneven": (1, 18, 9, 14, 17, (2, 3), (2, 3), (0, 2), (3, 1), 1),
    "5x5 stride 4": (1, 16, 13, 15, 16, (5, 5), (4, 4), (2, 1), (1, 1), 1),
    "7x7 stem": (2, 3, 11, 13, 18, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "5 channels": (1, 5, 9, 10, 16, (3, 3), (1, 1), (0, 1), (1, 1), 1),
    "ResNeXt 4": (1, 64, 6, 5, 64, (3, 3), (1, 1), (1, 1), (1, 1), 16),
    "ResNeXt 8 stride 2": (1, 48, 7, 6, 48, (3, 3), (2, 2), (1, 1), (1, 1), 6),
    "ResNeXt 32": (1, 64, 5, 6, 64, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "uneven groups": (1, 15, 5, 5, 21, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "depthwise": (1, 10, 6, 6, 10, (3, 3), (1, 1), (1, 1), (1, 1), 10),
}


@pytest.fixture(scope="module")
def kernels():
    names = ("bn_relu", "configs", "conv_shape", "segments", "tuning")
    with interpreted():
        yield SimpleNamespace(
            launch=launchers(),
            **{name: importlib.import_module(f"fastres.kernels.{name}") for name in names},
        )


class Case:
    """A convolution's operands, and what eager makes of them in any dtype."""

    def __init__(self, sizes, dtype):
        n, c, h, w, k, taps, *self.window, self.groups = sizes
        self.arguments = (*self.window, self.groups)
        self.x = spread((n, c, h, w), dtype, "channels_last", mean=0.3)
        self.w = spread((k, c // self.groups, *taps), dtype, std=(c * taps[0] * taps[1]) ** -0.5)
        self.vectors = [spread((1, c, 1, 1), torch.float32).view(c) for _ in range(3)]
        self.k_vectors = [spread((1, k, 1, 1), torch.float32).view(k) for _ in range(3)]
        size = self.conv(self.x, self.w).shape
        self.residual = spread(size, dtype, "channels_last")
        self.dy = spread(size, dtype, "channels_last")

    def conv(self, x, w):
        return F.conv2d(x, w, None, *self.arguments)

    def moved(self, x):
        """BN as the prologue knows it, before ReLU; in x's dtype, but not rounded to half."""
        wide = x if x.dtype == torch.float64 else x.float()
        mean, scale, shift = (v.to(wide.dtype).view(1, -1, 1, 1) for v in self.vectors)
        return (wide - mean) * scale + shift

    def activated(self, x):
        return self.moved(x).relu().to(x.dtype)

    def gradients(self, x, w, dy):
        """Of ``conv(x, w)``, for x and w."""
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, self.window[0], self.window[1], self.window[2], False, [0, 0],
            self.groups, [True, True, False],
        )[:2]  # fmt: skip


def per_channel(vector, like):
    return vector.to(like.dtype if like.dtype == torch.float64 else torch.float32).view(1, -1, 1, 1)


FP32 = ("1x1", "3x3", "3x3 stride 2", "7x7 stem", "ResNeXt 4")  # the rest is the same but for dtype


@pytest.fixture(
    params=[(name, torch.float16) for name in SHAPES] + [(name, torch.float32) for name in FP32],
    ids=lambda parameter: f"{parameter[0]} {str(parameter[1])[6:]}",
)
def case(request):
    name, dtype = request.param
    return Case(SHAPES[name], dtype)


def check_eval(kernels, case, prologue=False, **how):
    """Bias, batch norm, residual and ReLU, of a convolution of x or of relu(batch_norm(x))."""
    mean, scale, shift = case.k_vectors
    variance, bias = shift.abs() + 0.5, scale.flip(0)

    def eager(x, w, residual):
        y = case.conv(case.activated(x) if prologue else x, w)
        wide = y if y.dtype == torch.float64 else y.float()
        m, v, a, b, c = (per_channel(t, wide) for t in (mean, variance, scale, shift, bias))
        y = (wide + c - m) * (v + 1e-3).rsqrt() * a + b
        return (y + residual).relu().to(x.dtype)

    operands = case.x, case.w, case.residual
    ours, moments = kernels.launch.fprop(
        case.x, case.w, *case.arguments, bias=bias, residual=case.residual, relu=True,
        norm=kernels.launch.Norm(mean, variance, scale, shift, 1e-3),
        prologue=kernels.launch.Affine(*case.vectors) if prologue else None, **how,
    )  # fmt: skip
    assert moments is None
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, eager(*operands), eager(*(t.double() for t in operands)))


def test_fprop_eval(kernels, case):
    check_eval(kernels, case)


def test_fprop_training(kernels, case):
    ours, moments = kernels.launch.fprop(
        case.x, case.w, *case.arguments,
        prologue=kernels.launch.Affine(*case.vectors), statistics=True,
    )  # fmt: skip
    truth = case.conv(case.activated(case.x.double()), case.w.double())
    eager = case.conv(case.activated(case.x), case.w)
    # what is multiplied is rounded too, and so it is in eager
    assert_close(ours, eager, truth)
    mean, variance = merged(moments, truth)
    exact_variance, exact_mean = torch.var_mean(truth, (0, 2, 3), correction=0)
    wide = eager.double()  # eager's statistics are of the rounded convolution
    variance_eager, mean_eager = torch.var_mean(wide, (0, 2, 3), correction=0)
    assert_close(mean, mean_eager, exact_mean, "mean", torch.float32)
    assert_close(variance, variance_eager, exact_variance, "variance", torch.float32)


def merged(moments, like):
    """Mean and variance out of segments, in fp64, by the textbook."""
    means, squares, counts = (t.double() for t in moments)
    pixels, counts = like.numel() // like.shape[1], counts[:, None]
    assert counts.sum() == pixels and counts.min() > 0
    mean = (counts * means).sum(0) / pixels
    return mean, (squares + counts * (means - mean).square()).sum(0) / pixels


@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "from the output"])
def test_dgrad_masked(kernels, case, kept):
    launch = kernels.launch
    before = case.moved(case.x)
    # the masked tensor is away from zero, so every place is compared
    x = torch.where(before.abs() < 0.1, case.x + 0.5, case.x)
    certain = case.moved(x).abs() > 0.01
    assert certain.double().mean() > 0.98
    other = torch.where(certain, spread(x.shape, x.dtype, "channels_last"), 0)
    activated = case.activated(x) if kept else None
    behind = launch.Behind(x, launch.Affine(*case.vectors), activated)
    ours = launch.dgrad(case.dy, case.w, x.shape, *case.arguments, residual=other, behind=behind)

    def expected(x, w, dy, other):
        g = torch.where(case.moved(x) <= 0, 0, case.gradients(x, w, dy)[0] + other)
        wide = g.double()
        centred = x.double() - case.vectors[0].double().view(1, -1, 1, 1)
        return g, wide.sum((0, 2, 3)), (wide * centred).sum((0, 2, 3))

    operands = x, case.w, case.dy, other
    eager, truth = expected(*operands), expected(*(t.double() for t in operands))
    assert_close(ours[0], eager[0], truth[0], "g")
    for name, sums, e, t in zip(("sum of g", "of g * x"), ours[1:], eager[1:], truth[1:]):
        assert_close(sums.double().sum(0), e, t, name, torch.float32)


def test_dgrad(kernels, case):
    ours = kernels.launch.dgrad(case.dy, case.w, case.x.shape, *case.arguments)
    assert ours[1:] == (None, None)
    operands = case.x, case.w, case.dy
    truth = case.gradients(*(t.double() for t in operands))[0]
    assert_close(ours[0], case.gradients(*operands)[0], truth)


@pytest.mark.parametrize("prologue", [False, True], ids=["", "prologue"])
def test_wgrad(kernels, case, prologue):
    affine = kernels.launch.Affine(*case.vectors) if prologue else None
    ours = kernels.launch.wgrad(case.dy, case.x, case.w.shape, *case.arguments, prologue=affine)

    def expected(x, w, dy):
        return case.gradients(case.activated(x) if prologue else x, w, dy)[1]

    operands = case.x, case.w, case.dy
    assert_close(ours, expected(*operands), expected(*(t.double() for t in operands)))


# Sizes that leave tails beside a tile of 128 and one of 64, and more than one split of wgrad.
TILED = {
    "1x1": (3, 136, 7, 11, 150, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x3": (3, 72, 9, 7, 150, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stem": (2, 3, 21, 19, 70, (7, 7), (2, 2), (3, 3), (1, 1), 1),
}


def shipped_tiles():
    """Every kind of problem with every tile that any architecture ships for it; the interpreter
    knows neither warps nor stages."""
    configs = importlib.import_module("fastres.kernels.configs")
    found = {}
    for kinds in configs.TILES.values():
        for kind, tiles in kinds.items():
            found.update({(kind, *tile[:4]): tile for tile in tiles})
    return [(key[0], tile) for key, tile in found.items()]


@pytest.mark.parametrize("kind, tile", shipped_tiles(), ids=str)
def test_every_tile(kernels, kind, tile):
    launch, tile = kernels.launch, kernels.configs.Tile(*tile)
    for name in ("stem",) if kind == "flat" else ("1x1", "3x3"):
        case = Case(TILED[name], torch.float16)
        affine = launch.Affine(*case.vectors)
        operands = case.x, case.w, case.dy
        wide = [t.double() for t in operands]
        if kind in ("plain", "masked"):
            behind = None if kind == "plain" else launch.Behind(case.x, affine, case.x)
            ours = launch.dgrad(
                case.dy, case.w, case.x.shape, *case.arguments, behind=behind, tile=tile
            )
            eager, truth = case.gradients(*operands)[0], case.gradients(*wide)[0]
            if behind:
                eager, truth = (torch.where(case.x <= 0, 0, g) for g in (eager, truth))
                sums = truth.sum((0, 2, 3))
                assert_close(ours[1].double().sum(0), eager.double().sum((0, 2, 3)), sums)
            assert_close(ours[0], eager, truth, f"dgrad of {name}")
        if kind == "wgrad":
            ours = launch.wgrad(
                case.dy, case.x, case.w.shape, *case.arguments, prologue=affine, tile=tile
            )
            operands, wide = ((case.activated(x), w, dy) for x, w, dy in (operands, wide))
            eager, truth = case.gradients(*operands)[1], case.gradients(*wide)[1]
            assert_close(ours, eager, truth, f"wgrad of {name}")
        if kind in ("plain", "statistics", "prologue", "flat", "parts", "descriptors"):
            prologue = affine if kind in ("prologue", "parts") else None
            tile = tile._replace(parts=2 if kind == "parts" else 1)
            ours, moments = launch.fprop(
                case.x, case.w, *case.arguments,
                prologue=prologue, statistics=kind != "plain", tile=tile,
            )  # fmt: skip
            x, exact = (case.activated(x) if prologue else x for x in (case.x, wide[0]))
            eager, truth = case.conv(x, case.w), case.conv(exact, wide[1])
            assert_close(ours, eager, truth, f"fprop of {name}")
            if moments:
                found = merged(moments, truth)
                variance, mean = torch.var_mean(truth, (0, 2, 3), correction=0)
                rounded = torch.var_mean(eager.double(), (0, 2, 3), correction=0)
                assert_close(found[0], rounded[1], mean, "mean", torch.float32)
                assert_close(found[1], rounded[0], variance, "variance", torch.float32)


def test_two_runs_give_the_same_bits(kernels):
    """wgrad in several splits, and sums of several tiles."""
    launch = kernels.launch
    case = Case((3, 16, 13, 17, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1), torch.float16)
    behind = launch.Behind(case.x, launch.Affine(*case.vectors))

    def run():
        y, moments = launch.fprop(case.x, case.w, *case.arguments, statistics=True)
        g = launch.dgrad(case.dy, case.w, case.x.shape, *case.arguments, behind=behind)
        dw = launch.wgrad(case.dy, case.x, case.w.shape, *case.arguments)
        assert len(moments.means) > 1 and len(g[1]) > 1
        return {str(i): t for i, t in enumerate((y, *moments[:2], *g, dw))}

    assert_same_bits(run(), run())


@pytest.mark.parametrize("many", [256, 8])
def test_statistics_survive_cancellation(kernels, monkeypatch, many):
    """Mean 1e4, deviation 1, up to the finishing kernel of bn_relu, with fewer segments and more
    than it takes at once. A tile's mean is off by up to half of 2^-10, and by 1/8 from the whole's
    mean: that bounds the variance to 1e-4 in either direction, whatever the merge."""
    monkeypatch.setattr(kernels.segments, "MANY", many)
    n, h, w = 2, 37, 39
    x = spread((n, 16, h, w), torch.float32, "channels_last", mean=1e4)
    eye = torch.eye(16).view(16, 16, 1, 1)
    tile = kernels.configs.Tile(64, 16, 16, 8, 4, 2)
    y, moments = kernels.launch.fprop(x, eye, statistics=True, tile=tile)
    assert torch.equal(y, x)
    assert 1 < len(moments.means) <= many
    mean, invstd = torch.empty(16), torch.empty(16)
    kernels.bn_relu.finish_moments_kernel[(1,)](
        *moments, mean, invstd, None, None, len(moments.means), 16, 0.1, 1e-5,
        BLOCK_S=64, BLOCK_C=16,
    )  # fmt: skip
    variance, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(invstd.double(), (variance + 1e-5).rsqrt(), rtol=5e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_nan_and_inf_stay(kernels):
    case = Case((1, 16, 5, 5, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1), torch.float32)
    case.x[0, 3, 2, 2] = float("nan")
    case.x[0, 4, 0, 0] = float("inf")
    prologue = kernels.launch.Affine(*case.vectors)
    ours, _ = kernels.launch.fprop(case.x, case.w, *case.arguments, relu=True, prologue=prologue)
    expected = case.conv(case.activated(case.x), case.w).relu()
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert ours.isnan().any() and not ours.isnan().all()


@pytest.mark.parametrize("shape", [(0, 16, 5, 5), (2, 16, 0, 5)])
def test_nothing_to_convolve(kernels, shape):
    launch = kernels.launch
    x, w = torch.randn(shape), torch.randn(8, 16, 1, 1)
    y, moments = launch.fprop(x, w, statistics=True)
    assert y.shape == (shape[0], 8, *shape[2:]) and moments.means.shape == (0, 8)
    assert launch.dgrad(y, w, shape)[0].shape == shape
    assert torch.equal(launch.wgrad(y, x, w.shape), torch.zeros_like(w))


def test_wrong_groups(kernels):
    with pytest.raises(ValueError, match=r"weight: expected 2 groups over 16 channels"):
        kernels.launch.fprop(torch.randn(1, 16, 5, 5), torch.randn(8, 16, 1, 1), groups=2)


def test_shipped_choice(kernels):
    """Large maps get large tiles, small ones a program for most multiprocessors, and no tile is
    wider than the problem."""
    configs = kernels.configs

    def tile(rows, columns, kind="plain", precision="half"):
        problem = configs.Problem(kind, 90, precision, 1, rows, columns, 64, 132)
        assert configs.shipped(problem) in configs.candidates(problem)
        return configs.shipped(problem)

    assert tile(256 * 56 * 56, 256)[:2] == (128, 128)
    assert tile(256 * 56 * 56, 64)[:2] == (128, 64)
    assert tile(256 * 56 * 56, 32)[:2] == (128, 32)
    assert tile(256 * 56 * 56, 16)[:2] == (128, 32)
    small = tile(14 * 14, 256)
    assert 66 < triton.cdiv(14 * 14, small.BLOCK_M) * 256 / small.BLOCK_N <= 132
    assert tile(1, 1).BLOCK_N == min(t.BLOCK_N for t in configs.TILES[90]["plain"])
    assert tile(64, 576, "wgrad")[:2] == (64, 64)
    for kinds in configs.TILES.values():
        assert kinds.keys() == configs.TILES[90].keys()
    for precision, tiles in configs.FP32_TILES.items():
        assert tile(10**6, 256, precision=precision) == tiles[0]


def test_autotuning_measures_on_outputs_of_its_own(kernels, monkeypatch):
    """Once, and only where asked for; what is measured writes elsewhere."""
    case = Case(TILED["1x1"], torch.float16)
    launch, tuning = kernels.launch, kernels.tuning
    make, tuners, written = tuning.tuner_of.__wrapped__, [], []

    def bench(call, quantiles):
        call()
        written.append(tuners[-1].nargs["y"].data_ptr())
        return [-len(written)] * 3  # the later, the faster

    def make_tuner(kernel, problem, tiles):
        tuners.append(make(kernel, problem, tiles, bench))
        return tuners[-1]

    monkeypatch.setattr(tuning, "tuner_of", make_tuner)
    monkeypatch.setattr(tuning, "_measurable", lambda like: True)
    monkeypatch.setattr(tuning, "_measured", {})
    shipped, _ = launch.fprop(case.x, case.w, *case.arguments)
    assert not written  # the shipped choice is the default
    monkeypatch.setenv("FASTRES_AUTOTUNE", "1")
    ours, moments = launch.fprop(case.x, case.w, *case.arguments, statistics=True)
    ((_, problem, *_), (way, tile)), *more = tuning._measured.items()
    kinds = (problem, problem._replace(kind="descriptors"))
    candidates = [tile for each in kinds for tile in kernels.configs.candidates(each)]
    assert way == 1 and tile == candidates[-1] and tile.descriptors and not more
    assert len(written) == len(candidates) > 3 and ours.data_ptr() not in written
    assert len(moments.means) == -(-problem.rows // tile.BLOCK_M)
    torch.testing.assert_close(ours, shipped, rtol=1e-3, atol=1e-3)
    launch.fprop(case.x, case.w, *case.arguments, statistics=True)
    assert len(written) == len(candidates)


def test_autotuning_measures_every_filter_and_stride(kernels, monkeypatch):
    """A kernel that was faster for 1x1 says nothing of 3x3, and may not compute it."""
    tuning, measured = kernels.tuning, []

    def fastest(ways, measure):
        measured.append(len(ways))
        return len(ways) - 1, kernels.configs.candidates(ways[-1].problem)[-1]

    monkeypatch.setattr(tuning, "_fastest", fastest)
    monkeypatch.setattr(tuning, "_measurable", lambda like: True)
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setenv("FASTRES_AUTOTUNE", "1")
    # one number of pixels and of channels for all; a stride of 2 does not divide the last map
    for taps, size, stride in (
        (1, (8, 12), 1),
        (3, (8, 12), 1),
        (3, (16, 24), 2),
        (3, (15, 23), 2),
    ):
        # in lists, as operators are called
        window = ([stride, stride], [taps // 2, taps // 2], [1, 1], 1)
        case = Case((2, 16, *size, 16, (taps, taps), *window), torch.float16)
        operands = case.x, case.w, case.dy
        wide = [t.double() for t in operands]
        ours, _ = kernels.launch.fprop(case.x, case.w, *window)
        assert_close(ours, case.conv(case.x, case.w), case.conv(*wide[:2]))
        ours, *_ = kernels.launch.dgrad(case.dy, case.w, case.x.shape, *window)
        assert_close(ours, case.gradients(*operands)[0], case.gradients(*wide)[0], "dgrad")
    # of the gradient both maps with a stride are one problem: their classes have as many pixels
    assert measured == [2, 2, 2, 2, 2, 2, 1]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("name", ["ResNeXt 4", "ResNeXt 8 stride 2", "depthwise"])
def test_nan_and_inf_stay_in_their_group(kernels, name):
    """Small groups are computed several at a time, with zeros between them: 0 * Inf is NaN."""
    case = Case(SHAPES[name], torch.float32)
    filters = case.w.shape[0] // case.groups
    assert kernels.conv_shape.merged(case.groups, case.w.shape[1], filters) > 1
    case.x[0, 1, 2, 2], case.x[0, -1, 3, 1] = float("inf"), float("nan")
    case.dy[0, 0, 1, 1], case.dy[0, -1, 2, 0] = float("nan"), -float("inf")
    prologue = kernels.launch.Affine(*case.vectors)
    for x, affine in ((case.x, None), (case.activated(case.x), prologue)):
        ours, _ = kernels.launch.fprop(case.x, case.w, *case.arguments, prologue=affine)
        expected = case.conv(x, case.w)
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    ours, *_ = kernels.launch.dgrad(case.dy, case.w, case.x.shape, *case.arguments)
    expected = case.gradients(torch.zeros_like(case.x), case.w, case.dy)[0]
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    ours = kernels.launch.wgrad(case.dy, case.x, case.w.shape, *case.arguments)
    # eager leaves padding out of its sums, where 0 times an Inf is NaN here
    ours, x, dy = (
        t.transpose(0, dim).reshape(case.groups, -1).isfinite().all(1)
        for t, dim in ((ours, 0), (case.x, 1), (case.dy, 1))
    )
    assert torch.equal(ours, x & dy) and ours.any() and not ours.all()
