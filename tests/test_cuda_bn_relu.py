"""The CUDA kernels of bn_relu and add_relu, run on the CPU by the emulator: numbers, launch plans."""

import ctypes

import emulating
import pytest
import torch
import torch.nn.functional as F
from agreement import FLOATS, assert_rule, assert_same_bits, batch_norm_operands, spread

from fastres import arguments, reference

SHAPES = [  # packs that fit and that don't, one pixel, one channel, many segments, few channels
    (2, 16, 4, 8),
    (3, 5, 5, 7),
    (7, 19, 1, 1),
    (2, 1, 3, 5),
    (3, 72, 12, 14),
    (1, 3, 40, 41),
]
LAYOUTS = ["contiguous", "channels_last"]
MULTIPROCESSORS = 3
NONE, FROM_INPUT, FROM_OUTPUT = range(3)


def shape_of(x):
    n, c, h, w = x.shape
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return emulating.integers(n, c, h * w, last, MULTIPROCESSORS)


def bn_relu(x, residual, running_mean, running_var, weight, bias, training, momentum, eps, relu):
    """As the operator: output, mean, invstd; the running statistics are updated."""
    guard = emulating.Guarded()
    y = guard.empty_like(x)
    mean, invstd = (
        guard.empty_like(torch.empty(x.shape[1], dtype=arguments.accumulation_dtype(x.dtype)))
        for _ in range(2)
    )
    emulating.call(
        emulating.library("bn_relu").bn_relu, emulating.dtype_name(x), shape_of(x),
        emulating.arrays(x, residual, y, mean, invstd, weight, bias, running_mean, running_var),
        ctypes.c_double(momentum), ctypes.c_double(eps), training, relu,
    )  # fmt: skip
    guard.check()
    return y, mean, invstd


def bn_relu_backward(dy, x, y, weight, bias, mean, invstd, training, relu, output_mask):
    guard = emulating.Guarded()
    dx, dr = (guard.empty_like(x) if wanted else None for wanted in output_mask[:2])
    dw, db = (guard.empty_like(mean) if output_mask[2] else None for _ in range(2))
    mask = NONE if not relu else FROM_INPUT if y is None else FROM_OUTPUT
    emulating.call(
        emulating.library("bn_relu").bn_relu_backward, emulating.dtype_name(x), shape_of(x),
        emulating.arrays(dy, x, y, dx, dr, mean, invstd, weight, bias, dw, db), mask, training,
    )  # fmt: skip
    guard.check()
    return dx, dr, dw, db


def operands_for(shape, dtype, layout, residual):
    vectors = batch_norm_operands(shape[1], arguments.accumulation_dtype(dtype))
    return {
        "input": spread(shape, dtype, layout, mean=0.5, std=1.5),
        "residual": spread(shape, dtype, layout) if residual else None,
        **vectors,
    }


def results(forward, backward, operands, grad, mask_from, training, relu, exact=False):
    """Everything that both directions give; ReLU's mask from the same data everywhere."""
    given = {
        k: v if v is None else (v.double() if exact else v).clone() for k, v in operands.items()
    }
    output, mean, invstd = forward(*given.values(), training, 0.3, 1e-5, relu)
    mask_from = None if mask_from is None else mask_from.to(output.dtype)
    gradients = backward(
        grad.to(output.dtype), given["input"], mask_from, given["weight"], given["bias"], mean,
        invstd, training, relu, [True, given["residual"] is not None, True],
    )  # fmt: skip
    names = ("grad_input", "grad_residual", "grad_weight", "grad_bias")
    found = {"output": output, "mean": mean, "invstd": invstd}
    found |= {k: given[k] for k in ("running_mean", "running_var")}
    return found | {
        k: v for k, v in zip(names, gradients, strict=True) if v is not None and v.numel()
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_reference(dtype, layout, residual, relu, training):
    for shape in SHAPES:
        operands = operands_for(shape, dtype, layout, residual)
        # the mask from the output: any data does, and none of it is rounded differently anywhere
        mask_from = spread(shape, dtype, layout) if relu else None
        grad = spread(shape, dtype, layout)
        how = (operands, grad, mask_from, training, relu)
        eager = (reference.bn_relu_forward, reference.bn_relu_backward)
        assert_rule(
            results(bn_relu, bn_relu_backward, *how),
            results(*eager, *how),
            results(*eager, *how, exact=True),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_relu_mask_is_the_forwards(dtype, layout):
    """Recomputed from the input in backward: it must be forward's, bit by bit."""
    for shape in SHAPES:
        operands = operands_for(shape, dtype, layout, residual=False)
        operands["weight"] *= 1e-3
        operands["bias"].zero_()
        y, mean, invstd = bn_relu(*operands.values(), False, 0.1, 1e-5, True)
        dx, *_ = bn_relu_backward(
            torch.ones_like(y), operands["input"], None, operands["weight"], operands["bias"], mean,
            invstd, False, True, [True, False, False],
        )  # fmt: skip
        assert torch.equal(dx != 0, y > 0)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("training", [True, False])
def test_only_what_is_asked_for(wanted, training):
    mask = [bool(wanted & bit) for bit in (1, 2, 4)]
    shape, dtype = (3, 16, 5, 8), torch.bfloat16
    x, dy, y = (spread(shape, dtype, "channels_last") for _ in range(3))
    v = batch_norm_operands(16, torch.float32)
    arguments = (
        dy,
        x,
        y,
        v["weight"],
        v["bias"],
        v["running_mean"],
        v["running_var"],
        training,
        True,
    )
    some, everything = (bn_relu_backward(*arguments, m) for m in (mask, [True] * 3))
    for i, tensor in enumerate(some):
        assert (tensor is not None) == mask[min(i, 2)]
        assert tensor is None or torch.equal(tensor, everything[i])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout):
    """The emulator resumes threads and runs blocks in another order each time."""
    operands = operands_for((3, 72, 12, 14), torch.bfloat16, layout, residual=True)
    grad, y = (spread((3, 72, 12, 14), torch.bfloat16, layout) for _ in range(2))
    runs = [results(bn_relu, bn_relu_backward, operands, grad, y, True, True) for _ in range(2)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("outlier", [None, 0.0, 3e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_survive_cancellation(layout, outlier):
    """Mean 1e4 and std 1 in fp32, and a first value far from all others."""
    x = spread((8, 8, 23, 24), torch.float32, layout, mean=1e4)
    if outlier is not None:
        x[0, :, 0, 0] = outlier
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, found_mean, found_invstd = bn_relu(x, None, None, None, None, None, True, 0.1, 1e-5, False)
    assert (found_mean - mean).abs().max() < 1e-3
    torch.testing.assert_close(found_invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_values(layout, value):
    for where in (0, 100):
        operands = operands_for((3, 8, 7, 8), torch.float32, layout, residual=False)
        operands["input"][where // 50, 3, where % 7, where % 8] = value
        eager = {k: v if v is None else v.clone() for k, v in operands.items()}
        found = bn_relu(*operands.values(), True, 0.1, 1e-5, True)
        expected = reference.bn_relu_forward(*eager.values(), True, 0.1, 1e-5, True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(operands[name], eager[name], equal_nan=True)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_relu(dtype, shift):
    """In packs, and value by value where the arrays are not aligned."""
    call = emulating.library("add_relu").add_relu
    for n in (1, 7, 8, 1000, 2053):
        a, b = (torch.randn(n + 1, dtype=torch.float64).to(dtype)[shift:][:n] for _ in range(2))
        a[0] = float("nan")
        guard = emulating.Guarded()
        out, grad = guard.empty_like(a), guard.empty_like(a)
        size = ctypes.c_int64(n)
        emulating.call(call, emulating.dtype_name(a), emulating.arrays(a, b, out), size, False)
        emulating.call(call, emulating.dtype_name(a), emulating.arrays(b, out, grad), size, True)
        guard.check()
        torch.testing.assert_close(out, F.relu(a + b), rtol=0, atol=0, equal_nan=True)
        expected = torch.ops.aten.threshold_backward(b, out, 0)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


def test_a_missing_barrier_is_seen():
    """The emulator itself: a kernel that needs a barrier is wrong without it and right with it, and
    a barrier that only half of the block reaches is a deadlock."""
    library = emulating.library("barriers")
    library.reversal.restype = ctypes.c_bool
    assert library.reversal(True, 1)
    assert not library.reversal(False, 1000)  # other values than those that lie there already
    library.half_of_a_block.restype = ctypes.c_char_p
    assert library.half_of_a_block() == b"deadlock"
    library.cluster.restype = ctypes.c_char_p
    assert library.cluster(True, True) == b"done"
    assert library.cluster(False, True) == b"deadlock"
    assert library.cluster(True, False) == b"that block has ended"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_and_output_apart_give_the_same_bits(layout, dtype):
    """As a chain has them: the statistics first, what they normalise later."""
    operands = operands_for((3, 72, 12, 14), dtype, layout, residual=True)
    x, residual, _, _, weight, bias = operands.values()
    none = (None, None)
    y, mean, invstd = bn_relu(x, residual, *none, weight, bias, True, 0.0, 1e-5, True)
    guard = emulating.Guarded()
    found = {"mean": guard.empty_like(mean), "invstd": guard.empty_like(invstd)}
    found["output"] = guard.empty_like(x)

    def half(output):
        emulating.call(
            emulating.library("bn_relu").bn_relu_half, emulating.dtype_name(x), shape_of(x),
            emulating.arrays(
                x, residual, output, found["mean"], found["invstd"], weight, bias
            ),
            ctypes.c_double(1e-5), True,
        )  # fmt: skip

    half(None)
    half(found["output"])
    guard.check()
    assert_same_bits(found, {"mean": mean, "invstd": invstd, "output": y})
