"""The convolution and its gradients as operators: by Triton's kernels or the vendor's, see
``conv_choice``. ``wrap`` is applied to every kernel: ``torch.library.wrap_triton`` makes the launch
visible to a graph that is being traced.
"""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import conv_choice
from .conv_dgrad import dgrad
from .conv_fprop import fprop
from .conv_shape import output_map
from .conv_wgrad import wgrad


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int,
    wrap=lambda kernel: kernel,
) -> Tensor:  # fmt: skip
    """``F.conv2d``."""
    window = (stride, padding, dilation, groups)
    if not serves_forward("conv", input, weight, *window):
        return torch.nn.functional.conv2d(input, weight, bias, *window)
    return fprop(input, weight, *window, bias=bias, allow_tf32=allows_tf32(input), wrap=wrap)[0]


def conv_dgrad(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride, padding, dilation, groups: int,
    wrap=lambda kernel: kernel,
) -> Tensor:  # fmt: skip
    """The gradient of the input."""
    window = (stride, padding, dilation, groups)
    tf32 = allows_tf32(input)
    if not conv_choice.serves(
        "dgrad", grad_output, weight.shape, stride, dilation, groups,
        last=conv_choice.is_last(input), most_pixels=most_pixels(input, grad_output),
        allow_tf32=tf32,
    ):  # fmt: skip
        mask = [True, False, False]
        found = _vendors_gradients(grad_output, input, weight, *window, mask)[0]
        return _laid_out_as(input, found, suggest_memory_format(input))
    return dgrad(grad_output, weight, input.shape, *window, allow_tf32=tf32, wrap=wrap)[0]


def conv_wgrad(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride, padding, dilation, groups: int,
    output_mask: list[bool], wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of weight and bias; one that ``output_mask`` does not ask for is empty."""
    window = (stride, padding, dilation, groups)
    want_weight, want_bias = output_mask
    tf32 = allows_tf32(input)
    own = want_weight and conv_choice.serves(
        "wgrad", input, weight.shape, stride, dilation, groups,
        last=conv_choice.is_last(input, grad_output),
        most_pixels=most_pixels(input, grad_output), allow_tf32=tf32,
    )  # fmt: skip
    found = None
    if own:
        found = wgrad(grad_output, input, weight.shape, *window, allow_tf32=tf32, wrap=wrap)
    elif want_weight:
        mask = [False, True, False]
        found = _vendors_gradients(grad_output, input, weight, *window, mask)[1]
    return wgrad_of(weight, found, grad_output, want_bias)


def wgrad_of(
    weight: Tensor, found: Tensor | None, grad_output: Tensor, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """``found``, the gradient of the weight or None, as the operator gives it, and that of the bias."""
    grad_weight = weight.new_empty(0) if found is None else _laid_out_as(weight, found)
    return grad_weight, grad_output.sum((0, 2, 3)) if want_bias else weight.new_empty(0)


def serves_forward(
    what: str, input: Tensor, weight: Tensor, stride, padding, dilation, groups: int
) -> bool:
    """``conv_choice.serves`` for a pass that gives the convolution's output."""
    rows, columns = output_map(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    pixels = input.shape[0] * max(rows * columns, input.shape[2] * input.shape[3])
    return conv_choice.serves(
        what, input, weight.shape, stride, dilation, groups,
        last=conv_choice.is_last(input, weight), most_pixels=pixels, allow_tf32=allows_tf32(input),
    )  # fmt: skip


def allows_tf32(tensor: Tensor) -> bool:
    """As PyTorch's own convolutions of float32 do."""
    return tensor.device.type == "cuda" and torch.backends.cudnn.allow_tf32


def most_pixels(*maps: Tensor) -> int:
    return max(tensor.shape[0] * tensor.shape[2] * tensor.shape[3] for tensor in maps)


def _vendors_gradients(grad_output, input, weight, stride, padding, dilation, groups, mask):
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )


def _laid_out_as(
    like: Tensor, found: Tensor, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """``found``, copied where an empty tensor like ``like`` would lie otherwise in memory: formats
    of input, weight and gradient may differ, and a compiler must know what comes."""
    empty = torch.empty_like(like, memory_format=memory_format)
    return found if empty.stride() == found.stride() else empty.copy_(found)
