"""The CUDA gradient of a convolution's input: how strides are taken apart, and its numbers."""

import ctypes
import itertools

import emulating
import pytest
import torch
from agreement import assert_close, assert_same_bits
from emulated_conv import LAST, MULTIPROCESSORS, SHAPES, numbers, operands_for, pixels_of

from fastres import reference

# n, c, h, w, k, r, s, stride, padding, dilation
STRIDED = SHAPES | {
    "3x3, stride 2, even": (2, 64, 14, 14, 72, 3, 3, (2, 2), (1, 1), (1, 1)),
    "3x3, stride 2, dilated": (1, 16, 13, 12, 16, 3, 3, (2, 2), (2, 2), (2, 2)),
    "5x5, stride 4": (1, 16, 13, 15, 24, 5, 5, (4, 4), (2, 1), (1, 1)),
    "unpadded": (2, 16, 10, 9, 72, 3, 3, (1, 1), (0, 0), (1, 1)),
    "padded beyond": (1, 16, 5, 6, 24, 2, 2, (1, 1), (3, 3), (1, 1)),
    "stride beyond taps": (1, 8, 9, 7, 16, 1, 2, (3, 4), (0, 0), (1, 1)),
}


def covers(shape) -> bool:
    function = emulating.library("conv_dgrad").dgrad_covers
    function.restype = ctypes.c_bool
    return function(numbers(shape))


def axes():
    """Size, taps, stride, padding, dilation: every one that has an output."""
    choices = (range(1, 7), range(1, 5), range(1, 5), range(3), range(1, 4))
    for size, taps, stride, padding, dilation in itertools.product(*choices):
        if size + 2 * padding > dilation * (taps - 1):
            yield size, taps, stride, padding, dilation


def test_strides_are_taken_apart_exhaustively():
    """Every product of the gradient is in one of the convolutions, once, index by index: all small
    axes, each beside a plain one and beside another one."""
    every = list(axes())
    plain = (4, 3, 2, 1, 1)
    for one, other in [*((a, plain) for a in every), *zip(every, every[7:], strict=False)]:
        (h, r, *rows), (w, s, *columns) = one, other
        shape = (2, 8, h, w, 8, r, s, *zip(rows, columns, strict=True))
        assert covers(shape), shape
    assert all(covers(shape) for shape in STRIDED.values())


# kernel and filters of its tiles
KERNELS = [("sm90", 64), ("sm90", 128), ("sm90", 256), ("portable", 64), ("portable", 128)]
SPLIT = ("split", 64)  # its sums between the blocks of clusters
BY_KERNEL = {"ids": lambda kernel: "-".join(map(str, kernel))}


def dgrad(shape, dy, f, x_shape, masks=None, kernel=KERNELS[0]):
    """The gradient of x; with ``masks`` (batch norm's input, mean, invstd, weight and bias) also
    slopes and gradients of weight and bias as bn_relu_finish_sums gives them."""
    guard = emulating.Guarded()
    n, c, h, w = x_shape
    dx = guard.empty_like(torch.empty(n * h * w * c, dtype=dy.dtype)).zero_()
    behind, *vectors = masks or (None,) * 5
    slopes, weight, bias = (guard.empty_like(torch.empty(m * c)) for m in (2, 1, 1))
    emulating.call(
        emulating.library("conv_dgrad").conv_dgrad, emulating.dtype_name(dy), numbers(shape),
        emulating.arrays(
            pixels_of(dy), pixels_of(f), dx, pixels_of(behind), *vectors, slopes, weight, bias,
        ),
        kernel[0].encode(), masks is not None, kernel[1],
        1000 if kernel == SPLIT else MULTIPROCESSORS,
    )  # fmt: skip
    guard.check()
    return dx.view(n, h, w, c).permute(0, 3, 1, 2), slopes.view(c, 2), weight, bias


def gradient(shape, x, f, dy):
    return torch.nn.grad.conv2d_input(x.shape, f, dy, *shape[7:])


def gradient_operands(name, dtype):
    shape = STRIDED[name]
    x, f, raw, _ = operands_for(shape, dtype)
    dy = torch.randn(raw.shape, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)
    return shape, x, f, dy


@pytest.mark.parametrize("kernel", [*KERNELS, SPLIT], **BY_KERNEL)
@pytest.mark.parametrize("name", STRIDED)
def test_gradient_of_the_input(name, kernel):
    dtype = torch.bfloat16 if (kernel[1] == 128) != (len(name) % 2 == 0) else torch.float16
    shape, x, f, dy = gradient_operands(name, dtype)
    found, *_ = dgrad(shape, dy, f, x.shape, kernel=kernel)
    exact = gradient(shape, *(t.double() for t in (x, f, dy)))
    assert_close(found, gradient(shape, x, f, dy), exact, name)


def masked(shape, x, f, dy, y, behind, mean, invstd):
    """Gradient behind the ReLU that gave y, and of batch norm's weight and bias."""
    g = torch.where(y <= 0, 0, gradient(shape, x, f, dy))
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    mean, invstd = (v.to(wide).view(1, -1, 1, 1) for v in (mean, invstd))
    xhat = (behind.to(wide) - mean) * invstd
    return g, (g.to(wide) * xhat).sum((0, 2, 3)), g.to(wide).sum((0, 2, 3))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k[1] < 256], **BY_KERNEL)
@pytest.mark.parametrize("name", STRIDED)
def test_masked_and_reduced(name, kernel):
    """dx where the ReLU let pass, and the sums that the batch norm behind it needs."""
    dtype = torch.bfloat16 if (kernel[1] == 128) == (len(name) % 2 == 0) else torch.float16
    shape, x, f, dy = gradient_operands(name, dtype)
    behind = torch.randn(x.shape, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)
    vectors = bn_vectors(x.shape[1])
    y = reference.bn_relu_apply(behind, None, *vectors, False)
    operands = (x, f, dy, y, behind, *vectors[:2])
    found, slopes, weight, bias = dgrad(shape, dy, f, x.shape, (behind, *vectors), kernel)
    truth = masked(shape, *(t.double() for t in operands))
    eager = masked(shape, *operands)
    assert_close(found, eager[0], truth[0], name)
    assert torch.equal(found == 0, truth[0].to(dtype) == 0)
    # eager's sums are of rounded values: ours may be as far from the truth as rounding of fp32 goes
    for ours, theirs, exact in zip((weight, bias), eager[1:], truth[1:], strict=True):
        assert_close(ours, theirs, exact, name, torch.float32)
    count = x.numel() // x.shape[1]
    invstd = vectors[1].double()
    theirs, exact = (torch.stack((each[1] * invstd, each[2]), 1) / count for each in (eager, truth))
    assert_close(slopes, theirs, exact, name, torch.float32)


def bn_vectors(channels):
    """mean, invstd, weight and bias."""
    return [torch.randn(channels), torch.rand(channels) + 0.5, *torch.randn(2, channels)]


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[3]], **BY_KERNEL)
def test_nan_passes_the_mask(kernel):
    """As it does in threshold_backward; and weight and bias may be absent."""
    shape, x, f, dy = gradient_operands("3x3", torch.bfloat16)
    behind = torch.full_like(x, -1.0)
    behind[0, 0, 0, 0] = float("nan")
    vectors = [torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None, None]
    found, *_ = dgrad(shape, dy, f, x.shape, (behind, *vectors), kernel)
    exact = gradient(shape, *(t.double() for t in (x, f, dy)))
    assert found.count_nonzero() == 1
    torch.testing.assert_close(found[0, 0, 0, 0].double(), exact[0, 0, 0, 0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[3]], **BY_KERNEL)
@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2"])
def test_two_runs_give_the_same_bits(name, kernel):
    shape, x, f, dy = gradient_operands(name, torch.bfloat16)
    masks = (torch.randn(x.shape).to(x.dtype), *bn_vectors(x.shape[1]))
    runs = [dgrad(shape, dy, f, x.shape, masks, kernel) for _ in range(2)]
    assert_same_bits(*(dict(enumerate(run)) for run in runs))
