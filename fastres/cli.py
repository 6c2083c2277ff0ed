"""The command ``fastres``: what is installed, and a model as fastres serves it beside eager.

Exit status: 0 done and agreed, 1 fastres disagrees with eager, 2 wrong use (said in one line).
"""

import argparse
import difflib
import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import fastres

from . import compare, compat, models, ops
from .backend import ENVIRONMENT_VARIABLE

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
FAMILIES = ("torchvision", "timm", "fastres")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet

LEGEND = """\
Time: medians and percentiles of {rounds} interleaved rounds, without warm-up and compilation.
Error: the largest, against an fp64 run; relative to the largest value of that run."""


class UserError(Exception):
    """Wrong use of the command; printed as one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (default: the process's); returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (UserError, compare.ProviderError) as error:
        print(f"fastres: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastres", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, backends, and how to get what is missing")
    info.set_defaults(run=_info)

    model_help = "torchvision:NAME, timm:NAME, fastres:NAME or package.module:callable"
    summary = commands.add_parser("summary", help="what fastres fuses in a model, and why not")
    summary.add_argument("model", metavar="MODEL", help=model_help)
    summary.set_defaults(run=_summary)

    run = commands.add_parser("compare", help="agreement with eager, and time of each provider")
    run.add_argument("model", metavar="MODEL", help=model_help)
    run.add_argument(
        "--image",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="photographs (default: scikit-learn's)",
    )
    run.add_argument("--batch", type=_positive, help="images a call (default: one for each file)")
    run.add_argument("--dtype", choices=DTYPES, default="float32", help="16 bit with --train: AMP")
    run.add_argument("--train", action="store_true", help="compare SGD steps instead of inference")
    run.add_argument(
        "--rounds", type=_positive, default=11, help="timed calls of each (default 11)"
    )
    run.add_argument("--size", type=_positive, default=224, help="height and width (default 224)")
    run.add_argument("--threads", type=_positive, help="default: PyTorch's")
    run.add_argument(
        "--providers", nargs="+", choices=compare.PROVIDERS, metavar="NAME",
        default=["eager", "compile", "fastres"],
        help=f"of {', '.join(compare.PROVIDERS)} (default: eager compile fastres)",
    )  # fmt: skip
    run.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict (default: random)")
    run.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    run.set_defaults(run=_compare)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


# --- info, summary -------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    environment = compare.environment()
    versions = environment["versions"] | {"fastres": fastres.__version__}
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    print(f"{_machine(environment)}, {environment['platform']}")
    print(f"extension: {_build()}")
    print(f"{ENVIRONMENT_VARIABLE}: {os.environ.get(ENVIRONMENT_VARIABLE, 'not set (auto)')}\n")
    rows = [
        (name, "yes" if status.available else "no", status.reason)
        for name, status in fastres.backends().items()
    ]
    print(table(("backend", "available", "why not, and how to mend it"), rows))
    return 0


def _build() -> str:
    if ops.extension is None:
        return f"not there ({ops.extension_error})"
    return ", ".join(
        f"{key} {' '.join(value) if isinstance(value, list) else value}"
        for key, value in ops.extension.build_info().items()
    )


def _summary(options: argparse.Namespace) -> int:
    print(fastres.summary(fastres.convert(build_model(options.model))))
    return 0


def _machine(environment: dict) -> str:
    capability, threads = environment["cpu_capability"], environment["threads"]
    return f"{environment['cpu']}, {capability}, {threads} thread{'s' * (threads > 1)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; those that hold numbers are aligned to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() or cell == "-" for cell in c[1:]) for c in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


# --- models --------------------------------------------------------------------------------------


def build_model(spec: str, weights: Path | None = None) -> nn.Module:
    """The model that ``spec`` names, with weights drawn from seed 0 or read from ``weights``.

    Nothing is downloaded. Raises :class:`UserError` for a name that is not known.
    """
    family, separator, name = spec.partition(":")
    if not (separator and family and name):
        raise UserError(
            f"MODEL: expected FAMILY:NAME such as torchvision:resnet50, got {spec!r}"
            + _did_you_mean(f"torchvision:{spec}", [f"torchvision:{spec}"])
        )
    torch.manual_seed(0)
    try:
        if family == "torchvision":
            model = _torchvision_model(name)
        elif family == "timm":
            model = _timm_model(name)
        elif family == "fastres":
            model = _known(name, [n for n in models.__all__ if n.islower()], "fastres.models")
            model = getattr(models, model)()
        else:
            model = _user_model(family, name)
    except ModuleNotFoundError as error:
        raise UserError(f"MODEL {spec!r}: {error}") from error
    if weights is not None:
        _load(model, weights)
    return model


def _torchvision_model(name: str) -> nn.Module:
    library = compat.import_torchvision().models
    builder = library.get_model_builder(_known(name, library.list_models(), "torchvision"))
    # A backbone's weights would be downloaded by default.
    backbone = "weights_backbone" in inspect.signature(builder).parameters
    return builder(weights=None, **({"weights_backbone": None} if backbone else {}))


def _timm_model(name: str) -> nn.Module:
    timm = compat.import_timm()
    return timm.create_model(_known(name, timm.list_models(), "timm"), pretrained=False)


def _user_model(module: str, name: str) -> nn.Module:
    # A console script, unlike python -m, does not look for modules where it is called.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"MODEL: no module named {error.name!r}{_did_you_mean(module, FAMILIES)}"
        ) from error
    built = getattr(holder, _known(name, dir(holder), module))
    if isinstance(built, nn.Module):
        return built
    if not callable(built):
        raise UserError(f"MODEL: expected a callable, {module}:{name} is {type(built).__name__}")
    try:
        inspect.signature(built).bind()
    except TypeError as error:
        raise UserError(
            f"MODEL: {module}:{name} must be callable without arguments: {error}"
        ) from None
    model = built()
    if not isinstance(model, nn.Module):
        raise UserError(
            f"MODEL: expected {module}:{name}() to return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    return model


def _known(name: str, names: Sequence[str], where: str) -> str:
    if name not in names:
        raise UserError(f"MODEL: {where} has no {name!r}{_did_you_mean(name, names)}")
    return name


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _load(model: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"--weights: no such file: {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what the unpickler, zipfile or struct raise
        reason = str(error).splitlines()[0]
        raise UserError(f"--weights: {file} is no file of tensors: {reason}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--weights: {file} does not fit the model: {reason[:300]}") from error


# --- images --------------------------------------------------------------------------------------


def default_images() -> list[Path]:
    """The two photographs that scikit-learn ships with (china.jpg, flower.jpg)."""
    package = find_spec("sklearn")
    folder = Path(package.submodule_search_locations[0]) if package else Path()
    files = [folder / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    if package is None or not all(file.is_file() for file in files):
        raise UserError(
            "the default photographs come with scikit-learn, which is not installed: "
            "pip install scikit-learn, or name files of your own with --image"
        )
    return files


def load_images(files: Sequence[Path], size: int) -> Tensor:
    """(N, 3, size, size) float32: shorter side resized to size * 256 / 224, centre crop, ImageNet's
    mean and deviation, as the usual evaluation does."""
    try:
        compat.import_torchvision()
        from PIL import Image, UnidentifiedImageError
        from torchvision import transforms
    except ModuleNotFoundError as error:
        raise UserError(f"pictures are read by torchvision and pillow: {error}") from error
    prepare = transforms.Compose([
        transforms.Resize(round(size * 256 / 224)),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    images = []
    for file in files:
        try:
            with Image.open(file) as picture:
                images.append(prepare(picture.convert("RGB")))
        except UnidentifiedImageError as error:
            raise UserError(f"--image: {file} is no picture that pillow can read") from error
        except OSError as error:
            raise UserError(f"--image: {file}: {error.strerror or error}") from error
    return torch.stack(images)


def batches_of(images: Tensor, size: int) -> list[Tensor]:
    """``images`` in batches of exactly ``size``. Where they do not suffice they come again, shifted
    and mirrored: equal ones would leave batch norm in training next to no variance."""
    count = -(-len(images) // size) * size
    filled = []
    for start in range(0, count, len(images)):
        turn = start // len(images)
        shifted = images.roll(turn * images.shape[-1] // 8, -1)
        filled.append(shifted.flip(-1) if turn % 2 else shifted)
    return list(torch.cat(filled)[:count].split(size))


# --- compare -------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> int:
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
        f"{_machine(result['environment'])}, torch {result['environment']['versions']['torch']}",
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
