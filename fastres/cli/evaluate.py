"""``fastres evaluate MODEL --checkpoint FILE --data DIR``: accuracy on the test images."""

import argparse
import dataclasses
from pathlib import Path

from torch import nn

from ..convert import convert
from ..training import RECIPES, Recipe, Settings, TrainingError, open_split
from ..training import checkpoint as checkpoints
from ..training.distributed import ALONE
from ..training.evaluation import evaluate
from ..training.loading import OrderedBatches, Prepared, loader
from ..training.settings import DTYPES
from .common import MODEL_HELP, UserError
from .model import build_classifier
from .recipe import (
    add_recipe_options,
    add_settings_options,
    model_options,
    read_recipe,
    read_settings,
)


def add_parser(commands) -> None:
    parser = commands.add_parser("evaluate", help="accuracy of trained weights")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE",
        help="of fastres train, or a state_dict",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="as for fastres train"
    )
    parser.add_argument(
        "--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="such as stem=cifar"
    )
    add_settings_options(parser)
    add_recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        settings = read_settings(options)
        state = checkpoints.load(options.checkpoint)
        identity = state.get("identity", {})
        recipe = read_recipe(options, _recipe(options.recipe, identity))
        images = open_split(options.data, "test", recipe.classes)
        classes = len(images.classes)
        model = _model(options, state, identity, recipe, settings, classes)
        prepared = Prepared(images, recipe, False, settings.seed)
        batches = OrderedBatches(len(images), recipe.batch, ALONE)
        data = loader(prepared, batches, settings.workers, settings.device == "cuda")
        score = evaluate(model, data, settings, classes)
    except TrainingError as error:
        raise UserError(str(error)) from error
    skipped = f", {score.skipped} files skipped: no images" if score.skipped else ""
    print(
        f"{options.model}: {100 * score.accuracy:.2f} % of {score.images} images right, "
        f"loss {score.loss:.4f}{skipped}"
    )
    return 0


def _recipe(name: str | None, identity: dict) -> Recipe:
    """The recipe named, else the one that the checkpoint was trained by, else ImageNet's."""
    if name or not identity:
        return RECIPES[name or "imagenet"]
    values = {field.name: identity[field.name] for field in dataclasses.fields(Recipe)}
    return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _model(
    options: argparse.Namespace, state: dict, identity: dict, recipe: Recipe,
    settings: Settings, classes: int,
) -> nn.Module:  # fmt: skip
    if identity.get("model", options.model) != options.model:
        raise TrainingError(
            f"checkpoint: {options.checkpoint} is of another model: {identity['model']}"
        )
    given = identity.get("model options", {}) | model_options(options.model_options)
    model = build_classifier(options.model, classes, recipe.channels, settings.seed, given)
    weights = state
    if identity:
        learners = state["learners"]
        weights = learners.get("fastres", learners.get("eager"))["model"]
    checkpoints.load_weights(model, weights, options.checkpoint)
    model = model if settings.backend == "eager" else convert(model)
    return model.to(settings.device, DTYPES[settings.dtype])
