"""Swap the forwards of an existing model's modules for fused ones."""

import copy

from torch import nn

from .plan import build
from .region import entries
from .summary import Summary, summary
from .swap import is_candidate, restore_class, swap_class

__all__ = ["Summary", "convert", "revert", "summary"]


def convert(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Fuse what can be fused in ``model`` and return it, with the same modules and numbers.

    Every module whose forward holds a pattern of convolution, batch norm, addition and ReLU gets a
    sub-class of its own class whose forward calls the fused operators; names, parameters, buffers,
    hooks, ``state_dict`` and ``isinstance`` stay what they are. What does not fit runs as before:
    ``print(fastres.summary(model))`` shows each place and the reason. Calling it again converts
    what has been added since. With ``inplace=False`` a deep copy is converted and returned.

    On CPU the converted part computes in channels_last; results come in the caller's format. Where
    it draws random numbers, training keeps the caller's format, in which a seed means the same.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    _check(model)
    if not inplace:
        model = copy.deepcopy(model)
    known: dict = {}
    plans = {module: build(module, known) for module in model.modules() if is_candidate(module)}
    starts = entries(model, plans, known)
    within = {inner for start in starts for inner in start.modules()}
    for module, plan in plans.items():
        if plan.serves or module in starts or (plan.rewritten and module in within):
            swap_class(module, plan, starts.get(module, ""))
        else:
            restore_class(module)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give every module in ``model`` its own class and forward back; returns ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        RuntimeError: another tool has sub-classed a converted module (parametrizations do).
    """
    _check(model)
    for module in list(model.modules()):
        restore_class(module)
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
