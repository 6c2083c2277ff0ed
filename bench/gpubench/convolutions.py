"""ResNet-50's convolutions, shape by shape: the output with everything that follows it in eval, the
same with the batch's statistics in training, and the gradients; of a single image the output alone,
inside a CUDA graph: it takes less time than its launches."""

import functools

import torch
import torch.nn.functional as F
from cases import Convolution, convolutions
from fastres.kernels.conv_class import class_of

import fastres
from fastres import functional, ops, reference

from . import providers
from .measured import SLACK, measure, relative_error

BATCH = 256


class Problem:
    """A convolution's operands in bf16, channels_last, and its results in fp32."""

    def __init__(self, conv: Convolution, batch: int, device: torch.device):
        self.conv, pad = conv, conv.kernel // 2
        self.window = ((conv.stride,) * 2, (pad, pad), (1, 1), 1)
        make = functools.partial(torch.randn, device=device)
        last = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
        size = (conv.size - 1) // conv.stride + 1
        self.output_size = (batch, conv.cout, size, size)
        self.x = make(batch, conv.cin, conv.size, conv.size).to(**last)
        fan = conv.cin * conv.kernel**2
        self.w = (make(conv.cout, conv.cin, conv.kernel, conv.kernel) * fan**-0.5).to(**last)
        self.residual = make(self.output_size).to(**last) if conv.residual else None
        self.mean, self.shift = (make(conv.cout) * 0.3 for _ in "ab")
        self.var, self.scale = (torch.rand(conv.cout, device=device) + 0.5 for _ in "ab")
        self.dy = make(self.output_size).to(**last)

    @property
    def name(self) -> str:
        return class_of(self.w.shape, *self.window[::2], 1)

    @property
    def flops(self) -> int:
        return 2 * self.dy.numel() * self.w[0].numel()

    def bytes(self, *tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def eager(self, training: bool, x=None, w=None, residual=None):
        x, w, residual = (a if b is None else b for a, b in (
            (self.x, x), (self.w, w), (self.residual, residual)))  # fmt: skip
        y = F.conv2d(x, w, None, *self.window)
        y = F.batch_norm(
            y, self.mean.clone(), self.var.clone(), self.scale, self.shift, training, 0.1, 1e-5
        )
        y = y if residual is None else y + residual
        return F.relu(y) if self.conv.relu else y

    def ours(self, training: bool):
        names = {(True, True): "conv_bn_add_relu", (False, True): "conv_bn_relu"}
        name = names.get((self.conv.residual, self.conv.relu), "conv_bn")
        operands = (self.x,) if self.residual is None else (self.x, self.residual)
        return getattr(functional, name)(
            *operands, self.w, None, *self.window,
            self.mean, self.var, self.scale, self.shift, training=training,
        )  # fmt: skip

    def wide(self, training: bool):
        residual = None if self.residual is None else self.residual.float()
        return self.eager(training, self.x.float(), self.w.float(), residual)

    def folded(self):
        """Of eval's batch norm: what the vendor's fused calls multiply and add."""
        scale = self.scale * (self.var + 1e-5).rsqrt()
        w = (self.w.float() * scale.view(-1, 1, 1, 1)).to(self.w.dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        return w, (self.shift - self.mean * scale).to(w.dtype)


def run(emit, budget, device, shapes=None, batch: int = BATCH) -> None:
    """``shapes`` in turn, each with its share of the time."""
    torch.backends.cudnn.benchmark = True
    shares = budget.share(convolutions() if shapes is None else shapes)
    for conv, seconds in shares:
        problem = Problem(conv, batch, device.device)
        passes = _passes(problem)
        for what, calls in passes.items():
            _measure_pass(emit, device, problem, what, calls, seconds / (len(passes) + 1))
        single = Problem(conv, 1, device.device)
        calls = _passes(single)["eval"]
        del calls["fastres-triton tuned"]  # compiling every tile would take as long as all the rest
        what, seconds = "eval, one image", seconds / (len(passes) + 1)
        _measure_pass(emit, device, single, what, calls, seconds, graph=True)
        del problem, single, passes, calls
        device.empty_cache()
    for conv in shares.left_out:
        emit(case=conv.name, bad="no time left")


def _passes(problem: Problem) -> dict[str, dict]:
    """Pass to provider to call; the first is eager's, the second the truth."""
    triton, tuned, vendor = (
        functools.partial(providers.triton, classes, tuned)
        for classes, tuned in (({problem.name}, False), ({problem.name}, True), (None, False))
    )
    passes = {}
    with torch.no_grad():
        for what, training in (("eval", False), ("training", True)):
            ours = torch.no_grad()(functools.partial(problem.ours, training))
            passes[what] = {
                "eager": torch.no_grad()(functools.partial(problem.eager, training)),
                "truth": torch.no_grad()(functools.partial(problem.wide, training)),
                "fastres-triton": providers.under(triton, ours),
                "fastres-triton tuned": providers.under(tuned, ours),
                "fastres-triton, cuDNN's convolution": providers.under(vendor, ours),
            }
            if "cuda" in providers.served("conv_bn_relu"):
                cuda = functools.partial(fastres.backend, "cuda")
                passes[what]["fastres-cuda"] = providers.under(cuda, ours)
        passes["eval"] |= _vendors(problem)
    passes["dgrad"] = _gradient(problem, "dgrad", triton, tuned)
    passes["wgrad"] = _gradient(problem, "wgrad", triton, tuned)
    if problem.conv.cin > 3:  # no batch norm comes before a stem
        for what in ("bn_relu_conv", "bn_relu_conv_dgrad", "bn_relu_conv_wgrad"):
            passes[what] = _link(problem, what, triton, tuned, vendor)
    return passes


def _vendors(problem: Problem) -> dict:
    """cuDNN alone, which is the mark to reach, and its own fused calls."""
    w, bias = problem.folded()
    window = problem.window
    calls = {"cuDNN, convolution alone": lambda: F.conv2d(problem.x, problem.w, None, *window)}
    if problem.residual is not None:
        calls["cuDNN fused"] = lambda: torch.cudnn_convolution_add_relu(
            problem.x, w, problem.residual, 1.0, bias, *window
        )
    elif problem.conv.relu:
        calls["cuDNN fused"] = lambda: torch.cudnn_convolution_relu(problem.x, w, bias, *window)
    return calls


def _gradient(problem: Problem, what: str, triton, tuned) -> dict:
    mask = [what == "dgrad", what == "wgrad", False]

    def eager(wide: bool = False):
        tensors = (problem.dy, problem.x, problem.w)
        return torch.ops.aten.convolution_backward(
            *(t.float() if wide else t for t in tensors), None, *problem.window[:3], False, [0, 0],
            1, mask,
        )[mask.index(True)]  # fmt: skip

    def ours(backend: str):
        operands = (problem.dy, problem.x, problem.w, *problem.window)
        operators = ops.OPERATORS[backend]
        if what == "dgrad":
            return operators.conv_dgrad(*operands)
        return operators.conv_wgrad(*operands, [True, False])[0]

    calls = {
        "eager": eager,
        "truth": functools.partial(eager, True),
        "fastres-triton": providers.under(triton, functools.partial(ours, "triton")),
        "fastres-triton tuned": providers.under(tuned, functools.partial(ours, "triton")),
    }
    if "cuda" in providers.served(f"conv_{what}"):
        calls["fastres-cuda"] = functools.partial(ours, "cuda")
    return calls


def _link(problem: Problem, what: str, triton, tuned, vendor) -> dict:
    """A convolution of ``relu(batch_norm(x))`` in training, as in a chain: the output with its
    statistics, or a gradient through the ReLU and batch norm, or that of the weight."""
    x, w, window = problem.x, problem.w, problem.window
    channels = x.shape[1]
    scale, shift = (torch.rand(2, channels, device=x.device) - 0.25).unbind()
    mean, invstd = reference.bn_relu_moments(x, None, None, 0.0, 1e-5)
    bn, running = (mean, invstd, scale, shift), (problem.mean, problem.var)

    def by(operators):
        if what == "bn_relu_conv":
            vectors = [vector.clone() for vector in running]
            return operators.bn_relu_conv(x, *bn, w, None, *vectors, *window, 0.1, 1e-5, True)[0]
        wanted = [what == "bn_relu_conv_dgrad"] * 2 + [what == "bn_relu_conv_wgrad", False]
        found = operators.bn_relu_conv_backward(problem.dy, x, *bn, w, *window, wanted)
        return found[wanted.index(True)] if wanted[0] else found[3]

    def eager(wide: bool = False):
        tensors = (t.float() if wide else t for t in (x, w, problem.dy))
        return _link_by_eager(what, *tensors, *bn, window)

    calls = {
        "eager": torch.no_grad()(eager), "truth": torch.no_grad()(functools.partial(eager, True)),
    }  # fmt: skip
    ours = functools.partial(by, ops.OPERATORS["triton"])
    for name, context in (
        ("fastres-triton", triton), ("fastres-triton tuned", tuned),
        ("fastres-triton, cuDNN's convolution", vendor),
    ):  # fmt: skip
        calls[name] = torch.no_grad()(providers.under(context, ours))
    if "cuda" in providers.served("bn_relu_conv"):
        calls["fastres-cuda"] = torch.no_grad()(functools.partial(by, ops.OPERATORS["cuda"]))
    return calls


def _link_by_eager(what, x, w, dy, mean, invstd, scale, shift, window):
    y = F.relu(F.batch_norm(x, None, None, scale, shift, True, 0.0, 1e-5))
    if what == "bn_relu_conv":
        return F.conv2d(y, w, None, *window)
    mask = [what == "bn_relu_conv_dgrad", what == "bn_relu_conv_wgrad", False]
    grad = torch.ops.aten.convolution_backward(
        dy, y, w, None, *window[:3], False, [0, 0], window[3], mask
    )[mask.index(True)]
    if what == "bn_relu_conv_wgrad":
        return grad
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, mean, invstd, True, 1e-5, [True, True, True]
    )[0]


def _measure_pass(
    emit, device, problem: Problem, what: str, calls: dict, seconds: float, graph: bool = False
) -> None:
    truth = calls.pop("truth")()
    allowed = 2 * relative_error(calls["eager"](), truth) + SLACK
    row = {
        "case": problem.conv.name, "pass": what, "class": problem.name, "flops": problem.flops,
    }  # fmt: skip
    alone = (problem.x, problem.w, problem.dy)
    fused = {
        "eval": (*alone, problem.residual),
        # the raw convolution is written and read before the output is
        "training": (*alone, problem.residual, problem.dy, problem.dy),
    }.get(what.partition(",")[0], alone)
    for provider, call in calls.items():
        row["bytes"] = problem.bytes(*(alone if "alone" in provider else fused))
        measure(
            emit, device, call, truth=None if "alone" in provider else truth, allowed=allowed,
            seconds=min(seconds / len(calls) / 2, 0.1), provider=provider, graph=graph, **row,
        )  # fmt: skip
