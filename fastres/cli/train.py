"""``fastres train MODEL --data DIR``: train a classifier, beside eager PyTorch if wanted."""

import argparse
from pathlib import Path

from ..training import RECIPES, Interrupted, Recipe, Run, Settings, TrainingError, open_data
from ..training.distributed import Ranks, joined
from ..training.run import CHECKPOINT
from .common import MODEL_HELP, UserError, table
from .model import build_classifier
from .recipe import (
    add_recipe_options,
    add_settings_options,
    model_options,
    read_recipe,
    read_settings,
)


def add_parser(commands) -> None:
    parser = commands.add_parser("train", help="train a classifier on labelled images")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR",
        help="train.npz and test.npz, train/CLASS/* and test/CLASS/*, or a dataset of torchvision",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results (default: runs/MODEL-RECIPE)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--compare", choices=("eager",), help="train the same model in eager PyTorch side by side"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--sync-bn", action="store_true", help="SyncBatchNorm, under torchrun")
    parser.add_argument(
        "--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="such as stem=cifar"
    )
    add_settings_options(parser)
    add_recipe_options(parser, "imagenet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    options.compare = options.compare is not None
    try:
        settings = read_settings(options)
        recipe = read_recipe(options, RECIPES[options.recipe])
        with joined(settings.device) as ranks:
            return _train(options, settings, recipe, ranks)
    except TrainingError as error:
        raise UserError(str(error)) from error


def _train(options: argparse.Namespace, settings: Settings, recipe: Recipe, ranks: Ranks) -> int:
    folder = options.out or Path("runs") / f"{options.model.replace(':', '-')}-{options.recipe}"
    data = open_data(options.data, recipe.classes)
    given = model_options(options.model_options)
    model = build_classifier(
        options.model, len(data[0].classes), recipe.channels, settings.seed, given
    )
    say = print if ranks.first else lambda text: None
    identity = {"model": options.model, "model options": given}
    training = Run(model, data, recipe, settings, folder, identity, ranks, say)
    _prepare_folder(folder, training, options.resume, ranks)
    if options.resume:
        training.resume()
        say(f"going on from iteration {training.iteration} of {training.iterations}")
    try:
        history = training.train()
    except Interrupted as interruption:
        say(f"{interruption}; the same command with --resume goes on")
        return 128 + interruption.number
    say(_report(history[-len(training.learners) :], folder))
    return 0


def _prepare_folder(folder: Path, training: Run, resume: bool, ranks: Ranks) -> None:
    if training.file.exists() and not resume:
        raise UserError(
            f"--out: {folder} holds a checkpoint: go on from it with --resume, or name another "
            "folder"
        )
    if resume and not training.file.exists():
        raise UserError(f"--resume: there is no checkpoint in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder}: {error.strerror}") from error


def _report(rows: list[dict], folder: Path) -> str:
    header = ["model", "test accuracy", "test loss", "train loss"]
    lines = [
        [row["model"], *(f"{row[key]:.4f}" for key in ("test_accuracy", "test_loss", "train_loss"))]
        for row in rows
    ]
    if rows[0]["images_per_second"]:
        header.append("images/s in the last epoch")
        for row, line in zip(rows, lines, strict=True):
            line.append(f"{row['images_per_second']:.1f}")
    if rows[0]["peak_bytes"]:
        header.append("peak MiB of a step")
        for row, line in zip(rows, lines, strict=True):
            line.append(f"{row['peak_bytes'] / 2**20:.1f}")
    files = f"metrics.csv, steps.csv, curves.png, {CHECKPOINT}"
    return f"{table(header, lines)}\nsaved to {folder}: {files}"
