"""The weight's gradient: PyTorch's, the operator's, and how far they may be apart."""

import torch
from agreement import assert_close
from torch import Tensor

from fastres import ops


def eager(grad: Tensor, input: Tensor, weight: Tensor, padding: int, stride=1) -> Tensor:
    geometry = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, *geometry, [False, True, False]
    )[1]


def wgrad(grad: Tensor, input: Tensor, weight: Tensor, padding: int, stride=1, bias=False):
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1)
    results = ops.conv_wgrad(grad, input, weight, *geometry, [True, bias])
    return results if bias else results[0]


def algorithm_of(grad, input, weight, padding: int, stride=1, dilation=1) -> str:
    return ops.extension.conv_wgrad_algorithm(grad, input, weight, stride, padding, dilation)


def assert_agrees(ours: Tensor, grad, input, weight, padding: int, stride=1) -> None:
    truth = eager(grad.double(), input.double(), weight.double(), padding, stride)
    expected = eager(grad, input, weight, padding, stride)
    if not expected.isfinite().all():
        # oneDNN's in bfloat16, of maps one pixel wide at stride 2 and 3: uninitialised memory
        expected = truth.to(expected.dtype)
    # one long sum, in another order than eager's
    assert_close(ours, expected, truth, scale=4)
