"""Training and evaluation of classifiers, what ``fastres train`` and ``fastres evaluate`` run.

>>> data = open_data(Path("cifar10"))
>>> Run(model, data, RECIPES["cifar"], Settings(), Path("runs/cifar")).train()

Needs the libraries of ``pip install 'fastres[train]'``.
"""

from .data import Images, open_data, open_split
from .errors import TrainingError
from .recipes import RECIPES, Recipe
from .run import Interrupted, Run
from .settings import Settings

__all__ = [
    "RECIPES",
    "Images",
    "Interrupted",
    "Recipe",
    "Run",
    "Settings",
    "TrainingError",
    "open_data",
    "open_split",
]
