"""What goes wrong in training through no fault of the code."""

import importlib
from types import ModuleType


class TrainingError(Exception):
    """Wrong settings, unusable data, a damaged checkpoint, a full disk: said in one line."""


def library(name: str) -> ModuleType:
    """The module ``name``, which only training needs."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"training needs {error.name}, which is not installed: pip install 'fastres[train]'"
        ) from error
