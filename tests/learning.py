"""What the tests of training share: small pictures that can be learnt, and a network for them."""

import os
import signal

import numpy as np
import torch
from torch import nn

from fastres import training
from fastres.training.distributed import ALONE

CLASSES = 4


def pictures(count: int, seed: int = 0, side: int = 8):
    """Grey noise, (count, side, side) uint8, with one quarter brighter: which one is the label."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, count)
    pixels = draw.integers(0, 160, (count, side, side), dtype=np.uint8)
    half = side // 2
    for picture, label in zip(pixels, labels, strict=True):
        row, column = half * (label // 2), half * (label % 2)
        picture[row : row + half, column : column + half] += 90
    return pixels, labels


def write_arrays(folder, train: int = 60, test: int = 24):
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 1), ("test", test, 2)):
        pixels, labels = pictures(count, seed)
        np.savez(folder / f"{name}.npz", x=pixels, y=labels)
    return folder


def write_tree(folder, train: int = 24, test: int = 12, classes: str = "abcd"):
    from PIL import Image

    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        for index, (pixels, label) in enumerate(zip(*pictures(count, seed), strict=True)):
            place = folder / split / classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index:03d}.png")
    return folder


class Net(nn.Module):
    """A residual block with batch norm, dropout and a linear layer."""

    def __init__(self, num_classes: int = CLASSES, in_channels: int = 1, norm: bool = True):
        super().__init__()
        make = nn.BatchNorm2d if norm else lambda planes: nn.Identity()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 8, 3, padding=1), make(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), make(8)
        self.drop = nn.Dropout(0.2 if norm else 0.0)
        self.fc = nn.Linear(8 * 4, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.drop(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 2), 1)))


def seven_classes() -> nn.Module:
    return Net(num_classes=7)


def small_recipe(**values) -> training.Recipe:
    """Everything that is random and everything that has state, in three epochs of four steps."""
    base = training.Recipe(
        lr=0.1, batch=16, epochs=3, milestones=(0.4, 0.8), warmup=2, channels=1, pad=1, flip=0,
        mean=(0.4,), std=(0.3,),
    )  # fmt: skip
    return base.changed(values)


def make_run(
    data, folder, recipe=None, seed=0, norm=True, ranks=ALONE, **settings
) -> training.Run:  # fmt: skip
    """A run on the images in ``data``, of a network drawn from ``seed``."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    images, recipe = training.open_data(data), recipe or small_recipe()
    settings = training.Settings(seed=seed, **settings)
    return training.Run(Net(norm=norm), images, recipe, settings, folder, ranks=ranks)


class Interrupting:
    """``source``, which sends this process ``number`` when picture ``at`` (counted) is read."""

    def __init__(self, source, at: int, number: int = signal.SIGTERM):
        self.source, self.left, self.number = source, at, number

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.source[index]


def weights(run: training.Run) -> dict:
    """Every parameter and buffer of every model in ``run``."""
    return {
        f"{learner.name} {name}": value.clone()
        for learner in run.learners
        for name, value in learner.model.state_dict().items()
    }
