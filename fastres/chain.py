"""Convolutions in training with batch norm and ReLU between them, as one autograd function.

The normalised activations between the convolutions are never kept, and where a backend's own
convolution serves never written: it normalises what it loads. Kept for backward are the raw outputs
of the convolutions, half of what the same sites keep one by one, see :mod:`fastres.autograd`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .autograd import conv_backward, needs_graph


class Convolution(NamedTuple):
    weight: Tensor  # (K, C / groups, R, S)
    bias: Tensor | None  # (K,)
    geometry: tuple  # stride, padding, dilation, groups, as the operators take them


class Norm(NamedTuple):
    """A batch norm with the batch's statistics; its vectors have (C,) values."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float


class Form(NamedTuple):
    """What of a chain is no tensor: a geometry for each convolution, momentum and eps of each batch
    norm, None where there is none; whether a ReLU ends it; who serves."""

    geometries: tuple
    numbers: tuple
    relu: bool
    backend: str

    def read(self, tensors) -> tuple[list[Convolution], list[Norm | None]]:
        """The inverse of :func:`_flat`."""
        first = 2 * len(self.geometries)  # of the batch norms' vectors
        convolutions = [
            Convolution(tensors[2 * i], tensors[2 * i + 1], geometry)
            for i, geometry in enumerate(self.geometries)
        ]
        norms = [
            numbers and Norm(*tensors[first + 4 * i : first + 4 * i + 4], *numbers)
            for i, numbers in enumerate(self.numbers)
        ]
        return convolutions, norms


def _flat(convolutions: list[Convolution], norms: list[Norm | None]) -> list[Tensor | None]:
    """Weight and bias of each convolution, then the vectors of each batch norm."""
    tensors = [tensor for conv in convolutions for tensor in conv[:2]]
    return tensors + [tensor for norm in norms for tensor in (norm[:4] if norm else (None,) * 4)]


def chain(
    input: Tensor, residual: Tensor | None, convolutions: list[Convolution],
    norms: list[Norm | None], relu: bool, backend: str,
) -> Tensor:  # fmt: skip
    """``act(norms[n](conv[n-1](relu(norms[n-1](... conv[0](relu(norms[0](input))))))) + residual)``.

    There is one batch norm more than there are convolutions. The first may be None: ``input`` is
    convolved as it is; and so may the last, where nothing follows the convolution. ``backend`` is
    one that has ``fastres::bn_relu_conv``.
    """
    if residual is input and torch.compiler.is_compiling():
        residual = input.view_as(input)  # a compiler refuses a tensor that is given twice
    numbers = tuple(norm and norm[4:] for norm in norms)
    form = Form(tuple(conv.geometry for conv in convolutions), numbers, relu, backend)
    tensors = _flat(convolutions, norms)
    if needs_graph(input, residual, *tensors):
        return Chain.apply(input, residual, form, *tensors)
    return _forward(input, residual, form, tensors)[0]


def _forward(input: Tensor, residual: Tensor | None, form: Form, tensors):
    """The output; what each batch norm normalised, and its statistics."""
    operators = ops.OPERATORS[form.backend]
    convolutions, norms = form.read(tensors)
    value, values, statistics = input, [input], [(None, None)]
    if (first := norms[0]) is not None:
        statistics = [operators.bn_relu_moments(input, *first[:2], *first[4:])]
    for conv, before, norm in zip(convolutions, norms[:-1], norms[1:], strict=True):
        vectors = (None, None) if before is None else (before.weight, before.bias)
        running = (None, None) if norm is None else (norm.running_mean, norm.running_var)
        momentum_eps = (0.0, 0.0) if norm is None else norm[4:]
        value, *moments = operators.bn_relu_conv(
            value, *statistics[-1], *vectors, conv.weight, conv.bias, *running, *conv.geometry,
            *momentum_eps, norm is not None,
        )  # fmt: skip
        values.append(value)
        statistics.append(moments)
    if (last := norms[-1]) is None:
        return value, [*values[:-1], None], [*statistics[:-1], (None, None)]
    output = operators.bn_relu_apply(
        value, residual, *statistics[-1], last.weight, last.bias, form.relu
    )
    return output, values, statistics


class Chain(torch.autograd.Function):
    """:func:`chain`. Saved are ``input``, the convolutions' raw outputs, the per-channel vectors
    and, only with a residual, the output: without one the last ReLU's mask is computed anew."""

    @staticmethod
    def forward(ctx, input, residual, form, *tensors):
        output, values, statistics = _forward(input, residual, form, tensors)
        masked = output if form.relu and residual is not None else None
        convolutions, norms = form.read(tensors)
        ctx.form = form
        ctx.save_for_backward(
            masked, *values, *[vector for pair in statistics for vector in pair],
            *[tensor for conv in convolutions for tensor in conv[:2]],
            *[vector for norm in norms for vector in (norm[2:4] if norm else (None, None))],
        )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx, grad_output):
        saved = _Saved.of(ctx.form, ctx.saved_tensors)
        needs = _Needs(ctx.needs_input_grad, len(ctx.form.geometries))
        if torch.is_grad_enabled():
            return _differentiable(ctx.form, saved, needs, grad_output)
        return _backward(ctx.form, saved, needs, grad_output)


class _Saved(NamedTuple):
    masked: Tensor | None
    values: tuple  # what the i-th batch norm normalised, or the convolution behind it takes
    statistics: list  # its mean and invstd
    filters: list  # weight and bias of the i-th convolution
    vectors: list  # weight and bias of the i-th batch norm

    @classmethod
    def of(cls, form: Form, tensors) -> "_Saved":
        convolutions = len(form.geometries)
        norms = convolutions + 1
        pairs = [tuple(tensors[i : i + 2]) for i in range(1 + norms, len(tensors), 2)]
        return cls(
            tensors[0], tensors[1 : 1 + norms], pairs[:norms], pairs[norms:-norms], pairs[-norms:]
        )


class _Needs:
    """Which gradients are needed, by their place among the arguments of ``Chain.forward``."""

    FIRST = 3  # of the tensors

    def __init__(self, needed, convolutions: int):
        self.needed, self.convolutions = needed, convolutions
        self.gradients = [None] * len(needed)

    def filters(self, i: int) -> int:
        """Of the i-th convolution's weight; the bias is next."""
        return self.FIRST + 2 * i

    def vectors(self, i: int) -> int:
        """Of the i-th batch norm's weight; the bias is next."""
        return self.FIRST + 2 * self.convolutions + 4 * i + 2

    def pair(self, place: int) -> list[bool]:
        return [self.needed[place], self.needed[place + 1]]

    def below(self, i: int) -> bool:
        """Whether anything needs the gradient of what the i-th batch norm normalises."""
        if self.needed[0]:
            return True
        return any(any(self.pair(self.filters(j)) + self.pair(self.vectors(j))) for j in range(i))

    def give(self, place: int, tensors, gradients) -> None:
        """The gradients of the pair at ``place``, those that are needed."""
        for at, tensor, gradient in zip((place, place + 1), tensors, gradients, strict=True):
            if self.needed[at]:
                self.gradients[at] = gradient.to(tensor.dtype)


def _backward(form: Form, saved: _Saved, needs: _Needs, grad: Tensor) -> tuple:
    operators, last = ops.OPERATORS[form.backend], len(form.geometries)
    if form.numbers[last] is not None:
        vectors, place = saved.vectors[last], needs.vectors(last)
        grad, grad_residual, *gradients = operators.bn_relu_backward(
            grad, saved.values[last], saved.masked, *vectors, *saved.statistics[last], True,
            form.relu, [needs.below(last), needs.needed[1], any(needs.pair(place))],
        )  # fmt: skip
        needs.give(place, vectors, gradients)
        if needs.needed[1]:
            needs.gradients[1] = grad_residual
    for i in range(last - 1, -1, -1):
        value, filters, geometry = saved.values[i], saved.filters[i], form.geometries[i]
        wanted = needs.pair(needs.filters(i))
        if form.numbers[i] is None:
            grad, *gradients = conv_backward(
                operators, grad, value, filters[0], geometry, [needs.below(i), *wanted]
            )
        else:
            vectors, place = saved.vectors[i], needs.vectors(i)
            mask = [needs.below(i), any(needs.pair(place)), *wanted]
            if not any(mask):
                break
            grad, scale, shift, *gradients = operators.bn_relu_conv_backward(
                grad, value, *saved.statistics[i], *vectors, filters[0], *geometry, mask
            )
            needs.give(place, vectors, (scale, shift))
        needs.give(needs.filters(i), filters, gradients)
    if needs.needed[0]:
        needs.gradients[0] = grad
    return tuple(needs.gradients)


def _differentiable(form: Form, saved: _Saved, needs: _Needs, grad: Tensor) -> tuple:
    """A graph of the backward: PyTorch's own gradients of the forward, which is made again."""
    if saved.masked is not None:
        grad = torch.where(saved.masked <= 0, 0, grad)
    if needs.needed[1]:
        needs.gradients[1] = grad
    value, last = saved.values[0], len(form.geometries)
    leaves = {0: value}
    for i, numbers in enumerate(form.numbers):
        if i > 0:
            weight, bias = saved.filters[i - 1]
            leaves |= dict(enumerate((weight, bias), needs.filters(i - 1)))
            value = F.conv2d(value, weight, bias, *form.geometries[i - 1])
        if numbers is not None:
            leaves |= dict(enumerate(saved.vectors[i], needs.vectors(i)))
            value = F.batch_norm(value, None, None, *saved.vectors[i], True, *numbers)
            value = F.relu(value) if i < last or (form.relu and saved.masked is None) else value
    places = [place for place in leaves if needs.needed[place]]
    if not places:
        return tuple(needs.gradients)
    found = torch.autograd.grad(value, [leaves[p] for p in places], grad, create_graph=True)
    for place, gradient in zip(places, found, strict=True):
        needs.gradients[place] = gradient
    return tuple(needs.gradients)
