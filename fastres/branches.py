"""A residual block's branch on modules: convolutions with batch norm and ReLU between them.

In training, on the backends that have the operators, it is one call of :mod:`fastres.chain`. As the
calls of :mod:`fastres.sites`, each looks at the modules as they are now.
"""

import functools
import os
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from . import chain, checks, choice, functional, fusable, ops, sites
from .arguments import compute_dtype, conv_output_size, pair, resolve_padding
from .backend import extension_serves, serving

ENVIRONMENT_VARIABLE = "FASTRES_CHAINED"


class chained:
    """Context manager: whether branches are chains inside, or their sites run one by one.

    >>> with fastres.chained(False):
    ...     loss = criterion(model(images), target)

    The choice is one for the process, as :class:`fastres.backend` is.

    Raises ``TypeError`` for anything but a bool.
    """

    def __init__(self, chained: bool):
        if not isinstance(chained, bool):
            raise TypeError(f"chained: expected a bool, got {chained!r}")
        self.chained = chained
        self._outer: list[bool] = []  # a stack: the same object may be entered again inside itself

    def __enter__(self) -> Self:
        global _chained
        self._outer.append(_chained)
        _chained = self.chained
        return self

    def __exit__(self, *exception) -> None:
        global _chained
        _chained = self._outer.pop()


def _asked() -> bool:
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected 0 or 1, got {asked!r}")
    return asked == "1"


_chained = _asked()


class Link(NamedTuple):
    """A site of a branch: ``act(bn(conv(input)))``, ``via`` identity modules behind ``bn``. The
    first may have no convolution, the last no batch norm."""

    conv: nn.Conv2d | None
    bn: nn.Module | None
    act: fusable.Act = None
    via: tuple[nn.Module, ...] = ()


def serves(input: Tensor, links: tuple[Link, ...]) -> bool:
    """Whether :func:`run` may stand for the sites: all in training, of modules that nobody watches,
    on a backend that has the operators, with arguments that fit."""
    if not _chained or len(links) < 2 or extension_serves("conv_bn_relu"):
        return False
    if not isinstance(input, Tensor) or input.dim() != 4 or not input.numel():
        return False
    if not _are_plain(links):
        return False
    backend = _backend(input, links)
    if backend == "eager" or ops.OPERATORS[backend].bn_relu_conv is None:
        return False
    return _fit(input, links)


def _backend(input: Tensor, links: tuple[Link, ...]) -> str:
    """What serves all of the convolutions; "eager" where they are not of one mind."""
    found = {
        serving("conv_bn_relu", input.device, functools.partial(_chosen_by, input, link.conv))
        for link in links
        if link.conv is not None
    }
    return found.pop() if len(found) == 1 else "eager"


def _chosen_by(input: Tensor, conv: nn.Conv2d) -> choice.Convolution:
    # of the chain's input only dtype and format count
    return choice.Convolution.of(
        input, conv.weight, conv.stride, conv.dilation, conv.groups, training=True
    )


def _are_plain(links: tuple[Link, ...]) -> bool:
    modules = [id(module) for link in links for module in link[:2] if module is not None]
    if len(set(modules)) < len(modules):
        return False
    for conv, bn, act, via in links:
        if conv is not None and fusable.why_not_conv(conv):
            return False
        if bn is None:
            continue
        if fusable.why_not_rest(bn, act, None, via) or not isinstance(bn, nn.BatchNorm2d):
            return False
        # None: a cumulative average, of which each site asks the device
        if not bn.training or bn.momentum is None:
            return False
    return all(act is not None or fusable.has_relu(bn) for _, bn, act, _ in links[:-1])


def _fit(input: Tensor, links: tuple[Link, ...]) -> bool:
    """Whether no site would refuse its arguments, which it reports itself."""
    dtype = compute_dtype(input)
    if links[0].conv is None and dtype != input.dtype:
        return False  # batch norm in the input's dtype, convolutions in autocast's
    value = input
    try:
        for conv, bn, *_ in links:
            vectors = () if bn is None else (*sites.statistics_of(bn)[:2], bn.weight, bn.bias)
            if conv is None:
                checks.bn_relu(value, None, *vectors, True, bn.eps)
                continue
            operands = (value, conv.weight, conv.bias)
            window = (conv.stride, conv.padding, conv.dilation, conv.groups)
            if bn is None:
                checks.conv(*operands, *window)
            else:
                checks.conv_bn_relu(*operands, None, *vectors, *window, True, bn.eps)
            value = input.new_empty((), dtype=dtype).expand(_size(value.shape, conv))
    except functional.REFUSED:
        return False
    return True


def _size(size, conv: nn.Conv2d) -> tuple[int, ...]:
    """Of the convolution's output."""
    padding = resolve_padding(conv.padding, conv.weight, conv.stride, conv.dilation)
    pairs = pair("stride", conv.stride), padding, pair("dilation", conv.dilation)
    return conv_output_size(size, conv.weight.shape, *pairs)


def run_links(x: Tensor, links: tuple[Link, ...]) -> Tensor:
    """The links one after the other, as one call where that serves."""
    if serves(x, links):
        return run(x, links)
    for conv, bn, act, _ in links:
        if conv is None:
            x = sites.bn_act(x, bn, act)
        else:
            x = sites.convolve(x, conv) if bn is None else sites.conv_bn_act(x, conv, bn, act)
    return x


def run(input: Tensor, links: tuple[Link, ...], residual: Tensor | None = None) -> Tensor:
    """The links one after the other, ``residual`` added before the last one's ReLU; only where
    :func:`serves`."""
    last = links[-1]
    bn_has_relu = last.bn is not None and fusable.has_relu(last.bn)
    fused = residual is None or (
        last.act is not None and not bn_has_relu and fits(residual, input, links)
    )
    relu = bn_has_relu or (fused and last.act is not None)
    output = _counted(input, links, residual if fused else None, relu)
    return output if fused else sites.add_act(output, residual, last.act)


def fits(residual, input: Tensor, links: tuple[Link, ...]) -> bool:
    """Whether ``residual`` is None, or a tensor like what the last convolution gives."""
    if not isinstance(residual, Tensor):
        return residual is None
    size = input.shape
    for link in links:
        size = size if link.conv is None else _size(size, link.conv)
    return sites.alike(residual, size, compute_dtype(input), input.device)


def _counted(input: Tensor, links: tuple[Link, ...], residual: Tensor | None, relu: bool) -> Tensor:
    """:func:`fastres.chain.chain` of the modules' tensors, each batch norm having seen a batch."""
    dtype = compute_dtype(input)
    convolutions = [_convolution(link.conv, dtype) for link in links if link.conv is not None]
    norms = [None if link.bn is None else _norm(link.bn) for link in links]
    if links[0].conv is not None:
        norms = [None, *norms]
    counted = [sites.count_batch(bn) for _, bn, *_ in links if bn is not None]
    backend = _backend(input, links)
    try:
        return chain.chain(input.to(dtype), residual, convolutions, norms, relu, backend)
    except functional.REFUSED:
        for batches in counted:
            sites.uncount(batches)
        raise


def _convolution(conv: nn.Conv2d, dtype: torch.dtype) -> chain.Convolution:
    weight = conv.weight.to(dtype)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    window = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return chain.Convolution(weight, bias, functional.geometry_of(weight, *window))


def _norm(bn: nn.BatchNorm2d) -> chain.Norm:
    running_mean, running_var, _, momentum = sites.statistics_of(bn)
    return chain.Norm(running_mean, running_var, bn.weight, bn.bias, momentum, bn.eps)
