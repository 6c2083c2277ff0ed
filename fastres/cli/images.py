"""Photographs from files, prepared for a network."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .. import compat
from ..training.recipes import IMAGENET_MEAN, IMAGENET_STD
from .common import UserError


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
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
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
