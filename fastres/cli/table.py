"""``fastres table``: what models cost, as in table 1 of the ResNet paper."""

import argparse
import csv
from pathlib import Path

import torch
from torch import nn

import fastres

from .. import models
from ..environment import environment
from ..models import measure
from .common import UserError, machine, positive, table
from .model import build_model
from .recipe import model_options

BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
PAPER = ("resnet18", "resnet34", *(f"{name},stride_on=1x1" for name in BOTTLENECKS))
COLUMNS = (
    "model", "input", "maps", "parameters", "multiply_adds", "activation_bytes",
    "eager_activation_bytes", "ms_per_image", "eager_ms_per_image",
)  # fmt: skip
LEGEND = """\
maps: height of each stage's output. MB: kept for backward by a training step, an image.
ms: an image, in inference, batch {batch}, median of {rounds} rounds; eager: PyTorch's operators."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "table", help="parameters, multiply-adds, activation memory and time of fastres' models"
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", default=PAPER,
        help="names or patterns of fastres.models.list_models(), options after commas: "
        "resnet50,stride_on=1x1 (default: the five of the ResNet paper)",
    )  # fmt: skip
    parser.add_argument("--size", type=positive, help="default: 32 for cifar_*, else 224")
    parser.add_argument("--batch", type=positive, default=1, help="images a call (default 1)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed calls (default 5)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="save every figure there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.csv and not options.csv.absolute().parent.is_dir():
        raise UserError(f"--csv: no such folder: {options.csv.absolute().parent}")
    rows = [_row(spec, options) for pattern in options.models for spec in _specs(pattern)]
    print(machine(environment()) + "\n")
    header = (
        "model", "input", "maps", "parameters", "multiply-adds", "MB", "eager MB", "ms", "eager ms",
    )  # fmt: skip
    print(table(header, [_cells(row) for row in rows]))
    print("\n" + LEGEND.format(batch=options.batch, rounds=options.rounds))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(f"saved to {options.csv}")
    return 0


def _specs(pattern: str) -> list[str]:
    """The names that a pattern stands for, each with the pattern's options."""
    name, comma, given = pattern.partition(",")
    return [found + comma + given for found in models.list_models(name) or [name]]


def _row(spec: str, options: argparse.Namespace) -> dict:
    name, _, given = spec.partition(",")
    keywords = model_options(given.split(",")) if given else {}
    model = build_model(f"fastres:{name}", options=keywords)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    size = options.size or (32 if name.startswith("cifar") else 224)
    images = torch.randn(options.batch, first.in_channels, size, size)
    shapes = measure.stage_shapes(model, images[:1].shape)
    row = {
        "model": spec,
        "input": "x".join(map(str, images.shape[1:])),
        "maps": " ".join(str(shape[2]) for _, shape in shapes if len(shape) == 4),
        "parameters": measure.parameters(model),
        "multiply_adds": measure.multiply_adds(model, images[:1].shape),
    }
    for prefix, backend in (("", "auto"), ("eager_", "eager")):
        with fastres.backend(backend):
            two = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # batch norm trains
            kept = measure.activation_bytes(model, two) / len(two)
            row[f"{prefix}activation_bytes"] = round(kept)
            row[f"{prefix}ms_per_image"] = measure.milliseconds(model, images, options.rounds)
    return row


def _cells(row: dict) -> tuple[str, ...]:
    return (
        row["model"],
        row["input"],
        row["maps"],
        f"{row['parameters'] / 1e6:.2f}e6",
        f"{row['multiply_adds'] / 1e9:.2f}e9",
        *(f"{row[key] / 1e6:.1f}" for key in ("activation_bytes", "eager_activation_bytes")),
        *(f"{row[key]:.2f}" for key in ("ms_per_image", "eager_ms_per_image")),
    )
