"""The comparison that every benchmark runs: one case under one provider, interleaved with eager.

Each round calls eager, then (where it is not what is measured) fastres, then the provider. Only the
last is pytest-benchmark's time; ratios are taken within the rounds. Before anything is timed, the
outputs, and in training the gradients, are checked against an fp64 run.
"""

import contextlib
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import external
import pytest
import torch
from cases import Case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres import compare, timing
from fastres.memory import peak_bytes

BUDGET = 0.4  # seconds of timing a test, within these limits:
ROUNDS = (7, 300)
# Each runtime's idle threads spin for a while; two runtimes would take the cores from each other.
PAUSE = 0.01
# Relative L2 errors beyond which an output is another function's, where the error rule of fastres
# does not apply: compilers and exporters fold and round in their own way; one ReLU whose input is
# within rounding of zero changes a gradient by O(1); and SGD's loss is a single number.
LOOSE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
# As in the tests' error rule: fp32 is its own accumulator, so that every partial sum is rounded.
UNITS = {torch.float32: 8, torch.bfloat16: 1}

Call = Callable[[], list[Tensor]]


@dataclass
class Task:
    """What a case runs, in its dtype: the same for every provider."""

    case: Case
    module: nn.Module
    inputs: tuple[Tensor, ...]
    gradient: Tensor | None  # of the output, where training is forward and backward


@dataclass
class Ready:
    """A provider's call, compiled and warm, in its faster memory format, and how far it errs."""

    call: Call
    memory_format: str
    errors: list[float]


@dataclass
class Prepared:
    """A case with what all of its providers share; ``fastres`` is None without the extension."""

    task: Task
    reference: list[Tensor]
    flops: int
    eager: Ready
    fastres: Ready | None


@functools.lru_cache(maxsize=1)
def prepare(case: Case) -> Prepared:
    task = make_task(case)
    flops = count_flops(task)
    if flops and case.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 instructions: PyTorch emulates them, slowly")
    wide = Task(
        case, copy.deepcopy(task.module).double(), tuple(t.double() for t in task.inputs),
        task.gradient,
    )  # fmt: skip
    reference = call_of(wide, wide.module, wide.module, autocast=False)()
    eager = ready(task, "eager", reference, list(compare.FORMATS))
    served = fastres.backends()["cpu"].available
    layouts = formats(case, "fastres-cpu", eager.memory_format)
    ours = ready(task, "fastres-cpu", reference, layouts) if served else None
    return Prepared(task, reference, flops, eager, ours)


def count_flops(task: Task) -> int:
    """Two a multiply-add of convolutions and products; backward costs twice the forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(task.module).float()(*(tensor.float() for tensor in task.inputs))
    return counter.get_total_flops() * (3 if task.case.train else 1)


def make_task(case: Case) -> Task:
    torch.manual_seed(0)
    module, inputs = case.build()
    module.train(case.train)
    if not case.train:
        module = module.to(case.dtype)
    if not case.autocast:
        inputs = tuple(tensor.to(case.dtype) for tensor in inputs)
    gradient = None
    if case.train and not case.model:
        with torch.no_grad():
            output = copy.deepcopy(module).float()(*(tensor.float() for tensor in inputs))
        gradient = torch.randn(output.shape).to(case.dtype)
    return Task(case, module, inputs, gradient)


def formats(case: Case, provider: str, of_eager: str) -> list[str]:
    """The memory formats to choose the faster of.

    A whole model is given to fastres in the format that a user has it in, and to a compiler in
    both. Compiling an operator or a block takes longer than measuring it, and their convolutions
    are the same library calls as eager's: there a compiler gets the format eager is faster in.
    """
    if provider.startswith("compile") and not case.model:
        return [of_eager]
    if provider.startswith("fastres") and case.model:
        return ["channels_last" if provider.endswith("channels_last") else "contiguous"]
    return list(compare.FORMATS)


def ready(task: Task, provider: str, reference: list[Tensor], layouts: list[str]) -> Ready:
    """A provider, warm. Eager's errors are those of its worse memory format: both are eager's
    numbers, and of few outputs behind many layers the error of one is mostly chance (a ResNet-56's
    ten logits, three seeds: 2.3, 2.6 and 2.8e-6 contiguous; 1.3, 1.5 and 1.9e-6 channels_last).
    """
    if provider in external.PROVIDERS:
        run = external.PROVIDERS[provider](task.module, task.inputs, task.case.dtype)
        return Ready(lambda: [run()], "contiguous", errors([run()], reference))
    with compare.compiling(provider == "compile-freezing"):
        calls = {name: build(task, provider, name) for name in layouts}
        outputs = {name: call() for name, call in calls.items()}
        chosen = timing.fastest(calls)
    found = {name: errors(output, reference) for name, output in outputs.items()}
    if provider == "eager":
        return Ready(calls[chosen], chosen, [max(each) for each in zip(*found.values())])
    return Ready(calls[chosen], chosen, found[chosen])


def build(task: Task, provider: str, memory_format: str) -> Call:
    layout = compare.FORMATS[memory_format]
    module = copy.deepcopy(task.module).to(memory_format=layout)
    inputs = tuple(tensor.contiguous(memory_format=layout) for tensor in task.inputs)
    gradient = task.gradient
    if gradient is not None:
        gradient = gradient.contiguous(memory_format=layout)
    forward: Callable = module
    if provider.startswith("compile"):
        forward = compare.compiled(module)
    elif provider.startswith("fastres"):
        forward = task.case.fused(module)
    task = Task(task.case, module, inputs, gradient)
    return call_of(task, module, forward, task.case.autocast)


def call_of(task: Task, module: nn.Module, forward: Callable, autocast: bool) -> Call:
    inputs, gradient = task.inputs, task.gradient
    if task.case.model and task.case.train:
        dtype = torch.bfloat16 if autocast else inputs[0].dtype
        step = compare.training_step(module, forward, inputs[0], dtype)
        return lambda: [step()]
    if not task.case.train:
        return lambda: [forward(*inputs)]
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    wanted = (*inputs, *module.parameters())

    def forward_backward() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = forward(*inputs)
        return [output, *torch.autograd.grad(output, wanted, gradient.to(output.dtype))]

    return forward_backward


def errors(outputs: list[Tensor], reference: list[Tensor]) -> list[float]:
    """Relative L2 error of every tensor."""
    pairs = zip(outputs, reference, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def verify(case: Case, provider: str, found: list[float], eager: list[float]) -> None:
    """fastres may err twice as much as eager; the others need only compute the same function."""
    strict = provider.startswith("fastres") and not (case.model and case.train)
    for index, (error, of_eager) in enumerate(zip(found, eager, strict=True)):
        exact = UNITS[case.dtype] * torch.finfo(case.dtype).eps
        slack = exact if strict and index == 0 else LOOSE[case.dtype]
        which = "output" if index == 0 else f"gradient {index - 1}"
        assert error <= 2 * of_eager + slack, (
            f"{provider}: {which} of {case.name} is wrong: relative L2 error {error:.2e}, "
            f"eager's {of_eager:.2e}"
        )


def skip_unless_available(provider: str) -> None:
    if not provider.startswith("fastres-"):
        return
    name = provider.split("-")[1]
    status = fastres.backends()[name]
    if not status.available:
        pytest.skip(f"{name}: {status.reason}")
    if name != "cpu":
        pytest.skip(f"{name} serves GPUs; these benchmarks measure the CPU")


@contextlib.contextmanager
def on_threads(count: int | None):
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Comparison:
    """One test: ``case`` under ``provider``, timed by pytest-benchmark's fixture."""

    benchmark: object
    family: str
    case: Case
    provider: str

    def run(self) -> None:
        skip_unless_available(self.provider)
        served = fastres.backends()["cpu"].available
        with (
            fastres.backend("cpu" if served else "eager"),
            torch.set_grad_enabled(self.case.train),
            on_threads(self.case.threads),
        ):
            self._run(prepare(self.case))

    def _run(self, prepared: Prepared) -> None:
        benchmark, provider = self.benchmark, self.provider
        layouts = formats(self.case, provider, prepared.eager.memory_format)
        call = ready(prepared.task, provider, prepared.reference, layouts)
        verify(self.case, self.provider, call.errors, prepared.eager.errors)
        partners = {"eager": prepared.eager.call}
        if prepared.fastres and not self.provider.startswith(("eager", "fastres")):
            partners["fastres"] = prepared.fastres.call
        once = sum(timing.seconds_of(run) for run in (*partners.values(), call.call))
        rounds = min(max(int(BUDGET / once), ROUNDS[0]), ROUNDS[1])
        seconds: dict[str, list[float]] = {name: [] for name in partners}
        pause = PAUSE if self.provider in external.PROVIDERS else 0

        def run_partners() -> None:
            for name, partner in partners.items():
                time.sleep(pause)
                seconds[name].append(timing.seconds_of(partner))
            time.sleep(pause)

        benchmark.group = f"{self.family} {self.case.name}"
        benchmark.pedantic(call.call, setup=run_partners, rounds=rounds, warmup_rounds=1)
        if not benchmark.disabled:
            seconds = {name: times[-rounds:] for name, times in seconds.items()}
            benchmark.extra_info |= self._figures(prepared, call, seconds)

    def _figures(self, prepared: Prepared, call: Ready, seconds: dict[str, list[float]]) -> dict:
        case, measured = self.case, self.benchmark.stats.stats.data
        figures = {
            "family": self.family,
            "case": case.name,
            "provider": self.provider,
            "mode": "train" if case.train else "eval",
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": "cpu",
            "memory_format": call.memory_format,
            "eager_memory_format": prepared.eager.memory_format,
            "eager_seconds": timing.spread(seconds["eager"]),
            "ratio": timing.ratios(seconds["eager"], measured),
            "error": max(call.errors),
            "eager_error": max(prepared.eager.errors),
            "flops": prepared.flops,
            "bytes": case.traffic and case.traffic * case.dtype.itemsize,
        }
        if case.model and case.train:
            for name, run in (("", call.call), ("eager_", prepared.eager.call)):
                figures[f"{name}peak_bytes"] = peak_bytes(run, torch.device("cpu"))
        if "fastres" in seconds:
            figures["fastres_ratio"] = timing.ratios(measured, seconds["fastres"])
        return figures
