"""Sizes of a convolution as the kernels take them: taps, parity classes of dgrad, merged groups."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import MERGED_CHANNELS

# Pixels are counted in 32 bits, up to a tile beyond the last one; elements are not limited.
MOST_PIXELS = 2**31 - 2**10


def output_map(size, taps, stride, padding, dilation) -> tuple[int, int]:
    """(P, Q) of a map of ``size`` (H, W): P = (H + 2p - d(R-1) - 1) // s + 1."""
    rows, columns = (
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip(size, taps, stride, padding, dilation, strict=True)
    )
    return rows, columns


class Shape(NamedTuple):
    input: tuple[int, ...]  # N, C, H, W
    output: tuple[int, ...]  # N, K, P, Q
    taps: tuple[int, int]  # R, S
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, input, weight, stride, padding, dilation, groups: int) -> "Shape":
        if input[1] != weight[1] * groups or weight[0] % groups:
            raise ValueError(
                f"weight: expected {groups} groups over {input[1]} channels, got {tuple(weight)}"
            )
        maps = output_map(input[2:], weight[2:], stride, padding, dilation)
        most = input[0] * max(maps[0] * maps[1], input[2] * input[3])
        if most > MOST_PIXELS:
            raise ValueError(f"input: expected at most {MOST_PIXELS} pixels, got {most}")
        return cls(
            tuple(input), (input[0], weight[0], *maps), tuple(weight[2:]), tuple(stride),
            tuple(padding), tuple(dilation),
        )  # fmt: skip

    @property
    def channels(self) -> int:
        return self.input[1]

    @property
    def filters(self) -> int:
        return self.output[1]

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self.output[0] * self.output[2] * self.output[3]

    @property
    def pointwise(self) -> bool:
        """Output pixel i is a function of input pixel i: a plain matrix product."""
        return self.taps == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def padded(self) -> bool:
        """A tap may hang over the edge. Without padding none does."""
        return self.padding != (0, 0)


class Class(NamedTuple):
    """The pixels of x whose row and column leave the same remainders by the stride, and the taps
    that reach them."""

    grid: tuple[int, int]  # rows and columns
    pixels: int
    first_pixel: int  # in one image
    taps: tuple[int, int]
    first_weight: int
    offset: tuple[int, int]  # of dy: where the first tap reaches from the first pixel
    step: tuple[int, int]  # and how far the next one is
    w_steps: tuple[int, int]  # elements of w from one tap of the class to the next


def taps_by_class(shape: Shape, group_channels: int) -> list[Class]:
    """The classes of x's pixels, for dgrad; those with no pixel are left out."""
    w_row, w_column = shape.taps[1] * group_channels, group_channels
    n, _, height, width = shape.input
    classes = []
    for a, b in itertools.product(*(range(s) for s in shape.stride)):
        grid = tuple(
            len(range(first, size, s))
            for first, size, s in zip((a, b), (height, width), shape.stride, strict=True)
        )
        if not grid[0] * grid[1]:
            continue
        (first, count, every, offset, step) = zip(
            *(
                _axis(*of)
                for of in zip(
                    (a, b), shape.taps, shape.stride, shape.padding, shape.dilation, strict=True
                )
            ),
            strict=True,
        )
        taps = count if count[0] * count[1] else (0, 0)
        classes.append(
            Class(
                grid, n * grid[0] * grid[1], a * width + b, taps,
                first[0] * w_row + first[1] * w_column,
                offset, step, (every[0] * w_row, every[1] * w_column),
            )
        )  # fmt: skip
    return classes


def _axis(remainder: int, taps: int, stride: int, padding: int, dilation: int):
    """Along one axis, for pixels ``h = remainder + stride * i``: tap r reaches row
    ``p = (h + padding - r * dilation) / stride`` of dy where that is whole. First such tap, their
    number, every how many taps; p - i for the first one, and what the next one adds to it."""
    every = stride // math.gcd(stride, dilation)
    for first in range(min(every, taps)):
        reach = remainder + padding - first * dilation
        if reach % stride == 0:
            count = len(range(first, taps, every))
            return first, count, every, reach // stride, -(every * dilation) // stride
    return 0, 0, every, 0, 1


def flat_channels(groups: int, channels: int) -> int:
    """How many channels a pixel is padded to, where it has so few that taps and channels are taken
    as one axis; 0 where they aren't. Powers of 2 are loaded together: 8 bytes for an RGB pixel."""
    if groups > 1 or channels > 8:
        return 0
    return 4 if channels <= 4 else 8


def pad_channels(tensor: Tensor, channels: int) -> Tensor:
    """With zeros, along the second axis, or the only one; channels_last."""
    missing = channels - tensor.shape[min(1, tensor.dim() - 1)]
    if not missing:
        return tensor
    if tensor.dim() == 1:
        return torch.nn.functional.pad(tensor, (0, missing))
    n, c, h, w = tensor.shape
    padded = tensor.new_zeros(n, h, w, channels)
    padded[..., :c] = tensor.permute(0, 2, 3, 1)
    return padded.permute(0, 3, 1, 2)


def merged(groups: int, group_channels: int, group_filters: int) -> int:
    """How many groups are computed as one, on its block diagonal.

    Zeros between the groups make no difference but for an Inf or NaN, which the other groups of its
    block see too.
    """
    most = MERGED_CHANNELS // max(group_channels, group_filters)
    return max(m for m in range(1, max(1, most) + 1) if groups % m == 0)


def merge_groups(w: Tensor, groups: int, merge: int) -> Tensor:
    """(K, C / groups, R, S) as (K, merge * C / groups, R, S), channels_last."""
    if merge == 1:
        return w
    k, c, r, s = w.shape
    blocks = w.new_zeros(groups // merge, merge, k // groups, r * s, merge, c)
    own = w.permute(0, 2, 3, 1).reshape(groups // merge, merge, k // groups, r * s, c)
    blocks.diagonal(dim1=1, dim2=4).copy_(own.permute(0, 2, 3, 4, 1))
    return blocks.view(k, r, s, merge * c).permute(0, 3, 1, 2)


def split_groups(dw: Tensor, size, groups: int, merge: int) -> Tensor:
    """The inverse of merging and padding for a gradient: a channels_last weight of ``size``."""
    k, c, r, s = size
    if merge == 1:
        return dw.view(k, r, s, -1)[..., :c].contiguous().permute(0, 3, 1, 2)
    blocks = dw.view(groups, merge, k // (groups * merge), r * s, merge, c)
    own = blocks.diagonal(dim1=1, dim2=4).permute(0, 4, 1, 2, 3)
    return own.reshape(k, r, s, c).permute(0, 3, 1, 2)
