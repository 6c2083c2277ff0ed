"""relu(input + residual): agreement, gradients, memory formats, special values."""

import pytest
import torch
from agreement import (
    FLOATS,
    LAYOUTS,
    Calls,
    assert_like_eager,
    assert_rule,
    assert_same_bits,
    away_from_zero,
    outcome,
    spread,
    widened,
)

from fastres import functional, ops, reference

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 1, 11, 13), (5, 17, 1, 1), (2, 37, 11, 13)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_eager(implementation, one_thread, dtype, layout, residual_layout):
    for shape in SHAPES:
        operands = {
            "input": spread(shape, dtype, layout),
            "residual": spread(shape, dtype, residual_layout),
        }
        exact = widened(operands)
        grad = away_from_zero(
            spread(shape, dtype, residual_layout), exact["input"] + exact["residual"]
        )
        ours = outcome(functional.add_relu, operands, grad)
        eager = outcome(reference.add_relu, operands, grad)
        assert_rule(ours, eager, outcome(reference.add_relu, exact, grad.double()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_last"])
def test_output_keeps_the_memory_format_of_input(implementation, layout):
    input = spread((2, 3, 5, 7), torch.float32, layout)
    other = spread(
        (2, 3, 5, 7),
        torch.float32,
        "contiguous" if "last" in layout else "channels_last",
    )
    last = layout in ("channels_last", "sliced_last")
    expected = torch.channels_last if last else torch.contiguous_format
    output = functional.add_relu(input, other)
    assert output.is_contiguous(memory_format=expected)
    assert ops.add_relu_backward(other, output).is_contiguous(memory_format=expected)


def test_gradient_of_a_sum(implementation):
    """``sum().backward()`` hands an expanded gradient, every stride 0, to the backward."""
    input, residual = (spread((2, 3, 5, 7)).requires_grad_() for _ in range(2))
    output = functional.add_relu(input, residual)
    output.sum().backward()
    assert torch.equal(input.grad, (output > 0).double())
    assert torch.equal(residual.grad, input.grad)
    assert input.grad is not residual.grad
    assert input.grad.data_ptr() != residual.grad.data_ptr(), "accumulated in place, would collide"


def test_both_operands_may_be_one_tensor(implementation):
    input = spread((2, 3, 5, 7)).requires_grad_()
    functional.add_relu(input, input).sum().backward()
    assert torch.equal(input.grad, 2 * (input > 0).double())


def test_special_values_behave_as_eager(implementation):
    special = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, -1e38, 3e38]
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        operands = {
            "input": special.to(dtype).view(1, 1, 8, 1).expand(2, 3, 8, 8).contiguous(),
            "residual": special.to(dtype).view(1, 1, 1, 8).expand(2, 3, 8, 8).contiguous(),
        }
        grad = torch.ones(2, 3, 8, 8, dtype=dtype)
        ours = outcome(functional.add_relu, operands, grad)
        eager = outcome(reference.add_relu, operands, grad)
        assert_like_eager(ours, eager, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
def test_empty_tensors(implementation, shape):
    operands = {"input": torch.empty(shape), "residual": torch.empty(shape)}
    results = outcome(functional.add_relu, operands, torch.empty(shape))
    assert all(result.shape == shape for result in results.values())
    output = ops.add_relu(*operands.values())
    assert ops.add_relu_backward(output, output).shape == shape


def test_only_needed_gradients_are_given():
    input, residual = spread((2, 3, 5, 7)).requires_grad_(), spread((2, 3, 5, 7))
    with Calls() as calls:
        functional.add_relu(input, residual).sum().backward()
    assert calls.names == ["add_relu", "add_relu_backward"]
    assert input.grad is not None and residual.grad is None
    with Calls() as calls:
        assert not functional.add_relu(input.detach(), residual).requires_grad
    assert calls.names == ["add_relu"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_deterministic_and_independent_of_threads(threads, layout):
    shape = (3, 67, 43, 41)  # odd, and large enough to be split between threads
    operands = {name: spread(shape, torch.float32, layout) for name in ("input", "residual")}
    grad = spread(shape, torch.float32, layout)
    threads(2)
    first = outcome(functional.add_relu, operands, grad)
    assert torch.equal(first["output"], reference.add_relu(**operands))
    assert_same_bits(first, outcome(functional.add_relu, operands, grad))
    threads(1)
    assert_same_bits(first, outcome(functional.add_relu, operands, grad))
