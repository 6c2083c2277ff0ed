"""The model that the command line names, with its weights."""

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .. import compat, models
from ..training import TrainingError, checkpoint
from .common import UserError, did_you_mean

FAMILIES = ("torchvision", "timm", "fastres")


def build_model(
    spec: str, weights: Path | None = None, seed: int = 0, options: dict | None = None
) -> nn.Module:
    """The model that ``spec`` names, with weights drawn from ``seed`` or read from ``weights``.

    ``options`` are given to what builds it. Nothing is downloaded. Raises :class:`UserError` for a
    name that is not known or options that do not fit.
    """
    family, separator, name = spec.partition(":")
    if not (separator and family and name):
        raise UserError(f"MODEL: expected FAMILY:NAME such as torchvision:resnet50, got {spec!r}")
    torch.manual_seed(seed)
    try:
        model = _build(family, name, options or {})
    except ModuleNotFoundError as error:
        raise UserError(f"MODEL {spec!r}: {error}") from error
    lazy = [type(m).__name__ for m in model.modules() if isinstance(m, LazyModuleMixin)]
    if lazy:
        raise UserError(
            f"MODEL: {spec} holds a {lazy[0]} without weights yet; call the model once on zeros "
            "where it is built"
        )
    if weights is not None:
        try:
            checkpoint.load_weights(model, checkpoint.load(weights), weights)
        except TrainingError as error:
            raise UserError(f"--weights: {error}") from error
    return model


def build_classifier(spec: str, classes: int, channels: int, seed: int, given: dict) -> nn.Module:
    """The model that ``spec`` names for images of ``channels`` and so many ``classes``.

    ``given`` are options of the user's, which come first. A model of the user's own is told of
    classes and channels as far as it takes arguments of these names.
    """
    family, _, name = spec.partition(":")
    options = {"num_classes": classes}
    if channels != 3:
        options["in_chans" if family == "timm" else "in_channels"] = channels
    if family not in FAMILIES:
        options = {key: value for key, value in options.items() if key in _takes(family, name)}
    try:
        return build_model(spec, seed=seed, options=options | given)
    except (TypeError, ValueError) as error:
        raise UserError(f"MODEL {spec}: {error}") from error


def _build(family: str, name: str, options: dict) -> nn.Module:
    if family == "torchvision":
        return _torchvision_model(name, options)
    if family == "timm":
        timm = compat.import_timm()
        name = _known(name, timm.list_models(), "timm")
        return timm.create_model(name, pretrained=False, **options)
    if family == "fastres":
        try:
            return models.create(name, **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"MODEL: {error}") from error
    return _user_model(family, name, options)


def _torchvision_model(name: str, options: dict) -> nn.Module:
    library = compat.import_torchvision().models
    builder = library.get_model_builder(_known(name, library.list_models(), "torchvision"))
    # A backbone's weights would be downloaded by default.
    backbone = "weights_backbone" in inspect.signature(builder).parameters
    return builder(weights=None, **({"weights_backbone": None} if backbone else {}), **options)


def _user_attribute(module: str, name: str):
    # A console script, unlike python -m, does not look for modules where it is called.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"MODEL: no module named {error.name!r}{did_you_mean(module, FAMILIES)}"
        ) from error
    return getattr(holder, _known(name, dir(holder), module))


def _takes(module: str, name: str) -> list[str]:
    """The names of the arguments of a callable of the user's."""
    built = _user_attribute(module, name)
    return list(inspect.signature(built).parameters) if callable(built) else []


def _user_model(module: str, name: str, options: dict) -> nn.Module:
    built = _user_attribute(module, name)
    if isinstance(built, nn.Module):
        return built
    if not callable(built):
        raise UserError(f"MODEL: expected a callable, {module}:{name} is {type(built).__name__}")
    try:
        inspect.signature(built).bind(**options)
    except TypeError as error:
        raise UserError(
            f"MODEL: {module}:{name} must be callable {_with(options)}: {error}"
        ) from None
    model = built(**options)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"MODEL: expected {module}:{name}() to return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    return model


def _with(options: dict) -> str:
    return f"with {', '.join(options)}" if options else "without arguments"


def _known(name: str, names: Sequence[str], where: str) -> str:
    if name not in names:
        raise UserError(f"MODEL: {where} has no {name!r}{did_you_mean(name, names)}")
    return name
