"""Imports of model libraries that the command, the tests and the benchmarks share."""

import importlib
import sys
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Return the module ``torchvision``, importable also beside a PyTorch it was not built for.

    torchvision registers fakes for ``torchvision::nms`` and ``torchvision::qnms`` at import, which
    fails where its compiled operators do not load (a CUDA build beside a CPU-only PyTorch). Only
    then are the two schemas defined here, without an implementation: the classification and
    segmentation models do not need one, and a call of ``nms`` raises ``NotImplementedError``.

    Raises:
        ModuleNotFoundError: torchvision is not installed; the message has the pip command.
    """
    global _library
    try:
        return _import("torchvision", "pip install --no-deps torchvision pillow")
    except RuntimeError as error:
        if _library is not None or "torchvision::nms does not exist" not in str(error):
            raise
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(name + _SCHEMA)
    # The sub-modules of the failed import would lack their places in the new package.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return _import("torchvision")


def import_timm() -> ModuleType:
    """Return the module ``timm``, which imports torchvision: see :func:`import_torchvision`.

    Raises:
        ModuleNotFoundError: timm or torchvision is not installed.
    """
    import_torchvision()
    return _import("timm", "pip install --no-deps timm huggingface_hub safetensors pyyaml")


def _import(name: str, how_to_install: str = "") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"{name} is not installed (pip install {name}); to keep the PyTorch that is "
            f"installed: {how_to_install}",
            name=name,
        ) from None
