"""``relu(input + residual)`` and its gradient: one pass each, 16-byte accesses.

Launchers run on the current device and stream. ``wrap`` is applied to every kernel:
``torch.library.wrap_triton`` makes the launch visible to a graph that is being traced.
"""

import triton
import triton.language as tl
from torch import Tensor

from .layout import VALUES, Layout


@triton.jit
def add_relu_kernel(input, residual, output, size, BLOCK: tl.constexpr):
    # 64 bits only for where the block begins: inside it, 32 are enough
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    mask = inside < size - begin
    acc = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    a = tl.load(input + begin + inside, mask=mask).to(acc)
    b = tl.load(residual + begin + inside, mask=mask).to(acc)
    total = a + b
    total = tl.where(total <= 0, 0, total)  # NaN stays
    tl.store(output + begin + inside, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def add_relu_backward_kernel(grad_output, output, grad, size, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    mask = inside < size - begin
    g = tl.load(grad_output + begin + inside, mask=mask)
    y = tl.load(output + begin + inside, mask=mask)
    tl.store(grad + begin + inside, tl.where(y <= 0, 0, g), mask=mask)


def add_relu(input: Tensor, residual: Tensor, wrap=lambda kernel: kernel) -> Tensor:
    """``relu(input + residual)``, in the memory format of ``input``."""
    layout = Layout.of(input)
    output = layout.empty(input)
    size = output.numel()
    wrap(add_relu_kernel)[(triton.cdiv(size, VALUES),)](
        layout.dense(input), layout.dense(residual), output, size, BLOCK=VALUES
    )
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor, wrap=lambda kernel: kernel) -> Tensor:
    """``grad_output`` where ``output`` is not 0 or less, else 0: the gradient of both summands."""
    layout = Layout.of(output)
    grad = layout.empty(output)
    size = grad.numel()
    wrap(add_relu_backward_kernel)[(triton.cdiv(size, VALUES),)](
        layout.dense(grad_output), layout.dense(output), grad, size, BLOCK=VALUES
    )
    return grad
