"""Forwards that read namespaces and dataclasses: fused while those stay as they are."""

import argparse
import copy
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from converting import FUSED, Block, assert_same, images, kinds, randomized, reasons, results

import fastres
from fastres.convert.purity import GUARDS_RECORDS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not GUARDS_RECORDS, reason="this PyTorch's compiler cannot read the guards"),
]


@dataclass
class Scale:
    gain: float = 2.0

    @property
    def twice(self):
        return 2 * self.gain


@dataclass
class Config:
    skip: bool = True
    scale: Scale = field(default_factory=Scale)
    shifts: list = field(default_factory=lambda: [1.0, 2.0])

    def shift(self, index):
        return self.shifts[index]


def namespace(kind):
    """As :class:`Config`, its method being a function that it holds, with what options hold too."""
    return kind(
        skip=True, scale=Scale(), shifts=[1.0, 2.0], shift=lambda index: 1.0 + index,
        out=Path("runs"), device=torch.device("cpu"), seed=None, layers=[1, {"width": (8, 8)}],
    )  # fmt: skip


CONFIGS = {
    "dataclass": Config,
    "argparse": lambda: namespace(argparse.Namespace),
    "simple": lambda: namespace(types.SimpleNamespace),
}


class Configured(Block):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        out = super().forward(x) * self.config.scale.twice + self.config.shifts[1]
        if self.config.skip:
            out = out + x
        if hasattr(self.config, "more"):
            out = out * 3
        return out + self.config.shift(0)


def set_attribute(model):
    model.config.skip = False


def set_inner_attribute(model):
    model.config.scale.gain = 5.0


def set_item(model):
    model.config.shifts[1] = 7.0


def add_attribute(model):
    model.config.more = 1


def replace_inner(model):
    model.config.scale = types.SimpleNamespace(twice=0.5)


def replace(model):
    model.config = Config(skip=False)


CHANGES = [set_attribute, set_inner_attribute, set_item, add_attribute, replace_inner, replace]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_change_is_seen(config, change):
    model = randomized(Configured(CONFIGS[config]())).double()
    converted = fastres.convert(model, inplace=False)
    assert kinds(converted) == FUSED
    x = images().double()
    for training in (True, False):
        assert_same(results(converted, [x], training), results(model, [x], training))
    before = model(x)
    change(model), change(converted)
    assert not torch.allclose(before, model(x))
    for training in (True, False):
        assert_same(results(converted, [x], training), results(model, [x], training))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_compiled_model_sees_a_change(config):
    torch._dynamo.reset()
    model = fastres.convert(Configured(CONFIGS[config]())).eval()
    x = images()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    model.config.scale.gain = 5.0
    assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(compiled(x), model(x))


class Grows(Configured):
    def forward(self, x):
        self.config.shifts.append(1.0)
        return super().forward(x)


class Shared(Config):
    table: ClassVar[list] = [1.0]


class Answers(argparse.Namespace):
    def __getattr__(self, name):
        if name != "more":
            raise AttributeError(name)
        return 1.0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Grows(Config()), "changes a list or dict"),
        (lambda: Configured(Shared()), "uses config, a Shared that may change"),
        (lambda: Configured(Answers(scale=Scale())), "uses config, a Answers that may change"),
        (lambda: Configured(argparse.Namespace(**{"class": 1})), "a Namespace that may change"),
    ],
)
def test_left_alone(model, reason):
    model = model()
    before = copy.deepcopy(model.config)
    assert reason in reasons(fastres.convert(model))["conv1"]
    assert vars(model.config) == vars(before)
