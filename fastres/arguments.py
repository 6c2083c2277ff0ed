"""How a convolution's arguments are read: pairs, named paddings, output sizes, autocast's dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(name: str, value) -> tuple[int, int]:
    """``value`` for both map dimensions, as F.conv2d takes it: an int, or a sequence of 1 or 2."""
    if isinstance(value, int):
        return (value, value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected an int or a pair of them, got {value!r}")
    if len(value) not in (1, 2):
        raise RuntimeError(f"{name}: expected an int or a pair of them, got {tuple(value)}")
    return tuple(value) * (3 - len(value))


def resolve_padding(padding, weight: Tensor, stride, dilation) -> tuple[int, int]:
    """``padding`` as a pair; F.conv2d's "valid" and "same" are understood.

    "same" needs stride 1 and, here, an odd dilated extent (else the padding is not symmetric).
    """
    if not isinstance(padding, str):
        return pair("padding", padding)
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        raise ValueError(f"padding: expected numbers, 'valid' or 'same', got {padding!r}")
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    if stride != (1, 1):
        raise RuntimeError(f"padding: 'same' expects stride 1, got {stride}")
    extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(extent % 2 for extent in extents):
        raise ValueError(
            "padding: 'same' expects an odd kernel extent, got kernel "
            f"{tuple(weight.shape[2:])} with dilation {dilation}"
        )
    return (extents[0] // 2, extents[1] // 2)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype a convolution of ``input`` runs in: autocast's where it is on (never for fp64)."""
    kind = input.device.type
    floating = input.is_floating_point() and input.dtype != torch.float64
    # PyTorch tells of real devices only
    if floating and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return input.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: what statistics and parameters are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def conv_output_size(input_size, weight_size, stride, padding, dilation) -> tuple[int, ...]:
    """Size ``(N, K, P, Q)`` of a 2-d convolution's output; P = (H + 2p - d(R-1) - 1) // s + 1."""
    maps = (
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(
            input_size[2:], weight_size[2:], stride, padding, dilation, strict=True
        )
    )
    return (input_size[0], weight_size[0], *maps)
