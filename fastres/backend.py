"""Which backend serves a call, and why: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``eager``.

``auto`` takes the best that serves the tensor's device, on a GPU what :mod:`fastres.choice` says of
it; ``eager`` is PyTorch's own operators. The choice is one for the process, as PyTorch's
``torch.backends`` flags are.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch.autograd import forward_ad

from . import choice, launches, ops

NAMES = ("auto", "cuda", "triton", "cpu", "eager")
ENVIRONMENT_VARIABLE = "FASTRES_BACKEND"

_OPERATORS = ("add_relu", "bn_relu", "conv_bn_relu", "conv_bn_relu_pool", "mean_linear")
# What a GPU's backends have none of: there PyTorch's own operators serve it, whoever was asked for.
_OF_THE_CPU = ("conv_bn_relu_pool", "mean_linear")
# (backend, operator) for every compiled implementation; the device's name is the backend's
_COMPILED = {
    (device, operator)
    for device in ("cpu", "cuda")
    for operator in _OPERATORS
    if ops.has_kernel(operator, device)
}
_requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


@dataclass(frozen=True)
class Status:
    """Whether a backend can serve here; if not, ``reason`` says why and how to mend it."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, Status]:
    """What each backend can do on this machine, by name."""
    return {
        "cuda": _cuda_status(),
        "triton": _triton_status(),
        "cpu": _cpu_status(),
        "eager": Status(True),
    }


def _extension_missing() -> str:
    package = Path(__file__).parent
    if (package.parent / "setup.py").exists():
        where = (
            f"fastres was imported from its source tree, {package}, which shadows an installed one; "
            "build in place with 'pip install --no-build-isolation -e .', or start Python elsewhere"
        )
    else:
        where = "reinstall fastres with 'pip install .' in its checkout; it needs a C++ compiler"
    return f"the compiled extension did not load ({ops.extension_error}); {where}"


def _cpu_status() -> Status:
    if ops.extension is None:
        return Status(False, _extension_missing())
    return Status(True)


def _cuda_status() -> Status:
    if ops.extension is None:
        return Status(False, _extension_missing())
    if not any(name == "cuda" for name, _ in _COMPILED):
        return Status(
            False, "the extension was built without CUDA; rebuild it with FASTRES_CUDA=1 and nvcc"
        )
    problem = cuda_problem(ops.extension.cuda_info(), ops.extension.build_info()["cuda_archs"])
    if problem:
        return Status(False, problem)
    if not torch.cuda.is_available():
        return Status(
            False, "torch.cuda.is_available() is False: no usable GPU, or a CPU-only torch"
        )
    return Status(True)


def cuda_problem(info: dict, archs: list[str]) -> str:
    """Why an extension built for ``archs`` cannot run where it found ``info``, and how to mend
    it; empty where it can. ``info`` is ``_C.cuda_info()``."""
    if not info["driver"]:
        return "no NVIDIA driver was found on this machine; install one (and PyTorch with CUDA)"
    if info["driver"] // 1000 < info["runtime"] // 1000:
        versions = (f"{v // 1000}.{v % 1000 // 10}" for v in (info["driver"], info["runtime"]))
        return (
            "the driver knows CUDA {}, the extension was built with {}; update the driver, or "
            "rebuild with an older toolkit".format(*versions)
        )
    if not info["devices"]:
        return f"the driver shows no usable GPU: {info['error'] or 'there is none'}"
    for number, device in enumerate(info["devices"]):
        if not any(_runs_on(arch, device["capability"]) for arch in archs):
            name = ".".join(map(str, device["capability"]))
            return (
                f"GPU {number}, {device['name']}, has compute capability {name}, but the extension "
                f"was built for {' '.join(archs)}; rebuild it with TORCH_CUDA_ARCH_LIST={name}"
            )
    return ""


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of TORCH_CUDA_ARCH_LIST runs on a device: binaries on later minor
    versions, PTX on every later one, what is specific to an architecture (a) only there."""
    number = arch.removesuffix("+PTX")
    version = tuple(map(int, number.rstrip("af").split(".")))
    if number.endswith("a"):
        return capability == version
    if arch.endswith("+PTX") and not number.endswith("f"):
        return capability >= version
    return capability[0] == version[0] and capability >= version


def _triton_status() -> Status:
    if not launches.FOUND:
        return Status(False, "Triton is not installed; 'pip install triton' (Linux only)")
    if not torch.cuda.is_available() and not launches.INTERPRETS:
        return Status(
            False,
            "torch.cuda.is_available() is False: no usable GPU, or a CPU-only torch; with "
            "TRITON_INTERPRET=1 Triton's interpreter runs the kernels on the CPU, slowly",
        )
    return Status(True)


class backend:
    """Context manager: serve every call inside by the named backend.

    >>> with fastres.backend("eager"):
    ...     reference = model(images)

    Raises ``ValueError`` for an unknown name and ``RuntimeError``, with the reason, for a backend
    that cannot serve on this machine. Calls inside raise ``RuntimeError`` where the backend has no
    kernel for their device or operator.
    """

    def __init__(self, name: str):
        _validate(name, "name")
        self.name = name
        self._outer: list[str] = []  # a stack: the same object may be entered again inside itself

    def __enter__(self) -> Self:
        global _requested
        self._outer.append(_requested)
        _requested = self.name
        return self

    def __exit__(self, *exception) -> None:
        global _requested
        _requested = self._outer.pop()


def _validate(name: str, argument: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument}: expected one of {', '.join(NAMES)}, got {name!r}")
    status = backends().get(name, Status(True))
    if not status:
        raise RuntimeError(f"{argument}: backend {name!r} cannot serve: {status.reason}")


def serving(
    operator: str,
    device: torch.device,
    convolution: Callable[[], choice.Convolution] | None = None,
) -> str:
    """The name of the backend that serves ``operator`` for a tensor on ``device``; ``convolution``
    tells which one "conv_bn_relu" is to be.

    Forward-mode derivatives and ``torch.func`` transforms have rules for PyTorch's own operators
    only: there it is ``eager``, whatever was asked for.
    """
    if _is_transformed():
        return "eager"
    if _requested == "auto":
        name = _best(operator, device, convolution)
        return name if name and _has(name, operator, device.type) else "eager"
    if _requested == "eager":
        return "eager"
    if not _has(_requested, operator, device.type):
        if operator in _OF_THE_CPU:
            return "eager"
        _refuse(operator, device)
    return _requested


def _best(operator: str, device: torch.device, convolution) -> str | None:
    if device.type == "cuda":
        return choice.fastest(operator, device, convolution)
    return "cpu" if device.type == "cpu" else None


def _has(name: str, operator: str, device_type: str) -> bool:
    """Triton has every operator of the GPU's: within one, a convolution may be the vendor's."""
    if name == "triton" and operator not in _OF_THE_CPU:
        interpreted = device_type == "cpu" and launches.FOUND and launches.INTERPRETS
        return interpreted or (device_type == "cuda" and launches.FOUND)
    return name == device_type and (name, operator) in _COMPILED


def extension_serves(operator: str) -> bool:
    """Whether the extension's own functions may be called for a CPU tensor: they look at arguments
    faster than Python does. A compiler is to see the operators."""
    if ops.extension is None or torch.compiler.is_compiling():
        return False
    if _requested not in ("auto", "cpu") or _is_transformed():
        return False
    return ("cpu", operator) in _COMPILED


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse(operator: str, device: torch.device) -> None:
    _validate(_requested, ENVIRONMENT_VARIABLE)
    raise RuntimeError(
        f"backend {_requested!r} was asked for, but it cannot serve {operator} on a {device.type} "
        "tensor; use 'auto' to let each call choose"
    )
