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
    parts: int = 1  # of the depth, a program each, see conv_parts

    @property
    def keywords(self) -> dict[str, int]:
        """Of a launch."""
        apart = ("descriptors", "parts")
        return {name: value for name, value in self._asdict().items() if name not in apart}


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
    taps: int = 1


# For maps of few pixels, where larger tiles would leave most multiprocessors without one. Hopper's and
# Blackwell's own instructions take 64 rows or more: fewer are multiplied by Ampere's.
SMALL = (Tile(64, 32, 64, 8, 4, 4), Tile(32, 32, 64, 8, 4, 4), Tile(16, 32, 128, 8, 2, 4))

# From the largest to the smallest, by kind of problem:
#   plain       fprop's eval epilogue, and dgrad without one
#   statistics  fprop with statistics: sums, their deviations and squares are in registers together
#   prologue    fprop with a prologue: activations pass through registers
#   masked      dgrad with the epilogue for the BN behind: reads one or two more tensors
#   flat        fprop of few channels, with statistics or without: the stem
#   parts       fprop of a part of the depth, whose sums another kernel finishes
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
            *SMALL,
        ),
        "statistics": (
            # steps of 32 make the compiler aim at 128 registers: spills
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 32, 8, 4, 4),
            Tile(64, 64, 32, 8, 4, 4),
            Tile(128, 32, 32, 8, 4, 4),
        ),
        "prologue": (
            Tile(128, 64, 32, 8, 8, 3),
            Tile(64, 64, 32, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "masked": (
            Tile(128, 64, 32, 8, 8, 3),
            Tile(64, 64, 32, 8, 4, 3),
            Tile(128, 32, 32, 8, 4, 3),
        ),
        "flat": (Tile(128, 64, 32, 8, 8, 3), Tile(64, 32, 32, 8, 4, 3)),
        "parts": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 32, 8, 4, 4),
            Tile(64, 64, 32, 8, 4, 4),
        ),
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
            *SMALL,
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
        "parts": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 8, 4),
            Tile(64, 64, 64, 8, 4, 4),
        ),
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
            *SMALL,
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
        "parts": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 64, 64, 8, 8, 3),
            Tile(64, 64, 64, 8, 4, 4),
        ),
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


@functools.cache
def candidates(problem: Problem) -> tuple[Tile, ...]:
    """The tiles worth a try: none that a masked tail would leave half empty while a smaller one is
    there, and none that must be far slower than another."""
    tiles = _tiles(problem)
    lowest, narrowest = (min((tile[i] for tile in tiles), default=0) for i in range(2))
    fitting = [
        tile
        for tile in tiles
        if tile.BLOCK_M in (lowest, power_of_2(problem.rows, tile.BLOCK_M))
        and tile.BLOCK_N in (narrowest, power_of_2(problem.columns, tile.BLOCK_N))
    ]
    if not fitting or problem.kind == "wgrad":
        return tuple(fitting) or tiles[-1:]
    most = 3 * min(nanoseconds(problem, tile) for tile in fitting)
    return tuple(tile for tile in fitting if nanoseconds(problem, tile) <= most)


@functools.cache
def split_candidates(problem: Problem) -> tuple[Tile, ...]:
    """Tiles whose depth is worth to be split, each into as many parts as are fastest."""
    problem = problem._replace(kind="parts")
    parted = [_parted(problem, tile) for tile in candidates(problem)]
    return tuple(tile for tile in parted if tile.parts > 1)


def _parted(problem: Problem, tile: Tile) -> Tile:
    steps = _steps(problem, tile)
    counts = {equal_parts(steps, parts)[0] for parts in range(1, min(steps, MOST_PARTS) + 1)}
    return min(
        (tile._replace(parts=parts) for parts in sorted(counts)),
        key=functools.partial(nanoseconds, problem),
    )


def equal_parts(steps: int, parts: int) -> tuple[int, int]:
    """``steps`` in ``parts`` or fewer, of so many each but the last: none is empty."""
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


def _tiles(problem: Problem) -> tuple[Tile, ...]:
    merged = problem.groups > 1 and problem.columns <= MERGED_CHANNELS
    if merged and problem.precision == "half" and problem.architecture in MERGED_TILES:
        return MERGED_TILES[problem.architecture]
    return FP32_TILES.get(problem.precision) or TILES[problem.architecture][problem.kind]


@functools.cache
def shipped(problem: Problem, tiles: tuple[Tile, ...] = ()) -> Tile:
    """The fastest of ``tiles``, or of the candidates, by :func:`nanoseconds`.

    wgrad splits its depth until the device is full, so there the largest is right anyway.
    """
    tiles = tiles or candidates(problem)
    if problem.kind == "wgrad":
        return tiles[0]
    return min(tiles, key=functools.partial(nanoseconds, problem))


# What a tile costs, for an H200; only ratios matter. A multiprocessor gets some 55 bytes a ns out of
# L2; a step takes a barrier and the latency of its products, be it ever so small; a program its
# launch, its first loads and its last stores. Finishing parts is another launch, about 1 us in a
# CUDA graph, and such a program: their sums are written and read once.
_BYTES_A_NS = 55
_STEP_NS = 120
_PROGRAM_NS = 1500
_FINISH_NS = 2500
_FINISHED = 128  # values, by one program
MOST_PARTS = 32


def nanoseconds(problem: Problem, tile: Tile) -> float:
    """What ``problem`` takes in such tiles: rounds of programs, a round as long as its loads."""
    rows, columns = problem.rows, problem.columns
    tiles = problem.groups * triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N)
    programs, element = tiles * tile.parts, 2 if problem.precision == "half" else 4
    loaded = min(tile.BLOCK_M, rows) + min(tile.BLOCK_N, columns)
    loaded *= min(tile.BLOCK_K, problem.depth) * element
    _, steps = equal_parts(_steps(problem, tile), tile.parts)
    program = _PROGRAM_NS + steps * max(loaded / _BYTES_A_NS, _STEP_NS)
    total = triton.cdiv(programs, problem.multiprocessors) * program
    if tile.parts > 1:
        values = problem.groups * rows * columns
        for writers in (programs, triton.cdiv(values, _FINISHED)):
            rate = min(problem.multiprocessors, writers) * _BYTES_A_NS
            total += tile.parts * values * 4 / rate
        total += _FINISH_NS
    return total


def _steps(problem: Problem, tile: Tile) -> int:
    return problem.taps * triton.cdiv(problem.depth, tile.BLOCK_K)


@functools.cache
def architecture(device: torch.device) -> int:
    """Whose tiles a device uses. Consumer Blackwell (12.x) has neither Hopper's nor Blackwell's
    matrix instructions nor their shared memory: Ampere's tiles fit it."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: 90, 10: 100}.get(major, 80)


def problem(
    kind: str, like: torch.Tensor, allow_tf32: bool, groups: int, rows: int, columns: int,
    depth: int, taps: int = 1,
) -> Problem:  # fmt: skip
    device = like.device
    fp32 = "tf32" if allow_tf32 else "ieee"
    return Problem(
        kind, architecture(device), fp32 if like.dtype == torch.float32 else "half",
        int(groups), _known(rows), int(columns), _known(depth), multiprocessors(device),
        int(taps),
    )  # fmt: skip


def _known(size: int) -> int:
    """Or of a symbolic one the power of 2 above: a graph is then good for all sizes up to that.
    What is a model's, not its input's, is a number in any graph."""
    return power_of_2(size, 1 << 30) if isinstance(size, torch.SymInt) else size
