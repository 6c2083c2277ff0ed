"""linear(mean(input over H and W)): agreement, memory formats, special values, what records it."""

import pytest
import torch
from agreement import (
    FLOATS,
    LAYOUTS,
    Calls,
    assert_like_eager,
    assert_rule,
    assert_same_bits,
    outcome,
    spread,
    widened,
)

from fastres import functional, ops, reference

# (N, C, H, W) and K: odd, of one channel, of one pixel, of more rows than the own product takes
SHAPES = [
    ((1, 3, 5, 7), 5), ((2, 37, 11, 13), 9), ((3, 1, 1, 1), 1), ((1, 130, 7, 7), 33),
    ((11, 67, 3, 2), 6),
]  # fmt: skip


def operands(shape, outputs, dtype=torch.float32, layout="channels_last", mean=0.0):
    return {
        "input": spread(shape, dtype, layout, mean),
        "weight": torch.randn(outputs, shape[1], dtype=torch.float64).to(dtype),
        "bias": torch.randn(outputs, dtype=torch.float64).to(dtype),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_eager(implementation, one_thread, dtype, layout):
    for shape, outputs in SHAPES:
        given = operands(shape, outputs, dtype, layout)
        for biased in (True, False):
            given["bias"] = given["bias"] if biased else None
            ours = outcome(functional.mean_linear, given)
            eager = outcome(reference.mean_linear, given)
            assert_rule(ours, eager, outcome(reference.mean_linear, widened(given)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_pixels_far_from_zero(dtype):
    given = operands((2, 5, 97, 89), 7, dtype, mean=100.0)
    ours, eager = (outcome(f.mean_linear, given) for f in (functional, reference))
    assert_rule(ours, eager, outcome(reference.mean_linear, widened(given)))


def test_the_operator_serves_without_a_graph_only():
    given = operands((2, 8, 3, 3), 4)
    with Calls() as calls:
        functional.mean_linear(**given)
    assert calls.names == ["mean_linear"]
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        assert functional.mean_linear(**given).dtype == torch.bfloat16
    assert not calls.names
    with Calls() as calls:
        ours = outcome(functional.mean_linear, given, torch.ones(2, 4))
    assert not calls.names
    assert_same_bits(ours, outcome(reference.mean_linear, given, torch.ones(2, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_behave_as_eager(implementation, dtype, value):
    for place in ("input", "weight", "bias"):
        given = operands((2, 21, 5, 3), 6, dtype)
        given[place].flatten()[7 % given[place].numel()] = value
        ours, eager = (outcome(f.mean_linear, given) for f in (functional, reference))
        assert_like_eager(ours, eager, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("shape", "outputs"), [((0, 3, 5, 7), 4), ((2, 0, 5, 7), 4), ((2, 3, 0, 7), 4), ((2, 3, 5, 7), 0)]
)  # fmt: skip
def test_empty_tensors(implementation, shape, outputs):
    given = operands(shape, outputs, layout="contiguous")
    expected = reference.mean_linear(**given)
    for call in (functional.mean_linear, ops.mean_linear):
        torch.testing.assert_close(call(*given.values()), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"input": torch.ones(2, 3)}, "input"),
        ({"weight": torch.ones(4, 7)}, "weight"),
        ({"weight": torch.ones(8)}, "weight"),
        ({"weight": torch.ones(4, 8).double()}, "weight"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"bias": torch.ones(4).bfloat16()}, "bias"),
    ],
)
def test_errors_name_the_argument(implementation, changes, argument):
    given = operands((2, 8, 3, 3), 4) | changes
    for call in (functional.mean_linear, ops.mean_linear):
        with pytest.raises((RuntimeError, ValueError), match=f"^{argument}: expected"):
            call(*given.values())


def test_deterministic_and_independent_of_threads(threads):
    given = operands((3, 515, 7, 7), 131)
    threads(2)
    first = outcome(functional.mean_linear, given)
    assert_same_bits(first, outcome(functional.mean_linear, given))
    threads(1)
    assert_same_bits(first, outcome(functional.mean_linear, given))


def test_opcheck():
    for layout in ("contiguous", "channels_last"):
        given = operands((2, 8, 3, 3), 4, layout=layout)
        torch.library.opcheck(ops.mean_linear, tuple(given.values()))
