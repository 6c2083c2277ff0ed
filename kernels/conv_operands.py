"""What the convolutions' launchers share: operands brought to channels_last, grids, precision."""

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .conv_shape import pad_channels


class Affine(NamedTuple):
    """Per channel, ``(x - mean) * scale + shift``: a batch norm with ``scale = weight * invstd``
    and ``shift = bias``. Without ``mean`` it counts as 0."""

    mean: Tensor | None  # (C,)
    scale: Tensor  # (C,)
    shift: Tensor  # (C,)


class Norm(NamedTuple):
    """Per channel, ``(x - mean) * scale / sqrt(variance + eps) + shift``: a batch norm in eval."""

    mean: Tensor  # (K,)
    variance: Tensor  # (K,)
    scale: Tensor | None  # (K,)
    shift: Tensor | None  # (K,)
    eps: float


def last(tensor: Tensor | None) -> Tensor | None:
    """In channels_last."""
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def few(operand, flat: int):
    """channels_last, and padded to ``flat`` channels unless that is 0."""
    if not flat or operand is None:
        return last(operand) if isinstance(operand, Tensor) else operand
    if isinstance(operand, Affine):
        return Affine(*(v if v is None else pad_channels(v, flat) for v in operand))
    return last(pad_channels(operand, flat))


def empty_last(like: Tensor, size, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        tuple(size), dtype=dtype or like.dtype, device=like.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def vectors(like: Tensor, count: int, *size: int) -> list[Tensor]:
    return [like.new_empty(size, dtype=torch.float32) for _ in range(count)]


def grid(rows: int, groups: int, columns: int):
    """A program for every tile."""

    def programs(meta):
        tiles = groups * triton.cdiv(columns, meta["BLOCK_N"])
        return (triton.cdiv(rows, meta["BLOCK_M"]) * tiles,)

    return programs


def precision(allow_tf32: bool) -> str:
    """Of fp32 products; narrower types are exact either way."""
    return "tf32" if allow_tf32 else "ieee"


def on(tensor: Tensor):
    """Triton launches on the current device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
