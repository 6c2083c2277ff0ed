"""Launchers of the convolution kernels: fprop, dgrad and wgrad on channels_last tensors.

Activations and weights are brought to channels_last where they aren't, and results are
channels_last. ``wrap`` is applied to every kernel: ``torch.library.wrap_triton`` makes the launch
visible to a graph that is being traced. ``tile`` overrides the chosen one.

fp64 is not covered. fp32 multiplies in TF32 only where ``allow_tf32`` says so.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import configs, tuning
from .conv_dgrad import dgrad_kernel
from .conv_fprop import fprop_kernel
from .conv_shape import (
    Shape,
    flat_channels,
    merge_groups,
    merged,
    pad_channels,
    split_groups,
    taps_by_class,
)
from .conv_wgrad import wgrad_kernel
from .segments import MANY, Moments, merge_moments, merge_sums


class Affine(NamedTuple):
    """Per channel, ``(x - mean) * scale + shift``: a batch norm with ``scale = weight * invstd``
    and ``shift = bias``. Without ``mean`` it counts as 0."""

    mean: Tensor | None  # (C,)
    scale: Tensor  # (C,)
    shift: Tensor  # (C,)


class Behind(NamedTuple):
    """The BN and ReLU whose output was a convolution's input: BN's input and coefficients, and the
    ReLU's output if it was kept (it is recomputed otherwise)."""

    input: Tensor  # (N, C, H, W)
    affine: Affine
    output: Tensor | None = None  # (N, C, H, W)


def conv_fprop(
    x: Tensor, w: Tensor, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups: int = 1, *,
    scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    relu: bool = False, prologue: Affine | None = None, statistics: bool = False,
    allow_tf32: bool = False, tile=None, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Moments | None]:  # fmt: skip
    """``act(conv(prologue(x), w) * scale + shift + residual)``, prologue being affine and ReLU.

    ``statistics`` are of ``conv * scale + shift`` before it is rounded, for
    ``finish_moments_kernel``.
    """
    Shape.of(x.shape, w.shape, stride, padding, dilation, groups)
    flat = flat_channels(groups, x.shape[1])
    x, w, residual, prologue = _few(x, flat), _few(w, flat), _last(residual), _few(prologue, flat)
    shape = Shape.of(x.shape, w.shape, stride, padding, dilation, groups)
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    y = _empty_last(x, shape.output)
    if not y.numel():
        return y, Moments(*_vectors(x, 2, 0, shape.filters), 1) if statistics else None
    w = merge_groups(w, groups, merge)
    groups //= merge
    kind = "flat" if flat else "prologue" if prologue else "statistics" if statistics else "plain"
    problem = configs.problem(
        kind, x, allow_tf32, groups, shape.pixels, shape.filters // groups, shape.channels // groups
    )
    mean, x_scale, x_shift = prologue or (None, None, None)
    constants = {
        "R": shape.taps[0], "S": shape.taps[1], "RELU": relu, "PLAIN": shape.pointwise,
        "FLAT": flat, "PADDED": shape.padded, "PRECISION": _precision(allow_tf32),
    }  # fmt: skip

    def launch(kernel, block_m: int, y=y, **tile):
        tiles = triton.cdiv(shape.pixels, block_m)
        moments = _vectors(x, 2, tiles, shape.filters) if statistics else (None, None)
        kernel[_grid(shape.pixels, groups, shape.filters // groups)](
            x, w, y, scale, shift, residual, mean, x_scale, x_shift, *moments,
            shape.pixels, *shape.input[2:], shape.channels, shape.filters, *shape.output[2:],
            *stride, *padding, *dilation, shape.channels // groups, shape.filters // groups,
            **constants, **tile,
        )  # fmt: skip
        return moments

    def measure(tuner):
        launch(tuner, _smallest(problem), torch.empty_like(y))

    with _on(x):
        key = (statistics, prologue is None, residual is None)
        tile = tile or tuning.choose(fprop_kernel, problem, key, x, measure)
        moments = launch(wrap(fprop_kernel), tile.BLOCK_M, **tile._asdict())
        if not statistics:
            return y, None
        return y, merge_moments(Moments(*moments, tile.BLOCK_M), shape.pixels, wrap)


def conv_dgrad(
    dy: Tensor, w: Tensor, input_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    groups: int = 1, *, residual: Tensor | None = None, behind: Behind | None = None,
    allow_tf32: bool = False, tile=None, wrap=lambda kernel: kernel,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``g``, ``sums_g``, ``sums_gx``: the gradient of the input plus ``residual``, another gradient
    of it; with ``behind`` masked by that ReLU, and per segment and channel the sums of g and of
    ``g * (behind.input - mean)``, for ``finish_sums_kernel``."""
    dy, w, residual = _last(dy), _last(w), _last(residual)
    shape = Shape.of(input_size, w.shape, stride, padding, dilation, groups)
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    dx = _empty_last(dy, shape.input)
    if not dx.numel():
        sums = _vectors(dy, 2, 0, shape.channels) if behind else (None, None)
        return dx, *sums
    w = merge_groups(w, groups, merge)
    groups //= merge
    classes = taps_by_class(shape, w.shape[1])
    problem = configs.problem(
        "masked" if behind else "plain", dy, allow_tf32, groups, max(c.pixels for c in classes),
        shape.channels // groups, shape.filters // groups,
    )  # fmt: skip
    source, affine, output = behind or (None, (None, None, None), None)
    source, output = _last(source), _last(output)

    def launch(kernel, part, sums, dx=dx, **tile):
        images = (
            t if t is None else t.permute(0, 2, 3, 1).reshape(-1)[part.first_pixel * t.shape[1] :]
            for t in (dx, residual, source, output)
        )
        dx, *others = images
        kernel[_grid(part.pixels, groups, shape.channels // groups)](
            dy, w.permute(0, 2, 3, 1).reshape(-1)[part.first_weight :], dx, others[0],
            others[1], *affine, others[2], *sums,
            part.pixels, *part.grid, *shape.input[2:], shape.channels, shape.filters,
            *shape.output[2:], *stride, *part.offset, *part.step, *part.w_steps,
            w[0].numel(), shape.channels // groups, shape.filters // groups, R=part.taps[0], S=part.taps[1], RELU=behind is not None,
            PLAIN=shape.pointwise, PADDED=not shape.pointwise,
            PRECISION=_precision(allow_tf32), **tile,
        )  # fmt: skip

    def measure(tuner):
        most = max(classes, key=lambda part: part.taps[0] * part.taps[1])
        sums = (None, None)
        if behind:
            tiles = triton.cdiv(most.pixels, _smallest(problem))
            sums = _vectors(dy, 2, tiles, shape.channels)
        launch(tuner, most, sums, torch.empty_like(dx))

    with _on(dy):
        key = (shape.taps, stride, residual is None, output is None)
        tile = tile or tuning.choose(dgrad_kernel, problem, key, dy, measure)
        tiles = [triton.cdiv(part.pixels, tile.BLOCK_M) for part in classes]
        sums = _vectors(dy, 2, sum(tiles), shape.channels) if behind else (None, None)
        for i, part in enumerate(classes):
            own = [s if s is None else s[sum(tiles[:i]) :] for s in sums]
            launch(wrap(dgrad_kernel), part, own, **tile._asdict())
        if behind and sum(tiles) > MANY:
            sums = [merge_sums(s, MANY, s.dtype, wrap) for s in sums]
    return dx, *sums


def conv_wgrad(
    dy: Tensor, x: Tensor, weight_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
    groups: int = 1, *, prologue: Affine | None = None, dtype: torch.dtype | None = None,
    allow_tf32: bool = False, tile=None, wrap=lambda kernel: kernel,
) -> Tensor:  # fmt: skip
    """The gradient of the weight, for an input of ``prologue(x)``, in ``dtype`` (x's)."""
    dtype = dtype or x.dtype
    shape = Shape.of(x.shape, weight_size, stride, padding, dilation, groups)
    if not shape.pixels or not shape.filters:
        return _empty_last(x, weight_size, dtype).zero_()
    flat = flat_channels(groups, shape.channels)
    dy, x, prologue = _last(dy), _few(x, flat), _few(prologue, flat)
    shape = shape._replace(input=tuple(x.shape))
    merge = merged(groups, shape.channels // groups, shape.filters // groups)
    groups //= merge
    group_channels, group_filters = shape.channels // groups, shape.filters // groups
    taps = shape.taps[0] * shape.taps[1]
    columns = group_channels * taps if flat else group_channels
    problem = configs.problem("wgrad", x, allow_tf32, groups, group_filters, columns, shape.pixels)
    mean, x_scale, x_shift = prologue or (None, None, None)

    def launch(kernel, tile, **keywords):
        programs = groups * (1 if flat else taps) * triton.cdiv(columns, tile.BLOCK_N)
        programs *= triton.cdiv(group_filters, tile.BLOCK_M)
        splits, each = _splits(shape.pixels, programs, problem.multiprocessors, tile.BLOCK_K)
        straight = splits == 1 and merge == 1  # else the result is rounded last
        parts = x.new_empty(
            splits, shape.filters * taps * group_channels,
            dtype=dtype if straight else torch.float32,
        )  # fmt: skip

        def grid(meta):
            tiles = groups * (1 if flat else taps) * triton.cdiv(columns, meta["BLOCK_N"])
            return tiles * triton.cdiv(group_filters, meta["BLOCK_M"]), splits

        kernel[grid](
            dy, x, parts, mean, x_scale, x_shift,
            shape.pixels, each, *shape.input[2:], shape.channels, shape.filters,
            *shape.output[2:], *stride, *padding, *dilation, group_channels, group_filters,
            R=shape.taps[0], S=shape.taps[1], PLAIN=shape.pointwise, FLAT=flat,
            PADDED=shape.padded, PRECISION=_precision(allow_tf32), **keywords,
        )  # fmt: skip
        return parts

    def measure(tuner):
        launch(tuner, configs.shipped(problem))

    with _on(x):
        key = (shape.taps, prologue is None)
        tile = tile or tuning.choose(wgrad_kernel, problem, key, x, measure)
        parts = launch(wrap(wgrad_kernel), tile, **tile._asdict())
        if parts.shape[0] > 1:
            parts = merge_sums(parts, 1, dtype, wrap)
        return split_groups(parts, weight_size, groups, merge).to(dtype)


def _splits(pixels: int, programs: int, multiprocessors: int, block: int) -> tuple[int, int]:
    """How many parts of how many pixels: two programs a multiprocessor, but no part so short that
    writing and adding its sums takes longer than finding them."""
    wanted = triton.cdiv(2 * multiprocessors, programs)
    each = triton.cdiv(triton.cdiv(pixels, wanted), block) * block
    each = max(each, 8 * block)
    return triton.cdiv(pixels, each), each


def _grid(rows: int, groups: int, columns: int):
    def grid(meta):
        tiles = groups * triton.cdiv(columns, meta["BLOCK_N"])
        return (triton.cdiv(rows, meta["BLOCK_M"]) * tiles,)

    return grid


def _smallest(problem) -> int:
    return min(tile.BLOCK_M for tile in configs.candidates(problem))


def _precision(allow_tf32: bool) -> str:
    """Of fp32 products; narrower types are exact either way."""
    return "tf32" if allow_tf32 else "ieee"


def _last(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _few(operand, flat: int):
    """channels_last, and padded to ``flat`` channels unless that is 0."""
    if not flat or operand is None:
        return _last(operand) if isinstance(operand, Tensor) else operand
    if isinstance(operand, Affine):
        return Affine(*(v if v is None else pad_channels(v, flat) for v in operand))
    return _last(pad_channels(operand, flat))


def _empty_last(like: Tensor, size, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        tuple(size), dtype=dtype or like.dtype, device=like.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def _vectors(like: Tensor, count: int, *size: int) -> list[Tensor]:
    return [like.new_empty(size, dtype=torch.float32) for _ in range(count)]


def _on(tensor: Tensor):
    """Triton launches on the current device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
