"""Statistics of batch norm: a batch's, in two levels, or the running ones.

The first level reduces a segment of a channel a program, the second merges the segments in their
order: no atomics, so two runs give the same bits.
"""

import triton
import triton.language as tl

from .layout import per_channel, segment_of, step_of, steps


@triton.jit
def moments_kernel(
    input, means, squares, counts, outer, inner, channels, segment_rows, segment_columns, across,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``means``, ``squares`` (segments, C), ``counts`` (segments,): mean of a segment, sum of squared
    deviations from it, how many values of a channel it holds.

    Sums of x - p and its square, p being the mean of the first tile. By Cauchy and Schwarz
    n * (mean - p)^2 is at most ``squares`` times the number of tiles in the segment: what
    cancels in the end is worth a few bits at worst, be the mean 1e4 times the deviation.
    """
    acc = means.dtype.element_ty
    segment, channel, top, bottom, left, right, base = segment_of(
        outer, inner, channels, segment_rows, segment_columns, across, LAST, BLOCK_L
    )
    pitch = tl.cast(inner, tl.int64) * channels  # of one image alone, it may pass 2^31
    offset, mask = step_of(0, top, bottom, left, right, base, pitch, LAST, BLOCK_R, BLOCK_L)
    x = tl.load(input + offset, mask=mask, other=0).to(acc)
    pivot = per_channel(x, LAST) / tl.maximum(per_channel(mask.to(acc), LAST), 1)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0)  # else x - pivot would be NaN
    total = tl.zeros([BLOCK_R, BLOCK_L], acc)
    square = tl.zeros([BLOCK_R, BLOCK_L], acc)
    for step in range(steps(top, bottom, left, right, LAST, BLOCK_R, BLOCK_L)):
        offset, mask = step_of(step, top, bottom, left, right, base, pitch, LAST, BLOCK_R, BLOCK_L)
        x = tl.load(input + offset, mask=mask, other=0).to(acc)
        deviation = tl.where(mask, x - pivot, 0)
        total += deviation
        square += deviation * deviation
    count = tl.cast(bottom - top, acc)
    if not LAST:
        count *= tl.cast(right - left, acc)
    shift = per_channel(total, LAST) / count
    around = tl.maximum(per_channel(square, LAST) - shift * shift * count, 0, tl.PropagateNan.ALL)
    tl.store(means + segment * channels + channel, pivot + shift, mask=channel < channels)
    tl.store(squares + segment * channels + channel, around, mask=channel < channels)
    tl.store(counts + segment, count)  # by every block of channels the same


@triton.jit
def finish_moments_kernel(
    means, squares, counts, save_mean, save_invstd, running_mean, running_var, segments, channels,
    momentum: tl.float64, eps: tl.float64, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the segments (Chan, Golub, LeVeque 1979); the one place where running statistics are
    updated."""
    acc = means.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    pivot = tl.load(means + channel, mask=known, other=0)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0)
    shift = tl.zeros([BLOCK_C], acc)
    count = tl.cast(0, acc)
    for first in range(0, segments, BLOCK_S):
        segment = first + tl.arange(0, BLOCK_S)
        mask = (segment < segments)[:, None] & known[None, :]
        n = tl.load(counts + segment, mask=segment < segments, other=0)
        mean = tl.load(means + segment[:, None] * channels + channel[None, :], mask=mask, other=0)
        shift += tl.sum(tl.where(mask, (mean - pivot[None, :]) * n[:, None], 0), 0)
        count += tl.sum(n, 0)
    mean = pivot + shift / count
    square = tl.zeros([BLOCK_C], acc)
    for first in range(0, segments, BLOCK_S):
        segment = first + tl.arange(0, BLOCK_S)
        mask = (segment < segments)[:, None] & known[None, :]
        n = tl.load(counts + segment, mask=segment < segments, other=0)[:, None]
        offset = segment[:, None] * channels + channel[None, :]
        delta = tl.load(means + offset, mask=mask, other=0) - mean[None, :]
        around = tl.load(squares + offset, mask=mask, other=0)
        square += tl.sum(tl.where(mask, around + delta * delta * n, 0), 0)
    tl.store(save_mean + channel, mean, mask=known)
    tl.store(save_invstd + channel, 1 / tl.sqrt(square / count + eps), mask=known)
    if running_mean is not None:
        unbiased = square / (count - 1)
        _update(running_mean, mean, momentum, channel, known)
        _update(running_var, unbiased, momentum, channel, known)


@triton.jit
def _update(running, value, momentum, channel, known):
    old = tl.load(running + channel, mask=known, other=0)
    new = (1 - momentum) * old.to(value.dtype) + momentum * value
    tl.store(running + channel, new.to(old.dtype), mask=known)


@triton.jit
def frozen_moments_kernel(
    running_mean, running_var, save_mean, save_invstd, channels, eps: tl.float64,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The running statistics as those of a batch."""
    acc = save_mean.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.load(running_mean + channel, mask=known, other=0).to(acc)
    variance = tl.load(running_var + channel, mask=known, other=0).to(acc)
    tl.store(save_mean + channel, mean, mask=known)
    tl.store(save_invstd + channel, 1 / tl.sqrt(variance + eps), mask=known)
