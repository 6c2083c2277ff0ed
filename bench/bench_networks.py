"""Inference in fp32 of more networks, sizes, batches and one thread, beside OpenVINO; and what a
process pays before its second call: the first call's time and resident memory.

Not part of ``make bench``: ``make bench-networks`` runs it, K selects.
"""

import json
import subprocess
import sys
from pathlib import Path

import external
import pytest
import start
import torch
from cases import Case, maps
from torch import nn

from fastres import compare
from fastres.compat import import_timm, import_torchvision

PROVIDERS = ("fastres-cpu", "openvino")
SIZES = (160, 256, 288, 320)
BATCHES = (2, 16, 32)


def cifar(depth: int) -> nn.Module:
    """ResNet-20 to -110 for 32x32 images: He et al. 2015, section 4.2, with projections."""
    block = import_torchvision().models.resnet.BasicBlock
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    ]  # fmt: skip
    width = 16
    for planes in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stride = planes // width
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(
                    nn.Conv2d(width, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
                )
            layers.append(block(width, planes, stride, shortcut))
            width = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def network(name: str) -> nn.Module:
    if name.startswith("cifar-"):
        return cifar(int(name.removeprefix("cifar-resnet")))
    if name.startswith("timm-"):
        return import_timm().create_model(name.removeprefix("timm-"))
    return getattr(import_torchvision().models, name)()


def build(name: str, batch: int, size: int):
    model, images = network(name), maps(batch, 3, size, size)
    compare.calibrate_batch_norm(model, [images[0][:8]])
    return model, images


def case(name: str, batch: int, size: int = 224, threads: int | None = None) -> Case:
    suffix = f"-{threads}thread" if threads else ""
    return Case(
        name=f"{name}-b{batch}-{size}px{suffix}",
        build=lambda: build(name, batch, size),
        providers=PROVIDERS,
        model=True,
        threads=threads,
    )


NETWORKS = ("resnet34", "wide_resnet50_2", "resnext50_32x4d", "timm-resnet50d")
CASES = [
    *(case(name, batch) for name in NETWORKS for batch in (1, 8)),
    *(case("resnet50", 1, size) for size in SIZES),
    *(case("resnet50", batch) for batch in BATCHES),
    *(case(name, batch, threads=1) for name in ("resnet18", "resnet50") for batch in (1, 8)),
    *(case(f"cifar-resnet{depth}", batch, 32) for depth in (20, 56) for batch in (1, 128)),
]


def bench_network(comparison):
    comparison.run()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("provider", ["fastres", "openvino"])
def bench_start(benchmark, tmp_path, name, provider):
    """A process each time; the smallest of three, for nothing but disturbance makes one slower."""
    source = name
    if provider == "openvino":
        source = str(external.openvino_file(network(name).eval(), tmp_path / "model.xml"))
    script = Path(start.__file__)
    command = [sys.executable, script, provider, source, str(torch.get_num_threads())]
    found = []

    def run():
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))

    benchmark.group = f"start {name}"
    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info |= {
        "family": "start",
        "case": name,
        "provider": provider,
        "first_call_seconds": min(each["first_call_seconds"] for each in found),
        "resident_bytes": min(each["resident_bytes"] for each in found),
    }
