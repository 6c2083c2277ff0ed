"""``fastres evaluate MODEL --checkpoint FILE --data DIR``: accuracy on labelled images."""

import argparse
import dataclasses
from pathlib import Path

from torch import nn

from ..convert import convert
from ..training import RECIPES, Recipe, Settings, TrainingError, open_split
from ..training import checkpoint as checkpoints
from ..training.distributed import ALONE
from ..training.evaluation import Score, evaluate
from ..training.loading import OrderedBatches, Prepared, loader
from ..training.settings import DTYPES
from .common import MODEL_HELP, UserError, positive
from .model import build_classifier
from .recipe import (
    add_recipe_options,
    add_settings_options,
    model_options,
    read_recipe,
    read_settings,
)


@dataclasses.dataclass
class Trained:
    """A model with trained weights, and images: what is evaluated, and taken apart."""

    model: nn.Module
    images: Prepared
    recipe: Recipe
    settings: Settings
    classes: int

    def score(self) -> Score:
        batches = OrderedBatches(len(self.images.images), self.recipe.batch, ALONE)
        data = loader(self.images, batches, self.settings.workers, self.settings.device == "cuda")
        return evaluate(self.model, data, self.settings, self.classes)


def add_parser(commands) -> None:
    parser = commands.add_parser("evaluate", help="accuracy of trained weights")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What says which trained model, and on which images."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE",
        help="of fastres train, or a state_dict",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="as for fastres train"
    )
    parser.add_argument(
        "--split", choices=("test", "train"), default="test",
        help="which of the images, prepared as for a test (default: test)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="images, at even distances (default: all)"
    )
    parser.add_argument(
        "--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="such as stem=cifar"
    )
    add_settings_options(parser)
    add_recipe_options(parser)


def run(options: argparse.Namespace) -> int:
    try:
        score = open_trained(options).score()
    except TrainingError as error:
        raise UserError(str(error)) from error
    skipped = f", {score.skipped} files skipped: no images" if score.skipped else ""
    print(
        f"{options.model}: {100 * score.accuracy:.2f} % of {score.images} images right, "
        f"loss {score.loss:.4f}{skipped}"
    )
    return 0


def open_trained(options: argparse.Namespace) -> Trained:
    """What the options of :func:`add_options` name."""
    settings = read_settings(options)
    state = checkpoints.load(options.checkpoint)
    identity = state.get("identity", {})
    recipe = read_recipe(options, _recipe(options.recipe, identity))
    images = open_split(options.data, options.split, recipe.classes)
    if options.limit:
        images = images.some(options.limit)
    classes = len(images.classes)
    model = _model(options, state, identity, recipe, settings, classes)
    return Trained(model, Prepared(images, recipe, False, settings.seed), recipe, settings, classes)


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
