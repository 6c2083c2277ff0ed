"""fastres: fused ResNet operators for PyTorch, with the numbers of eager PyTorch.

>>> model = fastres.convert(torchvision.models.resnet50())
"""

from . import functional, models, nn, ops, reference
from .backend import backend, backends
from .branches import chained
from .convert import convert, revert, summary
from .winograd import winograd

__version__ = "0.1.0"

__all__ = [
    "backend",
    "backends",
    "chained",
    "convert",
    "functional",
    "models",
    "nn",
    "ops",
    "reference",
    "revert",
    "summary",
    "winograd",
]
