"""What a figure depends on: versions, the processor and the threads in use."""

import platform
from importlib import metadata
from pathlib import Path

import torch


def environment() -> dict:
    """JSON-ready, and without host names."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("fastres", "torch", "triton", "torchvision", "timm", "onnxruntime", "openvino"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _cpu_model() -> str:
    """The processor's name, with family and model number where the system gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in reversed(lines) if ":" in line
    )
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
