"""Stochastic depth on any residual family: blocks that are left out at random while training.

Huang, Sun, Liu, Sedra, Weinberger 2016, "Deep Networks with Stochastic Depth". What a block does
with its probability is in :class:`fastres.residual.Residual`.
"""

from torch import nn

from ..residual import residual_blocks


def survivals(count: int, last: float = 0.5) -> list[float]:
    """Linear decay ``p_l = 1 - l / L * (1 - p_L)`` for blocks l = 1 ... L (equation 4)."""
    if not isinstance(last, (int, float)) or not 0 < last <= 1:
        raise ValueError(f"stochastic_depth: expected a probability in (0, 1], got {last!r}")
    return [1 - index / count * (1 - last) for index in range(1, count + 1)]


def set_stochastic_depth(model: nn.Module, last: float = 0.5) -> nn.Module:
    """Give every residual block of ``model`` its probability of survival; returns ``model``.

    ``last`` is that of the last block, p_L. ``last=1`` undoes it. Under DistributedDataParallel a
    dropped block's parameters get no gradient: it needs ``find_unused_parameters=True``.
    """
    blocks = [block for block in residual_blocks(model) if block.has_shortcut]
    if not blocks:
        raise ValueError(f"stochastic_depth: {type(model).__name__} has no residual block")
    for block, survival in zip(blocks, survivals(len(blocks), last), strict=True):
        block.survival = survival
    return model
