"""The error rule every fused operator is held to, and the tensors it is tried on.

    err(ours) <= 2 * err(eager, same dtype) + atol

Both errors are elementwise maxima against fp64 PyTorch on inputs rounded to that dtype. ``atol``
counts units in the last place of the largest value (at least of 1): on a small tensor eager may hit
the fp64 result by luck, and twice nothing would leave no room for another, equally good rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# One unit where a wider accumulator is rounded once. fp32 and fp64 are their own accumulators: every
# partial sum is rounded too. Eager sums fp32 in fp64 on a CPU, and its fp64 is the truth itself.
UNITS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 8, torch.float64: 32}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "sliced_last",
    "transposed",
    "expanded",
)


def spread(shape, dtype=torch.float64, layout="contiguous", mean=0.0, std=1.0) -> Tensor:
    """Normal values in ``dtype``, laid out in memory as named."""
    n, c, h, w = shape
    if layout == "expanded":  # one value a channel and row, repeated with stride 0
        return (torch.randn(n, c, h, 1, dtype=torch.float64) * std + mean).to(dtype).expand(shape)
    if layout.startswith("sliced"):
        whole = torch.randn(n + 1, 2 * c, h + 2, w + 1, dtype=torch.float64) * std + mean
        whole = whole.to(dtype)
        if layout == "sliced_last":
            whole = whole.to(memory_format=torch.channels_last)
        return whole[1:, ::2, 1:-1, 1:]
    if layout == "transposed":
        return (torch.randn(n, c, w, h, dtype=torch.float64) * std + mean).to(dtype).mT
    values = (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)
    last = layout == "channels_last"
    return values.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def parameter_dtype(dtype: torch.dtype, mixed: bool) -> torch.dtype:
    """What parameters and statistics are kept in: the activations' dtype, or fp32 when mixed."""
    return torch.float32 if mixed else dtype


def batch_norm_operands(channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Running statistics and parameters away from their defaults, some weights negative."""
    return {
        "running_mean": torch.randn(channels, dtype=torch.float64).to(dtype),
        "running_var": (torch.rand(channels, dtype=torch.float64) + 0.5).to(dtype),
        "weight": torch.randn(channels, dtype=torch.float64).to(dtype),
        "bias": torch.randn(channels, dtype=torch.float64).to(dtype),
    }


BUFFERS = ("running_mean", "running_var")


def outcome(call: Callable, operands: dict[str, Tensor | None], grad: Tensor | None = None) -> dict:
    """Everything a call gives: ``output``, the buffers it left behind, and with ``grad`` the
    gradient of every operand that is no buffer. The operands themselves stay as they are."""
    leaves = {}
    for name, operand in operands.items():
        if operand is None:
            leaves[name] = None
        elif name in BUFFERS:
            leaves[name] = operand.clone()
        else:
            leaves[name] = operand.detach().requires_grad_(grad is not None)
    output = call(**leaves)
    results = {"output": output.detach()}
    wanted = {
        name: leaf for name, leaf in leaves.items() if leaf is not None and name not in BUFFERS
    }
    if grad is not None:
        gradients = torch.autograd.grad(output, list(wanted.values()), grad.to(output.dtype))
        results |= {f"grad of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return results | {name: leaves[name] for name in BUFFERS if leaves.get(name) is not None}


def widened(operands: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: t if t is None else t.double() for name, t in operands.items()}


def away_from_zero(grad: Tensor, before_relu: Tensor, margin: float = 0.1) -> Tensor:
    """``grad`` without the places where a ReLU's argument is near zero.

    There another rounding flips the mask, an O(1) difference that means nothing; with a zero
    gradient it has no consequence. All other places still check the mask.
    """
    return torch.where(before_relu.abs() < margin, 0, grad)


def assert_rule(ours: dict, eager: dict, truth: dict, atol_dtype=None, scale: float = 1.0) -> None:
    """The error rule for every result of :func:`outcome`. ``atol_dtype`` is the dtype whose last
    place counts where intermediate results are rounded more coarsely than the final one."""
    assert ours.keys() == eager.keys() == truth.keys()
    for name, result in ours.items():
        assert result.dtype == eager[name].dtype, f"{name}: {result.dtype}, not {eager[name].dtype}"
        assert result.shape == truth[name].shape, f"{name}: {result.shape}, not {truth[name].shape}"
        assert_close(result, eager[name], truth[name], name, atol_dtype or result.dtype, scale)


def assert_close(ours, eager, truth, name="result", atol_dtype=None, scale=1.0) -> None:
    """``err(ours) <= 2 * err(eager) + atol``; the worst element is named where it does not hold."""
    if not truth.numel():
        return
    ours_error, eager_error = ((t.double() - truth).abs() for t in (ours, eager))
    dtype = atol_dtype or ours.dtype
    unit = torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
    atol = scale * UNITS[dtype] * unit
    bound = 2 * eager_error.max().item() + atol
    worst = ours_error.argmax()
    index = tuple(int(i) for i in torch.unravel_index(worst, ours_error.shape))
    assert ours_error[index].item() <= bound, (
        f"{name} at {index}: ours {ours[index].item()!r}, eager {eager[index].item()!r}, fp64 "
        f"{truth[index].item()!r}; error {ours_error[index].item():.3g} > 2 * "
        f"{eager_error.max().item():.3g} + {atol:.3g}"
    )


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        bits = (t.contiguous().view(torch.uint8) for t in (value, other[name]))
        assert torch.equal(*bits), f"{name} differs: {(value - other[name]).abs().max()} at most"


def assert_like_eager(ours: dict, eager: dict, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """NaN and Inf in the same places, all else close: for values that have no error to speak of."""
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, eager[name], rtol=rtol, atol=atol, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


class Calls(TorchDispatchMode):
    """Records the fused operators that run inside, in order, as ``(name, arguments)``; those that
    refuse their arguments do not run. A convolution alone is nothing fused."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("fastres::")
        if func.namespace == "fastres" and name not in ("conv", "conv_dgrad"):
            self.made.append((name, args))
        return output

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]
