"""Fused calls on modules: what :mod:`fastres.nn` and converted models run.

A *site* is a place where a convolution, a batch norm, a residual addition and a ReLU follow each
other. Every call looks at the modules as they are now: whatever the fused path does not cover (a
hook, a subclass, a replaced module, a residual that broadcasts) is called module by module, in the
order the model's author wrote, so that the answer is always the author's.
"""

import functools

import torch
from torch import Tensor, nn

from . import checks, functional, ops
from .arguments import compute_dtype, conv_output_size, resolve_padding
from .backend import extension_serves
from .fusable import Act, acts_apart, has_relu, why_not_act, why_not_conv, why_not_rest


def conv_bn_act(
    input: Tensor, conv: nn.Conv2d, bn: nn.Module, act: Act = None,
    residual: Tensor | None = None, via: tuple[nn.Module, ...] = (),
) -> Tensor:  # fmt: skip
    """``act(bn(conv(input)) + residual)``; ``via`` are identity modules behind ``bn``.

    The extension looks at plain modules faster than Python does; see ``csrc/sites.h``.
    """
    if extension_serves("conv_bn_relu"):
        output = ops.extension.conv_bn_act(input, conv, bn, act, residual, via)
        if output is not None:
            return output
    if why_not_conv(conv) or _dimensions(input) != 4:
        return bn_act(conv(input), bn, act, residual, via)
    if acts_apart(bn):
        output = bn.act(bn.drop(_conv_bn(input, conv, bn, None, False)))
        return _behind_bn(output, act, residual, via)
    if why_not_rest(bn, act, residual, via):
        return _behind_bn(bn(conv(input)), act, residual, via)
    if residual is not None and (act is None or not fits_convolution(residual, input, conv)):
        return _add_act(_conv_bn(input, conv, bn, None, False), residual, act)
    return _conv_bn(input, conv, bn, residual, act is not None or has_relu(bn))


def bn_act(
    input: Tensor, bn: nn.Module, act: Act = None,
    residual: Tensor | None = None, via: tuple[nn.Module, ...] = (),
) -> Tensor:  # fmt: skip
    """``act(bn(input) + residual)``; ``via`` are identity modules behind ``bn``."""
    if extension_serves("bn_relu"):
        output = ops.extension.bn_act(input, bn, act, residual, via)
        if output is not None:
            return output
    if why_not_rest(bn, act, residual, via) or _dimensions(input) != 4:
        return _behind_bn(bn(input), act, residual, via)
    if residual is not None and not alike(residual, input.shape, input.dtype, input.device):
        return _add_act(_bn(input, bn, None, False), residual, act)
    return _bn(input, bn, residual, act is not None or has_relu(bn))


def convolve(input: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(input)``, for a convolution that no batch norm follows.

    On a CPU it runs on fastres' own convolutions; in inference their weights are packed once: a
    batch norm that changes nothing is what they fold.
    """
    if extension_serves("conv_bn_relu"):
        output = ops.extension.convolve(input, conv)
        if output is not None:
            return output
    plain = type(input) is Tensor and input.dim() == 4 and input.device.type == "cpu"
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return conv(input)
    if torch.jit.is_tracing():  # a batch norm made now would become a part of the trace
        return conv(input)
    if input.dtype not in functional.CPU_CONV_DTYPES or input.dtype != conv.weight.dtype:
        return conv(input)
    if why_not_conv(conv):
        return conv(input)
    return conv_bn_act(input, conv, _unchanging(conv.out_channels, input.dtype))


@functools.cache
def _unchanging(channels: int, dtype: torch.dtype) -> nn.BatchNorm2d:
    """A batch norm whose scale is 1 and whose shift is 0."""
    eps = 1e-30  # nothing beside a variance of 1, but positive, as PyTorch 2.11 wants it
    with torch.inference_mode(False):
        return nn.BatchNorm2d(channels, eps=eps, affine=False, device="cpu", dtype=dtype).eval()


def add_act(input: Tensor, residual: Tensor, act: Act) -> Tensor:
    """``act(input + residual)``."""
    if (
        act is None
        or why_not_act(act)
        or not isinstance(residual, Tensor)
        or _dimensions(input) != 4
        or not alike(residual, input.shape, input.dtype, input.device)
    ):
        return _add_act(input, residual, act)
    return functional.add_relu(input, residual)


def _dimensions(input: Tensor) -> int:
    """Asked of an input only where no module's own forward is to see it: ``TypeError`` for what is
    no tensor."""
    checks.tensor("input", input)
    return input.dim()


# --- the calls of functional ----------------------------------------------------------------------


def _conv_bn(input, conv, bn, residual, relu) -> Tensor:
    running_mean, running_var, training, momentum = statistics_of(bn)
    call = functional.conv_bn_relu if relu else functional.conv_bn
    operands = (input, conv.weight)
    if residual is not None:
        call, operands = functional.conv_bn_add_relu, (input, residual, conv.weight)
    batches = count_batch(bn)
    try:
        return call(
            *operands, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
            running_mean, running_var, bn.weight, bn.bias, training, momentum, bn.eps,
        )  # fmt: skip
    except functional.REFUSED:
        uncount(batches)
        raise


def _bn(input, bn, residual, relu) -> Tensor:
    running_mean, running_var, training, momentum = statistics_of(bn)
    batches = count_batch(bn)
    try:
        return functional.batch_norm(
            input, residual, running_mean, running_var, bn.weight, bn.bias,
            training, momentum, bn.eps, relu,
        )  # fmt: skip
    except functional.REFUSED:
        uncount(batches)
        raise


def statistics_of(bn: nn.Module) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """``running_mean, running_var, training, momentum`` as ``nn.BatchNorm2d.forward`` has them."""
    if not isinstance(bn, nn.BatchNorm2d):  # frozen: the statistics are constants
        return bn.running_mean, bn.running_var, False, 0.0
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    if bn.training and not bn.track_running_stats:
        return None, None, training, 0.0
    momentum = bn.momentum
    if momentum is None:  # a cumulative average
        counted = bn.training and bn.num_batches_tracked is not None
        momentum = 1.0 / float(bn.num_batches_tracked + 1) if counted else 0.0
    return bn.running_mean, bn.running_var, training, momentum


def count_batch(bn: nn.Module) -> Tensor | None:
    """Count a batch before it is normalised, as ``nn.BatchNorm2d`` does; gives the counter."""
    if not (bn.training and isinstance(bn, nn.BatchNorm2d) and bn.track_running_stats):
        return None
    batches = bn.num_batches_tracked
    return None if batches is None else batches.add_(1)


def uncount(batches: Tensor | None) -> None:
    if batches is not None:
        batches.sub_(1)


def _behind_bn(output: Tensor, act: Act, residual, via) -> Tensor:
    """Module by module."""
    for module in via:
        output = module(output)
    return _add_act(output, residual, act)


def _add_act(output: Tensor, residual, act: Act) -> Tensor:
    if residual is not None:
        output = output + residual
    return output if act is None else act(output)


def fits_convolution(residual: Tensor, input: Tensor, conv: nn.Conv2d) -> bool:
    padding = resolve_padding(conv.padding, conv.weight, conv.stride, conv.dilation)
    size = conv_output_size(input.shape, conv.weight.shape, conv.stride, padding, conv.dilation)
    return alike(residual, size, compute_dtype(input), input.device)


def alike(tensor: Tensor, shape, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
