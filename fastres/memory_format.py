"""channels_last: the format in which convolutions and the fused operators are fastest on a CPU."""

import torch
from torch import Tensor

from . import checks
from .backend import serving


def has_channels_last_strides(image: Tensor) -> bool:
    """Also right where one channel or a 1x1 map is contiguous in either format."""
    return image.stride(1) == 1 and image.is_contiguous(memory_format=torch.channels_last)


def to_channels_last(image: Tensor) -> Tensor:
    """``image`` (N, C, H, W) in channels_last, by its strides too where C is 1."""
    n, c, h, w = image.shape
    if c == 1:  # contiguous in both formats: only the strides tell
        return image.contiguous().as_strided((n, c, h, w), (h * w, 1, w, 1))
    return image.contiguous(memory_format=torch.channels_last)


def fastest(image: Tensor) -> Tensor:
    """A model's input in the format that serves it fastest: channels_last where the CPU's own
    operators serve. A compiler chooses formats itself, and a GPU's caller knows theirs.

    Raises ``TypeError`` for what is no tensor."""
    checks.tensor("input", image)
    if (
        image.dim() != 4
        or not image.numel()
        or image.device.type != "cpu"
        or torch.compiler.is_compiling()
        or serving("conv_bn_relu", image.device) != "cpu"
        or has_channels_last_strides(image)
    ):
        return image
    return to_channels_last(image)
