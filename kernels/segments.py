"""Merging what tiles or splits found, in their order: no atomics, so two runs give the same bits."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The finishing kernels have few programs, each walking all segments of its channels: a map of
# 800,000 pixels leaves 6,272 tiles, so parts of them are merged side by side first.
MANY = 256


class Moments(NamedTuple):
    """Of segments of a batch: mean, sum of squared deviations from it, number of values."""

    means: Tensor  # (segments, C)
    squares: Tensor  # (segments, C)
    counts: Tensor  # (segments,)

    @classmethod
    def empty(cls, like: Tensor, segments: int, channels: int, dtype=torch.float32) -> "Moments":
        sizes = (segments, channels), (segments, channels), (segments,)
        return cls(*(like.new_empty(size, dtype=dtype) for size in sizes))


@triton.jit
def merge_moments_kernel(
    means,  # (segments, C)
    squares,  # (segments, C)
    counts,  # (segments,)
    merged_means,  # (parts, C)
    merged_squares,  # (parts, C)
    merged_counts,  # (parts,)
    segments,
    channels,
    PART: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """PART segments into one (Chan, Golub, LeVeque 1979)."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment = part * PART + tl.arange(0, PART)
    known = (segment < segments)[:, None] & (channel < channels)[None, :]
    offset = segment[:, None] * channels + channel[None, :]
    n = tl.load(counts + segment, mask=segment < segments, other=0)
    each = tl.load(means + offset, mask=known, other=0)
    # weights that sum to 1, around the first mean: 1e4 +- 1 loses nothing
    pivot = tl.load(means + part * PART * channels + channel, mask=channel < channels, other=0)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0)
    count = tl.sum(n, 0)
    weight = n / count
    apart = tl.where(known, each - pivot[None, :], 0)
    mean = pivot + tl.sum(apart * weight[:, None], 0)
    delta = tl.where(known, each - mean[None, :], 0)
    square = tl.load(squares + offset, mask=known, other=0) + delta * delta * n[:, None]
    place = part * channels + channel
    tl.store(merged_means + place, mean, mask=channel < channels)
    tl.store(merged_squares + place, tl.sum(square, 0), mask=channel < channels)
    tl.store(merged_counts + part, count)  # by every block of channels the same


@triton.jit
def merge_sums_kernel(
    sums,  # (segments, columns)
    merged,  # (parts, columns)
    segments,
    columns,
    part_segments,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of ``part_segments`` segments at a time."""
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = part * part_segments
    end = tl.minimum(begin + part_segments, segments)
    total = tl.full([BLOCK_S, BLOCK_C], 0, tl.float32)
    for first in range(begin, end, BLOCK_S):
        segment = first + tl.arange(0, BLOCK_S)
        known = (segment < end)[:, None] & (column < columns)[None, :]
        offset = segment.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(sums + offset, mask=known, other=0)
    result = tl.sum(total, 0).to(merged.dtype.element_ty)
    tl.store(merged + part.to(tl.int64) * columns + column, result, mask=column < columns)


def merge_moments(moments: Moments, wrap) -> Moments:
    """The same moments in at most MANY segments."""
    part = 32
    while (segments := moments.means.shape[0]) > MANY:
        channels = moments.means.shape[1]
        parts = triton.cdiv(segments, part)
        merged = Moments.empty(moments.means, parts, channels)
        wrap(merge_moments_kernel)[(parts, triton.cdiv(channels, 64))](
            *moments, *merged, segments, channels, PART=part, BLOCK_C=64
        )
        moments = merged
    return moments


def merge_sums(sums: Tensor, parts: int, dtype: torch.dtype, wrap) -> Tensor:
    """``sums`` (segments, columns) in ``parts`` segments at most, as ``dtype``."""
    segments, columns = sums.shape
    each = triton.cdiv(segments, parts)
    parts = triton.cdiv(segments, each)
    merged = sums.new_empty(parts, columns, dtype=dtype)
    block_s = 8 if each > 4 else 1
    wrap(merge_sums_kernel)[(triton.cdiv(columns, 128), parts)](
        sums, merged, segments, columns, each, BLOCK_S=block_s, BLOCK_C=128
    )
    return merged
