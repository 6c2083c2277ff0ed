"""Batch norm, optional residual, optional ReLU: agreement, statistics, special values."""

import functools

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

from fastres import functional, ops, reference

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 5), (3, 1, 1, 1), (7, 19, 1, 1), (3, 37, 11, 13)]
VARIANTS = [  # residual, relu
    pytest.param(False, True, id="bn_relu"),
    pytest.param(True, True, id="bn_add_relu"),
    pytest.param(False, False, id="bn"),
    pytest.param(True, False, id="bn_add"),
]
NARROW = (torch.bfloat16, torch.float16)


def ours(
    input,
    residual=None,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    **how,
):
    how = {"training": False, "momentum": 0.1, "eps": 1e-5, "relu": True} | how
    return functional.batch_norm(
        input, residual, running_mean, running_var, weight, bias, *how.values()
    )


def eager(
    input,
    residual=None,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    **how,
):
    relu = how.pop("relu", True)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, **how)
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output


def operands_for(shape, dtype, layout, residual, mixed=False):
    return {
        "input": spread(shape, dtype, layout, mean=0.5, std=1.5),
        "residual": spread(shape, dtype, layout) if residual else None,
        **batch_norm_operands(shape[1], torch.float32 if mixed else dtype),
    }


def check(operands, **how):
    """The error rule for output, gradients and running statistics of one call."""
    exact = widened(operands)
    dtype = operands["input"].dtype
    before_relu = eager(**exact | {k: exact[k].clone() for k in ("running_mean", "running_var")},
                        **how | {"relu": False})  # fmt: skip
    grad = away_from_zero(spread(before_relu.shape, dtype), before_relu).to(dtype)
    results = [
        outcome(functools.partial(function, **how), given, grad)
        for function, given in ((ours, operands), (eager, operands), (eager, exact))
    ]
    assert_rule(*results)


@pytest.mark.parametrize("residual, relu", VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_eager(implementation, one_thread, dtype, layout, training, residual, relu):
    for shape in SHAPES:
        for mixed in {False, dtype in NARROW}:
            check(
                operands_for(shape, dtype, layout, residual, mixed),
                training=training,
                relu=relu,
            )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_where_the_work_is_split(threads, dtype, layout, residual):
    threads(2)
    for shape in [(5, 67, 23, 29), (1, 2, 251, 257), (3, 1031, 7, 5)]:
        check(operands_for(shape, dtype, layout, residual, mixed=True), training=True)
        check(operands_for(shape, dtype, layout, residual, mixed=True), training=False)


@pytest.mark.parametrize("how", [
    {"running_mean": None, "running_var": None},  # track_running_stats=False
    {"weight": None, "bias": None},  # affine=False
    {"weight": None},
    {"bias": None},
], ids=lambda how: ",".join(how))  # fmt: skip
@pytest.mark.parametrize("residual", [False, True])
def test_absent_vectors(implementation, how, residual):
    operands = operands_for((3, 5, 7, 11), torch.float32, "channels_last", residual) | how
    exact = widened(operands)
    grad = spread((3, 5, 7, 11), torch.float32)
    # a margin is not needed here: no pre-activation of this seed is closer to zero than 1e-4
    for training in {True, "running_mean" in how}:
        results = [
            outcome(functools.partial(function, training=training), given, grad.to(g_dtype))
            for function, given, g_dtype in (
                (ours, operands, torch.float32),
                (eager, operands, torch.float32),
                (eager, exact, torch.float64),
            )
        ]
        assert_rule(*results)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_momentum_and_eps(implementation, momentum, eps):
    operands = operands_for((3, 5, 7, 11), torch.float32, "contiguous", True)
    check(operands, training=True, momentum=momentum, eps=eps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outlier_first", [False, True])
def test_statistics_survive_cancellation(implementation, layout, outlier_first):
    """Mean 1e4 and std 1 in fp32: E[x^2] - E[x]^2 would lose every digit (1e8 * 6e-8 = 6), and so
    would a shift by the first value where that is far from the rest."""
    input = spread((8, 19, 23, 29), torch.float32, layout, mean=1e4)
    if outlier_first:
        input[0, :, 0, 0] = 0.0
        input = torch.cat((input, spread((64, 19, 23, 29), torch.float32, layout, mean=1e4)))
    variance, mean = torch.var_mean(input.double(), (0, 2, 3), correction=0)
    output, save_mean, save_invstd = ops.bn_relu(
        input, None, None, None, None, None, True, 0.1, 1e-5, False
    )
    exact = F.batch_norm(input.double(), None, None, training=True)
    # a unit in the last place of the mean is 1e-3; four of them, of std 1
    assert (save_mean - mean).abs().max() < 4e-3
    torch.testing.assert_close(save_invstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    assert (output - exact).abs().max() < 8e-3


def test_cancellation_is_no_worse_than_eager(implementation):
    operands = operands_for((8, 19, 23, 29), torch.float32, "contiguous", False)
    operands["input"] = operands["input"] + 1e4
    operands |= {"running_mean": torch.full((19,), 1e4), "running_var": torch.ones(19)}
    results = [
        outcome(functools.partial(function, training=True, relu=False), given)
        for function, given in (
            (ours, operands),
            (eager, operands),
            (eager, widened(operands)),
        )
    ]
    # a unit in the last place of the *input* is what any fp32 mean is uncertain by
    assert_rule(*results, scale=1e4 / 8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_and_independent_of_threads(threads, dtype, training, layout):
    for shape in [(5, 67, 23, 29), (2, 3, 117, 119), (3, 1031, 5, 7)]:
        operands = operands_for(shape, dtype, layout, True, mixed=True)
        grad = spread(shape, dtype, layout)
        call = functools.partial(ours, training=training)
        threads(2)
        first = outcome(call, operands, grad)
        assert_same_bits(first, outcome(call, operands, grad))
        threads(1)
        assert_same_bits(first, outcome(call, operands, grad))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_relu_mask_is_the_forwards(training, layout):
    """Without a residual the backward recomputes the mask: it must be the forward's, bit by bit.

    Tiny scales put every pre-activation next to zero, where another order of operations differs.
    """
    for dtype in (torch.float32, torch.bfloat16):
        shape = (7, 31, 17, 19)
        operands = operands_for(shape, dtype, layout, False, mixed=True)
        operands["weight"] = operands["weight"] * 1e-3
        operands["bias"] = torch.zeros(31)
        results = outcome(
            functools.partial(ours, training=False),
            operands,
            torch.ones(shape, dtype=dtype),
        )
        assert torch.equal(results["grad of input"] != 0, results["output"] > 0)
        if training:
            input, weight, bias = (operands[k] for k in ("input", "weight", "bias"))
            output, mean, invstd = ops.bn_relu(
                input, None, None, None, weight, bias, True, 0.1, 1e-5, True
            )
            grad_bias = ops.bn_relu_backward(
                torch.ones_like(input), input, None, weight, bias, mean, invstd, True, True,
                [False, False, True],
            )[3]  # fmt: skip
            assert torch.equal(grad_bias, (output > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_special_values_behave_as_eager(implementation, training, residual):
    operands = operands_for((3, 7, 5, 5), torch.float32, "contiguous", residual)
    operands["input"][0, 1, 2, 3] = float("nan")
    operands["input"][0, 2, 2, 3] = float("inf")
    operands["input"][0, 3, 2, 3] = -float("inf")
    operands["weight"][4] = float("nan")
    operands["bias"][5] = float("inf")
    operands["running_var"][6] = -1.0  # the square root of a negative number
    grad = torch.ones(3, 7, 5, 5)
    results = [
        outcome(functools.partial(function, training=training), operands, grad)
        for function in (ours, eager)
    ]
    assert_like_eager(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7)])
def test_empty_batches_behave_as_eager(shape, training):
    operands = operands_for(shape, torch.float32, "contiguous", True)
    results = []
    for function in (ours, eager):
        try:
            results.append(
                outcome(
                    functools.partial(function, training=training),
                    operands,
                    torch.ones(shape),
                )
            )
        except (RuntimeError, ValueError, IndexError) as error:
            results.append(type(error))
    if isinstance(results[1], type):
        assert results[0] is results[1]
    else:
        assert_like_eager(*results)


@pytest.mark.parametrize("residual_layout", ["contiguous", "sliced_last", "expanded"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_operands_of_different_layouts(implementation, layout, residual_layout):
    shape = (3, 5, 7, 11)
    operands = operands_for(shape, torch.float32, layout, True)
    operands["residual"] = spread(shape, torch.float32, residual_layout)
    check(operands, training=True)
    check(operands, training=False)
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert ours(**operands).is_contiguous(memory_format=expected)


def test_gradient_of_a_sum(implementation):
    """``sum().backward()`` hands an expanded gradient, every stride 0, to the backward."""
    operands = operands_for((3, 5, 7, 11), torch.float64, "channels_last", True)
    grad = torch.ones((), dtype=torch.float64).expand(3, 5, 7, 11)
    call, plain = (functools.partial(f, training=True) for f in (ours, eager))
    assert_like_eager(outcome(call, operands, grad), outcome(plain, operands, grad), 1e-9, 1e-9)


def test_residual_may_be_the_input():
    shape = (3, 5, 7, 11)
    operands = operands_for(shape, torch.float64, "contiguous", False)
    gradients = []
    for function in (ours, eager):
        input = operands["input"].clone().requires_grad_()
        given = operands | {"input": input, "residual": input}
        function(**given, training=True).square().sum().backward()
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients)


def test_saved_mean_is_no_alias_of_the_running_mean(implementation):
    """A later update of the running statistics must not reach into an earlier call's backward."""
    operands = operands_for((3, 5, 7, 11), torch.float32, "contiguous", False)
    vectors = [operands[name] for name in ("running_mean", "running_var", "weight", "bias")]
    before = [vector.clone() for vector in vectors]
    _, mean, _ = ops.bn_relu(operands["input"], None, *vectors, False, 0.1, 1e-5, True)
    assert mean.data_ptr() != vectors[0].data_ptr()
    assert torch.equal(mean, before[0])
    for vector, was in zip(vectors, before, strict=True):
        assert torch.equal(vector, was), "eval changed a buffer or parameter"


@pytest.mark.parametrize("mask", [
    (True, True, True), (True, False, False), (False, True, False), (False, False, True),
    (False, True, True), (False, False, False),
])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_unwanted_gradients_are_empty(implementation, mask, training):
    operands = operands_for((3, 5, 7, 11), torch.bfloat16, "channels_last", True, mixed=True)
    input, weight, bias = (operands[name] for name in ("input", "weight", "bias"))
    output, mean, invstd = ops.bn_relu(*operands.values(), training, 0.1, 1e-5, True)
    grad = spread((3, 5, 7, 11), torch.bfloat16)
    rest = (output, weight, bias, mean, invstd, training, True)
    everything = ops.bn_relu_backward(grad, input, *rest, [True, True, True])
    some = ops.bn_relu_backward(grad, input, *rest, list(mask))
    wanted = (mask[0], mask[1], mask[2], mask[2])
    for given, full, want in zip(some, everything, wanted, strict=True):
        assert given.dtype == full.dtype
        if want:
            torch.testing.assert_close(given, full, rtol=0, atol=0)
        else:
            assert given.shape == (0,)


def test_statistics_are_kept_in_fp32():
    """Not rounded to bf16 on the way, whatever the activations are."""
    operands = operands_for((5, 7, 31, 29), torch.bfloat16, "contiguous", False, mixed=True)
    _, mean, invstd = ops.bn_relu(*operands.values(), True, 1.0, 1e-30, True)
    assert mean.dtype == invstd.dtype == torch.float32
    variance, exact = torch.var_mean(operands["input"].double(), (0, 2, 3), correction=0)
    assert_close(mean, mean, exact, "mean", scale=4)
    assert_close(invstd, invstd, variance.rsqrt(), "invstd", scale=4)
    unbiased = variance * (5 * 31 * 29) / (5 * 31 * 29 - 1)
    torch.testing.assert_close(operands["running_mean"].double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(operands["running_var"].double(), unbiased, rtol=1e-6, atol=1e-6)


def test_frozen_parameters_cost_nothing():
    """needs_input_grad reaches the operator: neither sums nor an input gradient are computed."""
    operands = operands_for((3, 5, 7, 11), torch.float32, "contiguous", True)
    for needed, mask in [
        (("input",), [True, False, False]),
        (("residual",), [False, True, False]),
        (("weight",), [False, False, True]),
        (("bias",), [False, False, True]),
        (("input", "bias"), [True, False, True]),
    ]:
        leaves = {name: t.clone().requires_grad_(name in needed) for name, t in operands.items()}
        with Calls() as calls:
            ours(**leaves, training=True).sum().backward()
        assert calls.names == ["bn_relu", "bn_relu_backward"]
        assert calls.made[1][1][-1] == mask, needed
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in needed)


def test_names_and_order_are_those_of_batch_norm():
    """The public functions take F.batch_norm's arguments by position."""
    operands = operands_for((3, 5, 7, 11), torch.float64, "contiguous", True)
    input, residual, mean, var, weight, bias = operands.values()
    rest = (mean, var, weight, bias, False, 0.1, 1e-3)
    expected = F.batch_norm(input, *rest)
    torch.testing.assert_close(functional.bn_relu(input, *rest), expected.relu())
    torch.testing.assert_close(
        functional.bn_add_relu(input, residual, *rest), (expected + residual).relu()
    )
    torch.testing.assert_close(reference.bn_relu(input, *rest), expected.relu())
    torch.testing.assert_close(
        reference.bn_add_relu(input, residual, *rest), (expected + residual).relu()
    )
