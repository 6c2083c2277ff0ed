"""Labelled images in a folder: arrays, a tree of files, or what torchvision has downloaded.

==============================================  ===================================================
``train.npz``, ``test.npz``                     arrays ``x`` (N, H, W[, C]) uint8, ``y`` (N,) labels,
                                                and, where there are names, ``classes``
``train/CLASS/*.png``, ``test/CLASS/*.png``     any format that pillow reads
``cifar-10-batches-py`` and others              as ``torchvision.datasets`` stores them
==============================================  ===================================================

``val`` is understood for ``test``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import compat
from .errors import TrainingError, library

# the folder inside DIR by which each is known, and its class in torchvision.datasets
_DOWNLOADED = {
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "FashionMNIST/raw": "FashionMNIST",
    "MNIST/raw": "MNIST",
}


class UndecodableError(Exception):
    """A file that pillow cannot read as an image; holds its path."""


@dataclass
class Images:
    """Pictures with labels: ``source[index]`` is a pair (pillow image, label of its own).

    ``chosen`` are the places in ``source`` that count, ``labels`` what their labels are here.
    """

    source: Sequence
    chosen: Sequence[int]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int):
        picture, _ = self.source[self.chosen[index]]
        return picture, int(self.labels[index])

    def some(self, count: int) -> "Images":
        """``count`` of them, or all, at even distances: they may lie in the order of their classes."""
        count = min(count, len(self))
        kept = [index * len(self) // count for index in range(count)]
        chosen, labels = ([values[i] for i in kept] for values in (self.chosen, self.labels))
        return Images(self.source, chosen, labels, self.classes)

    def only(self, classes: Sequence[str]) -> "Images":
        """Those of ``classes`` (names, or numbers as text), labelled in this order."""
        places = [self._place(name) for name in classes]
        labels = np.asarray(self.labels)
        kept = np.flatnonzero(np.isin(labels, places))
        renamed = {place: label for label, place in enumerate(places)}
        return Images(
            self.source,
            [self.chosen[index] for index in kept],
            [renamed[int(labels[index])] for index in kept],
            tuple(self.classes[place] for place in places),
        )

    def _place(self, name: str) -> int:
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise TrainingError(
            f"classes: the data has no {name!r}, its {len(self.classes)} classes are "
            f"{', '.join(self.classes[:20])}"
        )


def open_data(folder: Path, classes: Sequence[str] = ()) -> tuple[Images, Images]:
    """The training and the test images in ``folder``; only ``classes`` of them, if any are named.

    Raises :class:`TrainingError` where there is no data, or the two have different classes.
    """
    train, test = open_split(folder, "train", classes), open_split(folder, "test", classes)
    if train.classes != test.classes:
        raise TrainingError(
            f"data: {folder} has {len(train.classes)} classes to train on and "
            f"{len(test.classes)} to test with: "
            f"{', '.join(sorted(set(train.classes) ^ set(test.classes))[:10]) or 'in other order'}"
        )
    return train, test


def open_split(folder: Path, split: str, classes: Sequence[str] = ()) -> Images:
    """The images of ``split``, "train" or "test", in ``folder``."""
    need_torchvision()
    if not folder.is_dir():
        raise TrainingError(f"data: no such folder: {folder}")
    images = _open(folder, (split, "val") if split == "test" else (split,))
    if images is None:
        raise TrainingError(
            f"data: {folder} holds no {split} images: expected {split}.npz, {split}/CLASS/*.png, "
            f"or one of {', '.join(_DOWNLOADED)}"
        )
    images = images.only(classes) if classes else images
    if not len(images):
        raise TrainingError(f"data: no image of {', '.join(classes)} in {folder}")
    return images


def need_torchvision() -> None:
    """torchvision's datasets and transforms, importable; or an error that says how to get them."""
    try:
        compat.import_torchvision()
    except ModuleNotFoundError as error:
        raise TrainingError(str(error)) from error
    library("PIL.Image")


def _open(folder: Path, names: Sequence[str]) -> Images | None:
    for name in names:
        if (folder / f"{name}.npz").is_file():
            return _open_arrays(folder / f"{name}.npz")
        if (folder / name).is_dir():
            return _open_tree(folder / name)
    for known, dataset in _DOWNLOADED.items():
        if (folder / known).is_dir():
            return _open_downloaded(folder, dataset, names[0] == "train")
    return None


class _Arrays:
    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __getitem__(self, index: int):
        from PIL import Image

        return Image.fromarray(self.pixels[index]), self.labels[index]


def _open_arrays(file: Path) -> Images:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays["x"], arrays["y"]
            names = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except Exception as error:  # what zipfile, numpy's reader or a missing array raise
        raise TrainingError(f"data: {file} has no arrays x and y: {error}") from error
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    colour = pixels.ndim == 4 and pixels.shape[3] == 3
    if pixels.dtype != np.uint8 or not (pixels.ndim == 3 or colour):
        raise TrainingError(
            f"data: {file}: expected x of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3) and dtype "
            f"uint8, got {pixels.shape} {pixels.dtype}"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise TrainingError(
            f"data: {file}: expected y of {len(pixels)} (at least one) whole numbers, "
            f"got {labels.shape} {labels.dtype}"
        )
    names = names or [str(label) for label in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise TrainingError(
            f"data: {file}: labels of {len(names)} classes must lie in 0 ... {len(names) - 1}, "
            f"got {labels.min()} ... {labels.max()}"
        )
    return Images(_Arrays(pixels, labels), range(len(labels)), labels, tuple(names))


def _open_tree(folder: Path) -> Images:
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(folder), loader=_decode)
    except FileNotFoundError as error:
        raise TrainingError(f"data: {' '.join(str(error).split())}") from error
    return Images(tree, range(len(tree)), tree.targets, tuple(tree.classes))


def _decode(path: str):
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UndecodableError(path) from error  # pillow raises these for damaged files


def _open_downloaded(folder: Path, name: str, train: bool) -> Images:
    from torchvision import datasets

    try:
        dataset = getattr(datasets, name)(str(folder), train=train, download=False)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise TrainingError(f"data: torchvision's {name} in {folder}: {error}") from error
    labels = np.asarray(dataset.targets)
    return Images(dataset, range(len(labels)), labels, tuple(map(str, dataset.classes)))
