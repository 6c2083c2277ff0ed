"""What a trained network loses with its blocks, and which paths its gradient takes.

Veit, Wilber, Belongie 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow
Networks". A residual network of n blocks is 2^n paths; deleting a block leaves half of them. A
plain network is a single path.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .residual import Residual, residual_blocks

Score = Callable[[], float]


class Deletion(NamedTuple):
    """The score of a network without ``blocks`` (names), ``deleted`` of them."""

    deleted: int
    blocks: str
    score: float


class PathLength(NamedTuple):
    """Paths through ``length`` branches: the mean norm of the gradient that reaches the images
    along one, the share of such paths, and their share of the whole gradient."""

    length: int
    gradient: float
    paths: float
    share: float


def deletable(model: nn.Module) -> dict[str, Residual]:
    """The blocks of ``model`` that can be left out, by name: all that have a shortcut, and those
    plain ones that keep the shape. Raises ``ValueError`` where there are none."""
    found = {
        name: block
        for name, block in model.named_modules()
        if isinstance(block, Residual) and (block.has_shortcut or block.keeps_shape)
    }
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no block of fastres to delete")
    return found


@contextmanager
def without(blocks: Iterable[Residual]) -> Iterator[None]:
    """Inside, the branches of ``blocks`` are deleted."""
    before = [(block, block.survival) for block in blocks]
    try:
        for block, _ in before:
            block.survival = 0.0
        yield
    finally:
        for block, survival in before:
            block.survival = survival


def one_by_one(model: nn.Module, score: Score) -> list[Deletion]:
    """``score()`` of the whole network, then without each of its blocks."""
    rows = [Deletion(0, "", score())]
    for name, block in deletable(model).items():
        with without([block]):
            rows.append(Deletion(1, name, score()))
    return rows


def at_random(
    model: nn.Module, score: Score, counts: Sequence[int], repeats: int = 3, seed: int = 0
) -> list[Deletion]:
    """``score()`` without so many blocks as each of ``counts`` says: ``repeats`` sets of them."""
    blocks, rows = deletable(model), []
    draw = random.Random(seed)
    for count in counts:
        if not 0 <= count <= len(blocks):
            raise ValueError(f"counts: expected at most {len(blocks)} blocks, got {count}")
        for names in _drawn(draw, sorted(blocks), count, repeats):
            with without(blocks[name] for name in names):
                rows.append(Deletion(count, " ".join(names), score()))
    return rows


def _drawn(draw: random.Random, items: Sequence, count: int, repeats: int) -> list[list]:
    """``repeats`` different sets of ``count`` items, or all there are where those are fewer."""
    sets: dict[frozenset, list] = {}
    while len(sets) < min(repeats, math.comb(len(items), count)):
        chosen = draw.sample(items, count)
        sets.setdefault(frozenset(chosen), chosen)
    return list(sets.values())


@contextmanager
def one_path(blocks: Sequence[Residual], through: Iterable[Residual]) -> Iterator[None]:
    """Inside, the forward is the whole network's, but the gradient takes one path: the branch of
    the blocks in ``through`` and the shortcut of the others."""
    through = set(through)
    try:
        for block in blocks:
            block.forward = _one_way(block, block in through)
        yield
    finally:
        for block in blocks:
            del block.forward


def _one_way(block: Residual, branch: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return block.combine(x, x.detach()) if branch else block.combine(x.detach(), x)

    return forward


def gradient_by_path_length(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    samples: int = 8,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
) -> list[PathLength]:
    """Norm of the loss's gradient at the images by the length of its path (section 4.2 there).

    For every length k (or those in ``lengths``), ``samples`` different sets of k blocks are drawn;
    the network is in eval mode. Paths are binomially distributed, and most of the gradient comes
    along the short ones.
    """
    blocks = residual_blocks(model)
    if not blocks or not all(block.has_shortcut for block in blocks):
        raise ValueError(f"model: {type(model).__name__} is no residual network of fastres")
    draw, count = random.Random(seed), len(blocks)
    lengths = range(count + 1) if lengths is None else lengths
    means = []
    was_training = model.training
    model.eval()
    try:
        for length in lengths:
            norms = [
                _gradient(model, images, labels, blocks, through)
                for through in _drawn(draw, blocks, length, samples)
            ]
            means.append(sum(norms) / len(norms))
    finally:
        model.train(was_training)
    shares = [math.comb(count, length) / 2**count for length in lengths]
    total = sum(share * mean for share, mean in zip(shares, means, strict=True)) or 1.0
    return [
        PathLength(length, mean, share, share * mean / total)
        for length, mean, share in zip(lengths, means, shares, strict=True)
    ]


def _gradient(model, images, labels, blocks, through) -> float:
    """Mean over images of the norm of the gradient of their own loss."""
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad(), one_path(blocks, through):
        loss = F.cross_entropy(model(images), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    return gradient.flatten(1).norm(dim=1).mean().item()
