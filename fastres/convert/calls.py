"""Additions as an author wrote them, in front of :mod:`fastres.sites`.

``out += x`` keeps the shape and dtype of ``out``, which ``out + x`` need not; and an operand may be a
number. Only where that makes no difference, the addition is part of a site.
"""

import operator

from torch import Tensor

from .. import branches, fusable, ops, sites
from ..backend import extension_serves


def conv_bn_add_act(input, conv, bn, act, residual, via=(), in_place=False):
    """``act(bn(conv(input)) + residual)``, or ``+=``."""
    if extension_serves("conv_bn_relu"):
        output = ops.extension.conv_bn_act(input, conv, bn, act, residual, via)
        if output is not None:  # and so the residual fits
            return output
    if in_place and not _fits(residual, input, conv):
        output = sites.conv_bn_act(input, conv, bn, via=via)
        return act(operator.iadd(output, residual))
    return sites.conv_bn_act(input, conv, bn, act, residual, via)


def bn_add_act(input, bn, act, residual, via=(), in_place=False):
    """``act(bn(input) + residual)``, or ``+=``."""
    if in_place and not _alike(residual, input):
        return act(operator.iadd(sites.bn_act(input, bn, via=via), residual))
    return sites.bn_act(input, bn, act, residual, via)


def add_act(input, residual, act, in_place=False):
    """``act(input + residual)``, or ``+=``."""
    if _alike(residual, input):
        return sites.add_act(input, residual, act)
    return act((operator.iadd if in_place else operator.add)(input, residual))


def branch(input, links, residual=None, in_place=False):
    """Sites one after the other, ``residual`` added to the last one's, or ``+=``: a tuple of
    convolution or None, batch norm, activation and identities for each."""
    links = tuple(branches.Link(*link) for link in links)
    if branches.serves(input, links) and branches.fits(residual, input, links):
        return branches.run(input, links, residual)
    *inner, (conv, bn, act, via) = links
    for link in inner:
        if link.conv is None:
            input = sites.bn_act(input, *link[1:3], via=link.via)
        else:
            input = sites.conv_bn_act(input, *link[:3], via=link.via)
    if residual is None:
        return sites.conv_bn_act(input, conv, bn, act, via=via)
    return conv_bn_add_act(input, conv, bn, act, residual, via, in_place)


def _fits(residual, input: Tensor, conv) -> bool:
    """Whether the residual has the shape and dtype of what the convolution gives."""
    if not (isinstance(residual, Tensor) and isinstance(input, Tensor)) or input.dim() != 4:
        return False
    if fusable.why_not_conv(conv):
        return False
    return sites.fits_convolution(residual, input, conv)


def _alike(residual, input) -> bool:
    if not (isinstance(residual, Tensor) and isinstance(input, Tensor)):
        return False
    return residual.shape == input.shape and residual.dtype == input.dtype
