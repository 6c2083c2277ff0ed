"""Tile configurations of the convolution kernels: data, and the rule that picks one.

They were chosen by what the compiler makes of them, not by timing: none spills a register, see
``bench/results/triton-aot.md``. ``FASTRES_AUTOTUNE=1`` measures them on the device at hand.
"""

import functools
from typing import NamedTuple

import torch
import triton

from .layout import multiprocessors, power_of_2


class Tile(NamedTuple):
    """BLOCK_M x BLOCK_N sums in BLOCK_K deep steps. Rows and columns are pixels and output channels
    in fprop and dgrad, filters and input channels in wgrad, where pixels are the depth."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # by conv_descriptors' kernel

    @property
    def keywords(self) -> dict[str, int]:
        """Of a launch."""
        return {name: value for name, value in self._asdict().items() if name != "descriptors"}


class Problem(NamedTuple):
    """What a tile is chosen for: one kernel's GEMM, as ``groups`` x (rows, columns, depth)."""

    kind: str  # a key of TILES
    architecture: int
    precision: str  # "half", or fp32's "tf32" and "ieee"
    groups: int
    rows: int
    columns: int
    depth: int  # of one tap
    multiprocessors: int


# From the largest to the smallest, by kind of problem:
#   plain       fprop's eval epilogue, and dgrad without one
#   statistics  fprop with statistics: sums, their deviations and squares are in registers together
#   prologue    fprop with a prologue: activations pass through registers
#   masked      dgrad with the epilogue for the BN behind: reads one or two more tensors
#   flat        fprop of few channels, with statistics or without: the stem
#   wgrad       with or without prologue, flat or not
#   descriptors fprop and dgrad on tensor descriptors, with any epilogue: never shipped, only
#               measured against the others
# sm_80's tiles also fit the 99 KB of shared memory that 8.6, 8.9 and 12.x have.
TILES = {
    80: {
        "plain": (
            Tile(128, 128, 32, 8, 8, 4),
            Tile(128, 64, 32, 8, 4, 4),
            Tile(64, 64, 32, 8, 4, 4),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "statistics": (
            # steps of 32 make the compiler aim at 128 registers: spills
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 32, 8, 4, 4),
            Tile(64, 64, 32, 8, 4, 4),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "prologue": (
            Tile(128, 64, 32, 8, 4, 3),
            Tile(64, 64, 32, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "masked": (
            Tile(128, 64, 32, 8, 8, 3),
            Tile(64, 64, 32, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "flat": (Tile(128, 64, 32, 8, 8, 3), Tile(64, 32, 32, 8, 4, 3)),
        "descriptors": (),
        "wgrad": (
            Tile(128, 128, 32, 8, 8, 3),
            Tile(64, 64, 32, 8, 4, 3),
            Tile(32, 32, 64, 8, 4, 3),
        ),
    },
    90: {
        "plain": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 4, 4),
            Tile(64, 64, 64, 8, 4, 4),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "statistics": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 4, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "prologue": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "masked": (
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "flat": (Tile(128, 64, 32, 8, 8, 3), Tile(64, 32, 32, 8, 4, 3)),
        "descriptors": (
            Tile(128, 128, 64, 8, 8, 4, descriptors=True),
            Tile(256, 64, 64, 8, 8, 3, descriptors=True),
            Tile(128, 64, 64, 8, 8, 4, descriptors=True),
        ),
        "wgrad": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(32, 32, 64, 8, 4, 3),
        ),
    },
    100: {
        "plain": (  # 128x128 spills with the epilogue of eval
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 4),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "statistics": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "prologue": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "masked": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "flat": (Tile(128, 64, 32, 8, 8, 3), Tile(64, 32, 32, 8, 4, 3)),
        "descriptors": (
            Tile(128, 128, 64, 8, 8, 4, descriptors=True),  # with 3 stages strides spill
            Tile(64, 128, 64, 8, 8, 4, descriptors=True),
            Tile(128, 64, 64, 8, 4, 4, descriptors=True),  # 8 warps spill with statistics
        ),
        "wgrad": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 8, 3),
            Tile(32, 32, 64, 8, 4, 3),
        ),
    },
}

# fp32 takes twice the shared memory, and without TF32 there are no tensor cores: operands, too, are
# in registers then.
FP32_TILES = {
    "tf32": (Tile(64, 64, 32, 8, 4, 2), Tile(32, 32, 32, 8, 4, 2)),
    "ieee": (Tile(32, 32, 32, 8, 4, 2),),
}

# Groups of few channels are computed several at a time, as one dense group of this many channels
# with zeros between them: a tensor core's tile would stay as empty without.
MERGED_CHANNELS = 32
# For sm_100 Triton 3.7 does not compile such groups into tcgen05's tiles, which have 64 rows or more.
MERGED_TILES = {100: (Tile(32, 32, 64, 8, 4, 3),)}


def candidates(problem: Problem) -> tuple[Tile, ...]:
    """The tiles worth a try: none that a masked tail would leave half empty while another fits."""
    merged = problem.groups > 1 and problem.columns <= MERGED_CHANNELS
    if merged and problem.precision == "half" and problem.architecture in MERGED_TILES:
        return MERGED_TILES[problem.architecture]
    tiles = FP32_TILES.get(problem.precision) or TILES[problem.architecture][problem.kind]
    fitting = [
        tile
        for tile in tiles
        if power_of_2(problem.rows, tile.BLOCK_M) == tile.BLOCK_M
        and power_of_2(problem.columns, tile.BLOCK_N) == tile.BLOCK_N
    ]
    return tuple(fitting) or tiles[-1:]


def shipped(problem: Problem) -> Tile:
    """The largest tile that still gives every multiprocessor one, else the one with most tiles.

    wgrad splits its depth until the device is full, so there the largest is right anyway.
    """
    tiles = candidates(problem)
    if problem.kind == "wgrad":
        return tiles[0]

    def programs(tile: Tile) -> int:
        down = triton.cdiv(problem.rows, tile.BLOCK_M)
        return problem.groups * down * triton.cdiv(problem.columns, tile.BLOCK_N)

    enough = [tile for tile in tiles if programs(tile) >= problem.multiprocessors]
    return enough[0] if enough else max(tiles, key=programs)


@functools.cache
def architecture(device: torch.device) -> int:
    """Whose tiles a device uses. Consumer Blackwell (12.x) has neither Hopper's nor Blackwell's
    matrix instructions nor their shared memory: Ampere's tiles fit it."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: 90, 10: 100}.get(major, 80)


def problem(
    kind: str, like: torch.Tensor, allow_tf32: bool, groups: int, rows: int, columns: int, depth: int
) -> Problem:  # fmt: skip
    device = like.device
    fp32 = "tf32" if allow_tf32 else "ieee"
    return Problem(
        kind, architecture(device), fp32 if like.dtype == torch.float32 else "half", groups, rows,
        columns, depth, multiprocessors(device),
    )  # fmt: skip
