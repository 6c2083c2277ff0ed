"""How kernels see an activation: a dense matrix in memory, whichever the memory format.

In channels_last a row of the matrix is a pixel and its columns are the channels; in contiguous
NCHW a row is one channel of one image and its columns are the pixels. Tiles of that matrix never
need a division an element, and their neighbouring columns are loaded 16 bytes at a time.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

VALUES = 4096  # of a tile: 32 a thread
FEW_VALUES = 1024  # of a tile of a map so small that multiprocessors would be left without one
PROGRAMS = 4  # of a reduction, a multiprocessor


class Tile(NamedTuple):
    """Rows and columns that a program holds in registers at a time."""

    BLOCK_R: int
    BLOCK_L: int


class Segments(NamedTuple):
    """How the values of a channel, ``outer`` x ``inner`` of them, are cut for a reduction: into
    ``count`` segments of ``rows`` x ``columns``, ``across`` of them side by side."""

    count: int
    rows: int
    columns: int
    across: int


class Layout(NamedTuple):
    """``outer`` x ``inner`` values a channel: N * H * W x 1 in channels_last (``last``), else
    N x H * W."""

    outer: int
    inner: int
    channels: int
    last: bool
    memory_format: torch.memory_format
    device: torch.device

    @classmethod
    def of(cls, input: Tensor) -> "Layout":
        n, channels, height, width = input.shape
        memory_format = suggest_memory_format(input)
        # maps of one pixel lie in memory alike in both formats
        last = memory_format == torch.channels_last or height * width == 1
        outer, inner = (n * height * width, 1) if last else (n, height * width)
        return cls(outer, inner, channels, last, memory_format, input.device)

    def dense(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous(memory_format=self.memory_format)

    def empty(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=self.memory_format)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        if self.last:
            return self.outer, self.channels
        return self.outer * self.channels, self.inner

    @property
    def channel_blocks(self) -> int:
        """Programs that a reduction needs side by side, a segment each."""
        return (
            triton.cdiv(self.channels, self.reduction_tile.BLOCK_L) if self.last else self.channels
        )

    @property
    def values(self) -> int:
        elements = self.outer * self.inner * self.channels
        return VALUES if elements >= VALUES * multiprocessors(self.device) else FEW_VALUES

    @property
    def tile(self) -> Tile:
        """Of a kernel that treats every value on its own; 64 channels are a line of memory."""
        columns = power_of_2(self.shape[1], 64 if self.last else 256)
        return Tile(self.values // columns, columns)

    def grid(self) -> tuple[int]:
        rows, columns = self.shape
        tile = self.tile
        return (triton.cdiv(rows, tile.BLOCK_R) * triton.cdiv(columns, tile.BLOCK_L),)

    @property
    def reduction_tile(self) -> Tile:
        """Of ``outer`` x columns. A single image leaves no rows to stack: then it is wide."""
        if self.last:
            return self.tile
        columns = power_of_2(self.inner, self.values // power_of_2(self.outer, 16))
        return Tile(self.values // columns, columns)

    def segments(self) -> Segments:
        """Whole tiles, and enough segments that every multiprocessor has programs."""
        tile = self.reduction_tile
        wanted = triton.cdiv(PROGRAMS * multiprocessors(self.device), self.channel_blocks)
        rows, down = _cut(self.outer, tile.BLOCK_R, wanted)
        if self.last:
            return Segments(down, rows, 1, 1)
        columns, across = _cut(self.inner, tile.BLOCK_L, triton.cdiv(wanted, down))
        return Segments(down * across, rows, columns, across)


def _cut(length: int, block: int, wanted: int) -> tuple[int, int]:
    """Length of a part, in whole blocks, and the number of parts: ``wanted`` at most."""
    blocks = triton.cdiv(length, block)
    part = triton.cdiv(blocks, min(blocks, wanted)) * block
    return part, triton.cdiv(length, part)


def power_of_2(least: int, most: int) -> int:
    """The smallest power of 2 that reaches ``least``, or ``most``. Only comparisons, so that a
    graph with a symbolic size is good for all sizes of the same tile."""
    power = 1
    while power < least and power < most:
        power *= 2
    return power


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- inside a kernel ------------------------------------------------------------------------------


@triton.jit
def place(
    rows, columns, channels, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Of this program's tile of the matrix: offset, mask and channel. Neighbouring programs take
    neighbouring columns, so that those which run together read whole pages of memory."""
    across = tl.cdiv(columns, BLOCK_L)
    down = (tl.program_id(0) // across).to(tl.int64)
    row = (down * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = (tl.program_id(0) % across * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    mask = (row < rows) & (column < columns)
    channel = column if LAST else row % channels
    return row * columns + column, mask, channel, (column < columns) if LAST else (row < rows)


@triton.jit
def segment_of(
    outer, inner, channels, segment_rows, segment_columns, across,
    LAST: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Of this program: segment, channel (a row of them in channels_last), where rows and columns
    begin and end, and where column 0 of row 0 lies."""
    if LAST:
        blocks = tl.cdiv(channels, BLOCK_L)
        segment = tl.program_id(0) // blocks
        left = tl.program_id(0) % blocks * BLOCK_L
        right = tl.minimum(left + BLOCK_L, channels)
        channel = (left + tl.arange(0, BLOCK_L))[None, :]
        base = left.to(tl.int64) * 0
    else:
        segment = tl.program_id(0) // channels
        left = segment % across * segment_columns
        right = tl.minimum(left + segment_columns, inner)
        channel = (tl.program_id(0) % channels + tl.arange(0, 1))[None, :]
        base = (tl.program_id(0) % channels).to(tl.int64) * inner
    top = segment // across * segment_rows
    bottom = tl.minimum(top + segment_rows, outer)
    return segment.to(tl.int64), channel, top, bottom, left, right, base


@triton.jit
def step_of(
    step, top, bottom, left, right, base, pitch,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Offset and mask of a segment's tile number ``step``."""
    across = 1 if LAST else tl.cdiv(right - left, BLOCK_L)
    row = (top + step // across * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = (left + step % across * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    return base + row.to(tl.int64) * pitch + column, (row < bottom) & (column < right)


@triton.jit
def steps(
    top, bottom, left, right, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr
):
    down = tl.cdiv(bottom - top, BLOCK_R)
    return down if LAST else down * tl.cdiv(right - left, BLOCK_L)


@triton.jit
def per_channel(tile, LAST: tl.constexpr):
    """The sum of a tile's values of each channel, shaped as ``channel`` of a segment."""
    total = tl.sum(tile, 0, keep_dims=True)
    return total if LAST else tl.sum(total, 1, keep_dims=True)
