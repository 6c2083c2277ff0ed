"""add_relu and bn_relu, forward and backward, against what copying reaches."""

import functools

import torch
import torch.nn.functional as F
from cases import block_outputs, normalised_maps

from fastres import ops, reference

from . import providers
from .measured import SLACK, measure, relative_error

BATCH = 256


class Operands:
    """bf16, channels_last, with parameters and statistics in fp32."""

    def __init__(self, channels: int, size: int, batch: int, device: torch.device):
        def activation():
            values = torch.randn(batch, channels, size, size, device=device)
            return values.to(torch.bfloat16, memory_format=torch.channels_last)

        self.x, self.residual, self.dy = (activation() for _ in "abc")
        self.mean, self.bias = (torch.randn(channels, device=device) for _ in "ab")
        self.var, self.weight = (torch.rand(channels, device=device) + 0.5 for _ in "ab")
        self.bytes = self.x.numel() * self.x.element_size()


def run(emit, budget, device, shapes=None, batch: int = BATCH) -> None:
    """``shapes``: (channels, size, whether a residual is added)."""
    if shapes is None:
        shapes = [(*s, True) for s in block_outputs()] + [(*s, False) for s in normalised_maps()]
    shares = budget.share(shapes)
    for (channels, size, residual), seconds in shares:
        operands = Operands(channels, size, batch, device.device)
        kinds = _kinds(operands, residual)
        for kind, (passes, calls) in kinds.items():
            truth = calls.pop("truth")()
            allowed = 2 * relative_error(calls["eager"](), truth) + SLACK
            for provider, call in calls.items():
                measure(
                    emit, device, call, truth=truth, allowed=allowed,
                    seconds=min(seconds / len(kinds) / len(calls) / 2, 0.1), provider=provider,
                    case=f"{channels}x{size}x{size}", kind=kind, bytes=passes * operands.bytes,
                    map_bytes=operands.bytes,
                )  # fmt: skip
        del operands, kinds, calls, truth
        device.empty_cache()
    for channels, size, _ in shares.left_out:
        emit(case=f"{channels}x{size}x{size}", bad="no time left")


def _kinds(o: Operands, residual: bool) -> dict[str, tuple[int, dict]]:
    """Name to how often the map is read or written at least, and who does it."""
    r = o.residual if residual else None
    more = int(residual)
    what = "bn_add_relu" if residual else "bn_relu"
    kinds = {
        f"{what} eval": (2 + more, _calls("bn_relu", o, r, _forward, False)),
        f"{what} training": (3 + more, _calls("bn_relu", o, r, _forward, True)),
        # dy and x twice, dx once; beside a residual the output twice and its gradient once
        f"{what} backward": (5 + 3 * more, _calls("bn_relu_backward", o, r, _backward, True)),
    }
    if residual:
        kinds["add_relu"] = (3, _calls("add_relu", o, r, _add, False))
        kinds["add_relu backward"] = (3, _calls("add_relu_backward", o, r, _add_backward, False))
    return kinds


def _calls(operator: str, o: Operands, residual, call, training: bool) -> dict:
    calls = {
        "eager": functools.partial(call, "eager", o, residual, training),
        "truth": functools.partial(call, "truth", o, residual, training),
    }
    for name in providers.served(operator):
        calls[f"fastres-{name}"] = functools.partial(call, name, o, residual, training)
    return calls


def _forward(backend: str, o: Operands, residual, training: bool):
    x, residual = (_as(backend, t) for t in (o.x, residual))
    vectors = (o.mean.clone(), o.var.clone(), o.weight, o.bias)
    if backend in ("eager", "truth"):
        y = F.batch_norm(x, *vectors, training, 0.1, 1e-5)
        return F.relu(y if residual is None else y + residual)
    return ops.OPERATORS[backend].bn_relu(x, residual, *vectors, training, 0.1, 1e-5, True)[0]


def _backward(backend: str, o: Operands, residual, training: bool):
    """The input's gradient; with every other one computed too."""
    x, dy = (_as(backend, t) for t in (o.x, o.dy))
    output = None if residual is None else o.residual  # any tensor with both signs is a mask
    mask = [True, residual is not None, True]
    mean, invstd = o.mean * 0, o.var * 0 + 1
    if backend == "truth":
        output = _as(backend, output)
        return reference.bn_relu_backward(
            dy, x, output, o.weight, o.bias, mean, invstd, True, True, mask
        )[0]
    if backend == "eager":
        y = output
        if y is None:
            y = F.batch_norm(x, mean, o.var * 0 + (1 - 1e-5), o.weight, o.bias, False, 0.0, 1e-5)
        g = torch.ops.aten.threshold_backward(dy, y, 0)
        return torch.ops.aten.native_batch_norm_backward(
            g, x, o.weight, None, None, mean, invstd, True, 1e-5, [True] * 3
        )[0]
    return ops.OPERATORS[backend].bn_relu_backward(
        dy, x, output, o.weight, o.bias, mean, invstd, True, True, mask
    )[0]


def _add(backend: str, o: Operands, residual, training: bool):
    x, r = (_as(backend, t) for t in (o.x, residual))
    if backend in ("eager", "truth"):
        return F.relu(x + r)
    return ops.OPERATORS[backend].add_relu(x, r)


def _add_backward(backend: str, o: Operands, residual, training: bool):
    dy, y = (_as(backend, t) for t in (o.dy, residual))
    if backend in ("eager", "truth"):
        return torch.ops.aten.threshold_backward(dy, y, 0)
    return ops.OPERATORS[backend].add_relu_backward(dy, y)


def _as(backend: str, tensor):
    return tensor.float() if backend == "truth" and tensor is not None else tensor
