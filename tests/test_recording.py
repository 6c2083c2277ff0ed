"""What the operators save for backward, what backward computes of it, and who has recorded it: the
nodes of ``csrc/autograd.cpp`` or the functions of ``fastres/autograd.py``."""

import pytest
import torch
from agreement import Calls, spread

from fastres import functional, ops

pytestmark = pytest.mark.usefixtures("one_thread")


def one_call(name):
    """An operator in training: its call, and its leaves by name."""
    leaves = {"input": spread((2, 3, 5, 4), torch.float32), "weight": torch.randn(3),
              "bias": torch.randn(3), "filters": spread((3, 3, 3, 3), torch.float32),
              "residual": spread((2, 3, 5, 4), torch.float32)}  # fmt: skip
    calls = {
        "add_relu": (functional.add_relu, "input residual"),
        "bn_relu": (
            lambda x, w, b: functional.bn_relu(x, None, None, w, b, training=True),
            "input weight bias",
        ),
        "bn_add_relu": (
            lambda x, r, w, b: functional.bn_add_relu(x, r, None, None, w, b, training=True),
            "input residual weight bias",
        ),
        "conv_bn": (
            lambda x, f, w, b: functional.conv_bn(
                x, f, None, 1, 1, bn_weight=w, bn_bias=b, training=True
            ),
            "input filters weight bias",
        ),
    }
    call, operands = calls[name]
    return call, {k: leaves[k].requires_grad_() for k in operands.split()}


SAVED = {  # maps and filters; vectors are not worth counting
    "add_relu": ["output"], "bn_relu": ["input"], "bn_add_relu": ["input", "output"],
    "conv_bn": ["input", "filters", "convolved"],
}  # fmt: skip
one_by_one = pytest.mark.parametrize("name", SAVED)


@one_by_one
def test_saved_tensors_pass_through_hooks(recorder, name):
    """A hook may move what is saved elsewhere; no map is saved that backward does not read."""
    packed = []

    def pack(tensor):
        packed.append(tensor.dim())
        return tensor.detach().clone(), tensor.requires_grad

    call, leaves = one_call(name)
    expected = torch.autograd.grad(call(*leaves.values()).square().sum(), [*leaves.values()])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0]):
        output = call(*leaves.values())
    assert packed.count(4) == len(SAVED[name])
    ours = torch.autograd.grad(output.square().sum(), [*leaves.values()])
    assert all(map(torch.equal, ours, expected))


@one_by_one
def test_a_saved_tensor_that_changed_is_not_used(recorder, name):
    for changed in {"input", "filters", "output"} & set(SAVED[name]):
        call, leaves = one_call(name)
        leaves = {k: leaf * 1 for k, leaf in leaves.items()}  # no leaves: they may be written
        output = call(*leaves.values())
        with torch.no_grad():
            (output if changed == "output" else leaves[changed]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@one_by_one
def test_a_graph_is_freed_by_backward(recorder, name):
    call, leaves = one_call(name)
    loss = call(*leaves.values()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("wanted", ["input", "filters", "weight"])
def test_only_what_is_asked_for_is_computed(recorder, wanted):
    """``torch.autograd.grad`` for one of the tensors that ask for gradients."""
    call, leaves = one_call("conv_bn")
    output = call(*leaves.values())
    with Calls() as calls:
        torch.autograd.grad(output.square().sum(), leaves[wanted])
    masks = [arguments[-1] for name, arguments in calls.made if name == "bn_relu_backward"]
    if recorder == "extension":  # Python's functions do not know what a call asks for
        assert masks == [[wanted != "weight", False, wanted == "weight"]]
        assert ("conv_wgrad" in calls.names) == (wanted == "filters")


@pytest.mark.skipif(ops.extension is None, reason="the compiled extension is not installed")
def test_the_extension_records_plain_calls():
    for name in SAVED:
        call, leaves = one_call(name)
        expected = "AddReluBackward" if name == "add_relu" else "BnReluBackward"
        assert call(*leaves.values()).grad_fn.name() == expected
        with torch.no_grad():
            assert call(*leaves.values()).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        output = call(*leaves.values())
    assert output.grad_fn.name() == "BnReluBackward" and output.dtype == torch.bfloat16


@one_by_one
def test_an_error_in_a_hook_is_the_callers(recorder, name):
    class Full(Exception):
        pass

    def pack(tensor):
        raise Full

    call, leaves = one_call(name)
    with pytest.raises(Full), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        call(*leaves.values())


def test_parameters_of_another_dtype_get_gradients_of_theirs(recorder):
    x = torch.randn(2, 3, 5, 4, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3).bfloat16().requires_grad_()
    functional.bn_relu(x, None, None, weight, bias, training=True).sum().backward()
    assert [t.grad.dtype for t in (x, weight, bias)] == [t.dtype for t in (x, weight, bias)]
