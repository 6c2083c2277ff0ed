"""``fastres compare MODEL``: agreement with eager, and the time of each provider."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import fastres

from .. import compare
from ..backend import ENVIRONMENT_VARIABLE
from .common import MODEL_HELP, UserError, machine, positive, table
from .images import batches_of, default_images, load_images
from .model import build_model

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

LEGEND = """\
Time: medians and percentiles of {rounds} interleaved rounds, without warm-up and compilation.
Error: the largest, against an fp64 run; relative to the largest value of that run."""


def add_parser(commands) -> None:
    parser = commands.add_parser("compare", help="agreement with eager, and time of each provider")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--image",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="photographs (default: scikit-learn's)",
    )
    parser.add_argument("--batch", type=positive, help="images a call (default: one for each file)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="16 bit with --train: AMP"
    )
    parser.add_argument(
        "--train", action="store_true", help="compare SGD steps instead of inference"
    )
    parser.add_argument(
        "--rounds", type=positive, default=11, help="timed calls of each (default 11)"
    )
    parser.add_argument("--size", type=positive, default=224, help="height and width (default 224)")
    parser.add_argument("--threads", type=positive, help="default: PyTorch's")
    parser.add_argument(
        "--providers", nargs="+", choices=compare.PROVIDERS, metavar="NAME",
        default=["eager", "compile", "fastres"],
        help=f"of {', '.join(compare.PROVIDERS)} (default: eager compile fastres)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="a state_dict (default: random)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json: no such folder: {options.json.absolute().parent}")
    if options.threads:
        torch.set_num_threads(options.threads)
    for provider in options.providers:
        _check_backend(provider)
    model = build_model(options.model, options.weights)
    files = options.image or default_images()
    images = load_images(files, options.size)
    batches = batches_of(images, options.batch or len(images))
    calibrated = 0
    if options.weights is None and not options.train:
        calibrated = _explain(options.model, lambda: compare.calibrate_batch_norm(model, batches))

    with warnings.catch_warnings():
        # of compilers and converters about the model's code, not about this comparison
        warnings.simplefilter("ignore")
        result = compare.compare(
            model, batches, DTYPES[options.dtype], options.train, options.providers,
            options.rounds, lambda message: print(f"... {message}", file=sys.stderr, flush=True),
        )  # fmt: skip
    result = {
        "model": options.model,
        "weights": str(options.weights) if options.weights else "random (seed 0)",
        "batch_norm_calibrated": calibrated,
        "images": [file.name for file in files],
    } | result
    print(_report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved to {options.json}")
    return 0 if result["agrees"] else 1


def _check_backend(provider: str) -> None:
    name = compare.PROVIDERS[provider] or os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    try:
        fastres.backend(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"provider {provider}: {error}") from error


def _explain(model: str, run: Callable[[], int]) -> int:
    """``run()``, where what the model itself raises is an error of use."""
    try:
        return run()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{model} does not run on these images: {error}") from error


def _report(result: dict) -> str:
    train = result["mode"] == "train"
    weights = f"weights {result['weights']}"
    if result["batch_norm_calibrated"]:
        weights += ", batch-norm statistics calibrated on these images"
    names = ", ".join(result["images"][:4]) + (", ..." if len(result["images"]) > 4 else "")
    shape = "x".join(map(str, result["input_shape"]))
    lines = [
        f"{result['model']}, {result['mode']}, {result['dtype']}, input {shape} ({names})",
        weights,
        f"{machine(result['environment'])}, torch {result['environment']['versions']['torch']}",
        "",
        table(
            ("provider", "format", "ms/image", "p20", "p80", "speed-up", "max abs err",
             "max rel err", "abs vs eager", "rel vs eager", "losses" if train else "same top-5"),
            [_cells(row) for row in result["providers"]],
        ),
        *(f"{name}: not run: {reason}" for name, reason in result["failures"].items()),
        "",
        LEGEND.format(rounds=result["rounds"]),
    ]  # fmt: skip
    for row in result["providers"]:
        if row["provider"].startswith("fastres"):
            verdict = "agrees with eager" if row["agrees"] else "DISAGREES with eager"
            error, sites = row["error"], row["sites"]
            lines.append(
                f"{row['provider']} (backend {row['backend']}; {sites['fused']} sites fused, "
                f"{sites['left_alone']} left alone) {verdict}: error {error['max_abs']:.2e}, "
                f"allowed {error['allowed_abs']:.2e}"
            )
    return "\n".join(lines)


def _cells(row: dict) -> tuple[str, ...]:
    time, eager = row["ms_per_image"], row["provider"] == "eager"
    if "losses" in row:
        last = " ".join(f"{loss:.4f}" for loss in row["losses"])
    else:
        last = f"{row['same_top5']} of {row['images']}" if "same_top5" in row else "-"
    return (
        row["provider"],
        row["memory_format"],
        *(f"{time[key]:.2f}" for key in ("median", "p20", "p80")),
        f"{row['speedup']['median']:.2f}x",
        *(f"{row['error'][key]:.1e}" for key in ("max_abs", "max_rel")),
        *("-" if eager else f"{row['vs_eager'][key]:.1e}" for key in ("max_abs", "max_rel")),
        last,
    )
