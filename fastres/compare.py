"""Measuring a model as fastres serves it beside eager PyTorch and ``torch.compile``.

The command ``fastres compare`` and the benchmarks share what is here: what a provider is, how
calls are timed, and when two outputs agree.

Timing: a round calls every provider once, one after the other, so that a machine that slows down
slows them all; figures are medians over the rounds, speed-ups medians of the ratio within a round.
Warm-up, compilation and weight packing happen before the first round.

Agreement: with ``err`` the largest elementwise error against an fp64 run of the same (rounded)
weights and inputs, ``err(fastres) <= 2 * err(eager) + atol``.
"""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .backend import ENVIRONMENT_VARIABLE, backend
from .convert import convert, summary
from .environment import environment
from .timing import fastest, interleave, keep_freed_memory, ratios, spread

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# what serves fastres' own operators inside each provider; None: whatever FASTRES_BACKEND says
PROVIDERS = {
    "eager": "eager",
    "compile": "eager",
    "compile-freezing": "eager",
    "fastres": None,
    "fastres-cpu": "cpu",
    "fastres-triton": "triton",
    "fastres-cuda": "cuda",
}
TRAINING_STEPS = 4
LEARNING_RATE = 1e-4

# atol of the agreement, as a share of the largest reference value. One rounding of the output
# where the error rule carries the rest; in fp64 eager is the reference itself, so its error is 0.
_OUTPUT_SLACK = {torch.float64: 1e-10}
# Losses after SGD steps: the steps amplify rounding, and a scalar may be right by luck.
_LOSS_SLACK = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


# --- agreement -----------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output (tensor, tuple, list, dict, nested), in order."""
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def max_error(output: Any, reference: Any) -> tuple[float, float]:
    """Largest absolute error, and the same relative to the largest reference value.

    NaN where the reference is NaN is no error, elsewhere it is an infinite one, and so are outputs
    of other shapes.
    """
    ours, theirs = tensors(output), tensors(reference)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf"), float("inf")
    largest = scale = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
        largest = max(largest, difference.max().item())
        finite = b[b.isfinite()]
        scale = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    return largest, (largest / scale if scale else (0.0 if largest == 0 else float("inf")))


def same_top(output: Any, expected: Any, tie: float, k: int = 5) -> int | None:
    """In how many rows the k highest classes are the same, in order, or differ only by ties
    (``expected`` logits at most ``tie`` apart). None unless both are one (N, classes) tensor."""
    ours, theirs = tensors(output), tensors(expected)
    if len(ours) != 1 or len(theirs) != 1 or ours[0].dim() != 2 or ours[0].shape != theirs[0].shape:
        return None
    k = min(k, ours[0].shape[1])
    logits = theirs[0].double()
    chosen = logits.gather(1, ours[0].topk(k).indices)
    return int(((chosen - logits.topk(k).values).abs() <= tie).all(1).sum())


# --- models --------------------------------------------------------------------------------------


def compiled(function: Callable) -> Callable:
    """``torch.compile`` for fixed shapes, which raises where it would silently stop compiling."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def compiling(freezing: bool):
    """Context in which compilation must take place (at the first call) to freeze the weights.

    ``torch.compile(options={"freezing": True})`` does not do it in PyTorch 2.13: there the
    convolutions stayed unfolded and took as long as without.
    """
    if not freezing:
        return nullcontext()
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)


def calibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the running statistics of every batch norm to the average over ``batches``.

    Freshly initialised they are 0 and 1, with which activations grow from block to block. The
    model's mode and the layers' momentum are restored. Returns the number of layers.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(layers)


def training_step(
    model: nn.Module, forward: Callable, images: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One SGD step as a call that returns the loss: cross-entropy against fixed labels for logits,
    mean square for other outputs. 16-bit ``dtype`` is autocast over fp32 parameters.

    The learning rate is low because a fresh ResNet-50 on a handful of small images is chaotic:
    rounding alone moved eager's losses by a tenth at 0.01, and by a hundredth at 0.0001.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    labels = torch.arange(len(images))
    narrow = dtype.itemsize < 4

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype if narrow else torch.bfloat16, enabled=narrow):
            output = forward(images)
        loss = _loss(output, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _loss(output: Any, labels: Tensor) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 2:
        wide = output if output.dtype == torch.float64 else output.float()
        return F.cross_entropy(wide, labels % output.shape[1])
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum(leaf.double().square().mean() for leaf in leaves if leaf.is_floating_point())


# --- the comparison ------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A provider, made ready: ``outputs`` of the agreement run, ``call`` for the timing, and how
    many ``sites`` of a converted model are fused."""

    provider: str
    backend: str
    memory_format: str
    outputs: list
    call: Callable[[], Any]
    sites: dict[str, int]
    seconds: list[float] = field(default_factory=list)


class ProviderError(RuntimeError):
    """Eager PyTorch or a compiler could not run the model; the message says why."""


def prepare(
    provider: str, model: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype,
    train: bool, memory_format: str,
) -> Candidate:  # fmt: skip
    """Copy ``model`` for ``provider``, run it on every batch (or a few SGD steps on the first)."""
    layout = FORMATS[memory_format]
    model = copy.deepcopy(model).to(memory_format=layout)
    batches = [batch.contiguous(memory_format=layout) for batch in batches]
    chosen = PROVIDERS[provider] or os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    forward: Callable = model
    if provider.startswith("compile"):
        forward = compiled(model)
    elif provider.startswith("fastres"):
        forward = model = convert(model)
    if train:
        step = training_step(model, forward, batches[0], dtype)
        calls = [step] * TRAINING_STEPS
    else:
        calls = [lambda batch=batch: forward(batch) for batch in batches]

    def timed() -> Any:
        with backend(chosen), torch.set_grad_enabled(train):
            return calls[0]()

    try:
        freezing = compiling(provider == "compile-freezing")
        with backend(chosen), torch.set_grad_enabled(train), freezing:
            outputs = [call() for call in calls]
            sites = _count_sites(model) if provider.startswith("fastres") else {}
    except Exception as error:
        if provider.startswith("fastres"):
            raise
        # Whatever the model or a compiler raises: what went wrong there, in one line.
        reason = str(error).strip().splitlines() or [""]
        raise ProviderError(f"{type(error).__name__}: {reason[0]}") from error
    return Candidate(provider, chosen, memory_format, outputs, timed, sites)


def _count_sites(model: nn.Module) -> dict[str, int]:
    found = summary(model)
    return {"fused": len(found.fused), "left_alone": len(found.left_alone)}


def compare(
    model: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype = torch.float32,
    train: bool = False, providers: Sequence[str] = ("eager", "compile", "fastres"),
    rounds: int = 11, progress: Callable[[str], None] = lambda message: None,
) -> dict:  # fmt: skip
    """Agreement and time of ``model`` under each provider: JSON-ready, see :func:`_row`.

    ``model`` (float32, in contiguous format, left unchanged) and ``batches`` (float32, all of one
    shape) are rounded to ``dtype``; training in a 16-bit dtype is autocast instead. fastres is
    given the model in contiguous format, the others run in the faster of the two formats.
    """
    keep_freed_memory()
    providers = ["eager", *(name for name in providers if name != "eager")]
    model = copy.deepcopy(model).train(train)
    if not train or dtype == torch.float64:
        model, batches = model.to(dtype), [batch.to(dtype) for batch in batches]
    progress("fp64 reference")
    reference = prepare(
        "eager", copy.deepcopy(model).double(), [batch.double() for batch in batches],
        torch.float64, train, "contiguous",
    ).outputs  # fmt: skip

    candidates, failures = _candidates(model, batches, dtype, train, providers, progress)
    progress(f"{rounds} rounds")
    seconds = interleave({c.provider: c.call for c in candidates}, rounds)
    for candidate in candidates:
        candidate.seconds = seconds[candidate.provider]

    images = len(batches[0])
    rows = [_row(c, candidates[0], reference, dtype, train, images) for c in candidates]
    ours = [row for row in rows if row["provider"].startswith("fastres")]
    return {
        "mode": "train" if train else "eval",
        "dtype": str(dtype).removeprefix("torch."),
        "batch": images,
        "input_shape": list(batches[0].shape),
        "rounds": rounds,
        "agrees": all(row["agrees"] for row in ours),
        "providers": rows,
        "failures": failures,
        "environment": environment(),
    }


def _candidates(
    model: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype, train: bool,
    providers: Sequence[str], progress: Callable[[str], None],
) -> tuple[list[Candidate], dict[str, str]]:  # fmt: skip
    """Every provider in the faster of its memory formats, and why others cannot run the model."""
    candidates, failures = [], {}
    for provider in providers:
        progress(provider)
        layouts = ["contiguous"] if provider.startswith("fastres") else list(FORMATS)
        try:
            variants = {
                layout: prepare(provider, model, batches, dtype, train, layout)
                for layout in layouts
            }
        except ProviderError as error:
            if provider == "eager":
                raise
            failures[provider] = str(error)
            continue
        candidates.append(variants[fastest({key: v.call for key, v in variants.items()})])
    return candidates, failures


def _row(
    candidate: Candidate, eager: Candidate, reference: list, dtype: torch.dtype,
    train: bool, images: int,
) -> dict:  # fmt: skip
    """One provider's figures. ``error`` is against the fp64 reference, ``vs_eager`` against eager
    in the same dtype, both absolute and relative to the largest reference value."""
    error, relative = max_error(candidate.outputs, reference)
    from_eager, from_eager_relative = max_error(candidate.outputs, eager.outputs)
    allowed = _allowed(eager.outputs, reference, dtype, train)
    row = {
        "provider": candidate.provider,
        "backend": candidate.backend,
        "memory_format": candidate.memory_format,
        "ms_per_image": {k: v * 1e3 / images for k, v in spread(candidate.seconds).items()},
        "speedup": ratios(eager.seconds, candidate.seconds),
        "error": {"max_abs": error, "max_rel": relative, "allowed_abs": allowed},
        "vs_eager": {"max_abs": from_eager, "max_rel": from_eager_relative},
        "agrees": error <= allowed,
        "sites": candidate.sites,
        "seconds": candidate.seconds,
    }
    if train:
        row["losses"] = [loss.item() for loss in candidate.outputs]
    else:
        pairs = zip(candidate.outputs, eager.outputs, strict=True)
        same = [same_top(output, expected, allowed) for output, expected in pairs]
        if None not in same:
            row["same_top5"], row["images"] = sum(same), images * len(same)
            row["agrees"] = row["agrees"] and row["same_top5"] == row["images"]
    return row


def _allowed(eager: list, reference: list, dtype: torch.dtype, train: bool) -> float:
    """The error that agreement allows, which is also how far apart two logits are a tie."""
    error, _ = max_error(eager, reference)
    scale = max((t.abs().max().item() for t in tensors(reference) if t.numel()), default=0.0)
    slack = _LOSS_SLACK[dtype] if train else _OUTPUT_SLACK.get(dtype, torch.finfo(dtype).eps)
    return 2 * error + slack * scale
