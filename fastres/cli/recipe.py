"""A recipe's values and a run's settings as options of the command line."""

import argparse
import ast
import dataclasses
import typing

import torch

from ..backend import NAMES
from ..training import RECIPES, Recipe, Settings
from ..training.settings import AMP, DTYPES
from .common import UserError


def add_recipe_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--recipe``, and an option for every value of a recipe."""
    group = parser.add_argument_group(
        "recipe", "what is learnt, and from which pixels [in each recipe]"
    )
    group.add_argument(
        "--recipe", choices=RECIPES, default=default,
        help="the values below, by name" + (f" (default: {default})" if default else ""),
    )  # fmt: skip
    for field in dataclasses.fields(Recipe):
        several = typing.get_origin(field.type) is tuple
        kind = typing.get_args(field.type)[0] if several else field.type
        group.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, nargs="*" if several else None,
            metavar="X" if kind is not str else "NAME",
            help=f"{field.metadata['help']} [{_in_the_recipes(field.name)}]",
        )  # fmt: skip


def _in_the_recipes(name: str) -> str:
    """A value in each recipe, in words: "cifar, imagenet: 0.1; fashion: 0.05"."""
    recipes_of: dict[str, list[str]] = {}
    for recipe, values in RECIPES.items():
        recipes_of.setdefault(_as_typed(getattr(values, name)), []).append(recipe)
    if len(recipes_of) == 1:
        return f"all: {next(iter(recipes_of))}"
    return "; ".join(f"{', '.join(recipes)}: {text}" for text, recipes in recipes_of.items())


def _as_typed(value) -> str:
    """A value as it is given on the command line."""
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values) or "none"


def read_recipe(options: argparse.Namespace, base: Recipe) -> Recipe:
    """``base`` with the values given on the command line."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return base.changed({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def add_settings_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings", "how it is carried out")
    group.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    group.add_argument("--backend", choices=NAMES, help="default: what FASTRES_BACKEND says")
    group.add_argument(
        "--amp", nargs="?", choices=AMP, const="bfloat16", help="autocast (bfloat16 if not named)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of everything else")
    group.add_argument("--channels-last", action="store_true", help="memory format")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's")
    group.add_argument(
        "--strict", action="store_true", help="an image that cannot be decoded is an error"
    )


def read_settings(options: argparse.Namespace) -> Settings:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "device"]
    # evaluation has no options for training's settings, which keep their defaults
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return Settings(device=device, **given)


def model_options(pairs: list[str]) -> dict:
    """``["stem=cifar", "groups=2"]`` as keyword arguments; values as Python writes them, or text."""
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise UserError(f"--model-options: expected NAME=VALUE, got {pair!r}")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options
