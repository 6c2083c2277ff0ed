"""The CUDA convolutions, run on the CPU by the emulator, against naive sums in fp64."""

import ctypes

import emulating
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, assert_same_bits
from emulated_conv import MULTIPROCESSORS, SHAPES, numbers, operands_for, pixels_of

# kernel and filters of its tiles
KERNELS = [("sm90", 64), ("sm90", 128), ("sm90", 256), ("portable", 64), ("portable", 128)]


NO_NORM = (None,) * 5  # nor a bias


def convolve(
    shape, x, f, skip, raw, norm, kernel, moments, relu, prologue=(None,) * 4,
    multiprocessors=MULTIPROCESSORS,
):  # fmt: skip
    guard = emulating.Guarded()
    n, k, p, q = raw.shape
    y = guard.empty_like(torch.empty(n * p * q * k, dtype=x.dtype))
    mean, invstd = (guard.empty_like(torch.empty(k)) for _ in range(2))
    name, tile = kernel
    emulating.call(
        emulating.library("conv_fprop").conv_fprop, emulating.dtype_name(x), numbers(shape),
        emulating.arrays(
            pixels_of(x), pixels_of(f), pixels_of(skip), y, *norm, mean, invstd, *prologue
        ),
        name.encode(), tile, multiprocessors, moments, relu,
    )  # fmt: skip
    guard.check()
    return y.view(n, p, q, k).permute(0, 3, 1, 2), mean, invstd


def normalised(x, vectors):
    """relu(batch_norm(x)), rounded: what is multiplied is rounded in eager too."""
    mean, invstd, weight, bias = (v.view(-1, 1, 1) for v in vectors)
    return F.relu((x.float() - mean) * (invstd * weight) + bias).to(x.dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
@pytest.mark.parametrize("name", SHAPES)
def test_eval_epilogue(name, kernel):
    """Bias, batch norm, residual and ReLU; every shape in both dtypes over the tiles."""
    shape = SHAPES[name]
    half, bfloat16 = torch.float16, torch.bfloat16
    dtype = bfloat16 if (kernel in KERNELS[1::2]) != (len(name) % 2 == 0) else half
    check_eval(shape, dtype, kernel, residual=kernel not in KERNELS[::3], relu=name != "1x1")


def check_eval(shape, dtype, kernel, residual, relu, multiprocessors=MULTIPROCESSORS):
    x, f, raw, skip = operands_for(shape, dtype, residual)
    conv_bias, mean, weight, bias = (torch.randn(shape[4]) for _ in range(4))
    norm = (conv_bias, mean, torch.rand(shape[4]) + 0.5, weight, bias)
    if not residual and not relu:
        norm = (conv_bias, *NO_NORM[1:])
    y, *_ = convolve(
        shape, x, f, skip, raw, norm, kernel, False, relu, multiprocessors=multiprocessors
    )

    def finish(sums):
        bias, *statistics = (None if v is None else v.to(sums.dtype) for v in norm)
        exact = sums + bias.view(-1, 1, 1)
        if norm[1] is not None:
            exact = F.batch_norm(exact, *statistics)
        exact = exact if skip is None else exact + skip
        return F.relu(exact) if relu else exact

    eager = finish(F.conv2d(x, f, None, *shape[7:]).float()).to(dtype)
    assert_close(y, eager, finish(raw), str(shape))


# --- a tile's sum split between the blocks of a cluster ---


def shares_of(shape, multiprocessors) -> int:
    return emulating.library("conv_fprop").shares_of(numbers(shape), multiprocessors)


def split_problems():
    """Every shape with each number of shares that it can have, and the multiprocessors for that."""
    for name, shape in SHAPES.items():
        found = {shares_of(shape, m): m for m in reversed(range(1, 200))}
        yield from ((name, shares, m) for shares, m in sorted(found.items()) if shares)


def test_a_split_sum():
    """In one share to eight; beginning while the kernel before runs, whose results it waits for."""
    tried = set()
    for i, (name, shares, multiprocessors) in enumerate(split_problems()):
        tried.add(shares)
        dtype = torch.bfloat16 if i % 2 else torch.float16
        check_eval(SHAPES[name], dtype, ("split", 64), i % 3 < 2, i % 5 != 0, multiprocessors)
    assert tried == {1, 2, 4, 8}


# n, c, size, k, kernel: how an H200 should share out the sums of a ResNet-50's layers
SPLIT = {
    (1, 512, 7, 512, 3): 8,  # 8 tiles of 72 steps
    (1, 2048, 7, 512, 1): 8,
    (1, 512, 7, 2048, 1): 4,  # 32 tiles
    (1, 64, 56, 64, 3): 4,  # 25 tiles
    (1, 64, 56, 256, 1): 1,  # 100 tiles of one step
    (8, 256, 14, 256, 3): 2,  # 52 tiles
    (32, 512, 7, 512, 3): 1,  # 104 tiles
    (64, 512, 7, 512, 3): 0,  # 200 tiles: not this kernel's
}


@pytest.mark.parametrize("layer", SPLIT, ids=str)
def test_shares_of_a_sum(layer):
    n, c, size, k, kernel = layer
    shape = (n, c, size, size, k, kernel, kernel, (1, 1), (kernel // 2,) * 2, (1, 1))
    assert shares_of(shape, 132) == SPLIT[layer]


def test_shares_of_a_sum_cover_it():
    covers = emulating.library("conv_fprop").shares_cover
    covers.restype = ctypes.c_bool
    assert all(covers(numbers(shape)) for shape in SHAPES.values())


# --- statistics, and what a convolution does not do ---


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
@pytest.mark.parametrize("name", ["1x1, stride 2", "3x3", "3x3, stride 2", "one pixel"])
def test_training_epilogue(name, kernel):
    """The raw output, and the statistics of what was written; far from zero too."""
    dtype = torch.bfloat16 if kernel[1] == 64 else torch.float16
    x, f, raw, _ = operands_for(SHAPES[name], dtype)
    for offset in (0, 8):
        x = (x + offset).to(dtype)
        raw = F.conv2d(x.double(), f.double(), None, *SHAPES[name][7:])
        y, mean, invstd = convolve(SHAPES[name], x, f, None, raw, NO_NORM, kernel, True, False)
        assert_close(y, F.conv2d(x, f, None, *SHAPES[name][7:]), raw, name)
        variance, centre = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), centre, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", ["sm90", "portable"])
def test_statistics_survive_cancellation(kernel):
    """A mean of 2000 beside a deviation of 1: as far apart as float16 can have them."""
    shape = (3, 64, 30, 29, 64, 1, 1, (1, 1), (0, 0), (1, 1))
    x = (torch.randn(shape[0], 64, 30, 29) + 2000).half()
    eye = torch.eye(64).view(64, 64, 1, 1).half()
    y, mean, invstd = convolve(shape, x, eye, None, x, NO_NORM, (kernel, 64), True, False)
    assert torch.equal(y, x)
    variance, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", ["sm90", "portable", "split"])
def test_two_runs_give_the_same_bits(kernel):
    """Threads, blocks and copies run in another order each time."""
    shape, split = SHAPES["3x3, stride 2"], kernel == "split"
    x, f, raw, _ = operands_for(shape, torch.bfloat16)
    how = (None, raw, NO_NORM, (kernel, 64), not split, False, (None,) * 4, 100 if split else 3)
    runs = [convolve(shape, x, f, *how) for _ in range(2)]
    assert_same_bits(*(dict(enumerate(run)) for run in runs))


def test_what_the_tensor_maps_cannot_say():
    fits = emulating.library("conv_fprop").fits
    fits.restype = ctypes.c_bool
    assert all(fits(numbers(shape)) for shape in SHAPES.values())
    for n, c, k, r, padding, dilation in [
        (1, 12, 64, 3, 1, 1),  # channels in no whole packs
        (1, 64, 100, 3, 1, 1),
        (1, 64, 64, 3, 129, 128),  # corners beyond a signed byte
        (1, 64, 64, 3, 0, 128),  # offsets beyond an unsigned byte
        (1 << 20, 64, 64, 1, 0, 1),  # coordinates beyond 32 bits
    ]:
        shape = (n, c, 300, 300, k, r, r, (1, 1), (padding,) * 2, (dilation,) * 2)
        assert not fits(numbers(shape)), shape


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k[1] < 256], ids=lambda kernel: "-".join(map(str, kernel))
)
@pytest.mark.parametrize("name", SHAPES)
def test_prologue(name, kernel):
    """The convolution of relu(batch_norm(x)), rounded as bn_relu rounds it; padding stays zero,
    which is not what batch norm makes of it."""
    shape, dtype = SHAPES[name], torch.bfloat16 if kernel[1] == 64 else torch.float16
    x, f, raw, _ = operands_for(shape, dtype)
    vectors = [torch.randn(shape[1]) for _ in range(4)]

    def convolution(x, f):
        return F.conv2d(x, f, None, *shape[7:])

    activated = normalised(x, vectors)
    exact = convolution(activated.double(), f.double())
    y, found, _ = convolve(shape, x, f, None, raw, NO_NORM, kernel, True, False, vectors)
    assert_close(y, convolution(activated, f), exact, name)
    torch.testing.assert_close(found.double(), y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


# n, c, size, k, kernel: whether on an H200 batch norm and ReLU before it should be a prologue of the
# convolution, of its filters' gradient
PROLOGUES = {
    (256, 64, 56, 256, 1): (True, True),  # memory is the limit
    (256, 128, 28, 512, 1): (True, True),
    (256, 64, 56, 64, 3): (False, False),  # everything nine times
    (256, 512, 7, 512, 3): (False, False),
    (256, 512, 7, 2048, 1): (False, True),  # sixteen tiles of filters, and a map that a cache holds
    (256, 2048, 7, 512, 1): (False, False),  # more channels than there is room for
}


@pytest.mark.parametrize("layer", PROLOGUES, ids=str)
def test_where_a_prologue_pays(layer):
    n, c, size, k, kernel = layer
    shape = (n, c, size, size, k, kernel, kernel, (1, 1), (kernel // 2,) * 2, (1, 1))
    found = []
    for name in ("conv_fprop", "conv_wgrad"):
        pays = emulating.library(name).takes_prologue
        pays.restype = ctypes.c_bool
        found.append(pays(numbers(shape), 132))
    assert tuple(found) == PROLOGUES[layer]


# enough pixels for several shares
WGRAD_SHAPES = SHAPES | {"many": (5, 24, 21, 20, 40, 3, 3, (1, 1), (1, 1), (1, 1))}


def wgrad_plan(shape, multiprocessors) -> tuple[int, int]:
    """Filters of a tile, and shares."""
    found = [ctypes.c_int() for _ in range(2)]
    plan = emulating.library("conv_wgrad").wgrad_plan
    plan(numbers(shape), multiprocessors, *map(ctypes.byref, found))
    return tuple(value.value for value in found)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
@pytest.mark.parametrize("name", WGRAD_SHAPES)
def test_gradient_of_the_filters(name, multiprocessors, prologue):
    """In one share of the pixels and in several; of relu(batch_norm(x)), too, rounded as bn_relu
    rounds it, whose padding stays zero."""
    dtype = torch.bfloat16 if (multiprocessors == 3) != prologue else torch.float16
    shape = WGRAD_SHAPES[name]
    x, f, raw, _ = operands_for(shape, dtype)
    grad = torch.randn(raw.shape, dtype=torch.float64).to(dtype)
    vectors = [torch.randn(shape[1]) if prologue else None for _ in range(4)]
    activated = normalised(x, vectors) if prologue else x

    def gradient(x, f, grad):
        f = f.detach().requires_grad_()
        y = F.conv2d(x, f, None, *shape[7:])
        return torch.autograd.grad(y, f, grad)[0]

    guard = emulating.Guarded()
    found = guard.empty_like(torch.empty(f.numel(), dtype=dtype))
    emulating.call(
        emulating.library("conv_wgrad").conv_wgrad, emulating.dtype_name(x), numbers(shape),
        emulating.arrays(pixels_of(grad), pixels_of(x), found, *vectors), multiprocessors,
    )  # fmt: skip
    guard.check()
    k, c, r, s = f.shape
    found = found.view(k, r, s, c).permute(0, 3, 1, 2)
    exact = gradient(activated.double(), f.double(), grad.double())
    assert_close(found, gradient(activated, f, grad), exact, name)


def test_the_filters_gradient_is_tried_in_every_form():
    plans = {wgrad_plan(shape, m) for shape in WGRAD_SHAPES.values() for m in (1, 3, 40)}
    assert {tile for tile, _ in plans} == {64, 128, 256}
    assert min(shares for _, shares in plans) == 1 < max(shares for _, shares in plans)


# n, c, size, k, kernel: what an H200 should do with a ResNet-50's layers
PLANS = {
    (256, 64, 56, 64, 3): (64, 26),  # nine taps in five pairs: a tile is no wider than the filters
    (256, 256, 14, 256, 3): (256, 7),  # 18 tiles, in one round
    (256, 512, 7, 512, 3): (256, 5),  # 72 tiles: one share would leave half of the chip idle
    (256, 2048, 7, 512, 1): (256, 4),
    (32, 1024, 14, 256, 1): (128, 8),  # few pixels: narrower tiles, so that there are enough
}


@pytest.mark.parametrize("layer", PLANS, ids=str)
def test_plan_of_the_filters_gradient(layer):
    n, c, size, k, kernel = layer
    pad = (kernel // 2,) * 2
    shape = (n, c, size, size, k, kernel, kernel, (1, 1), pad, (1, 1))
    assert wgrad_plan(shape, 132) == PLANS[layer]


# n, c, size, k, kernel: filters of a tile
TILES = {
    (256, 64, 56, 64, 3): 64,
    (256, 256, 14, 256, 3): 256,  # three rounds
    (32, 256, 14, 256, 3): 128,  # one round; 64 would take two, and load the input twice as often
    (32, 512, 7, 512, 3): 64,  # one round, of almost the whole chip
}


@pytest.mark.parametrize("layer", TILES, ids=str)
def test_width_of_the_tiles(layer):
    n, c, size, k, kernel = layer
    pad = (kernel // 2,) * 2
    shape = (n, c, size, size, k, kernel, kernel, (1, 1), pad, (1, 1))
    assert emulating.library("conv_fprop").choose_tile(numbers(shape), 132) == TILES[layer]


def test_shares_of_the_pixels_cover_them():
    covers = emulating.library("conv_wgrad").wgrad_covers
    covers.restype = ctypes.c_bool
    for n in (1, 2, 32, 256):
        for c, k, size in [(64, 64, 56), (256, 64, 56), (512, 512, 7), (2048, 512, 7), (24, 8, 13)]:
            for kernel in (1, 3):
                pad = (kernel // 2,) * 2
                shape = (n, c, size, size, k, kernel, kernel, (1, 1), pad, (1, 1))
                for multiprocessors in (1, 3, 114, 132, 1000):
                    assert covers(numbers(shape), multiprocessors), (shape, multiprocessors)
