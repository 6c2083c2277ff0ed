"""The switch for Winograd's accuracy: what it allows, and what each choice loses."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastres
from fastres import ops

pytestmark = pytest.mark.skipif(
    ops.extension is None, reason="the compiled extension is not installed"
)
CHOICES = ("auto", 4, 2, "off")
# The largest error of an output over its largest value, against fp64.
BOUND = 4e-6


def algorithms() -> set[str]:
    """What computes 3x3 convolutions of stride 1, over channels and sizes."""
    return {
        ops.extension.conv_algorithm(
            torch.empty(1, c, s, s), torch.empty(c, c, 3, 3), 1, 1, 1, False
        )
        for c in (16, 64, 256, 512)
        for s in (7, 14, 56)
    }


def test_choices_bound_the_tile():
    usual = algorithms()
    assert "winograd4" in usual or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    with fastres.winograd(2):
        assert algorithms() <= {"direct", "winograd2"}
        with fastres.winograd("off"):
            assert not any(name.startswith("winograd") for name in algorithms())
            with fastres.winograd(4):
                assert algorithms() == usual
        assert "winograd4" not in algorithms()
    assert algorithms() == usual


def test_a_failure_inside_restores_the_choice():
    usual = algorithms()
    with pytest.raises(KeyError), fastres.winograd("off"):
        raise KeyError
    assert algorithms() == usual


@pytest.mark.parametrize("tile", [3, 6, "on", True, None, 2.0, ""])
def test_other_choices_are_refused(tile):
    with pytest.raises(ValueError, match=r"tile: expected 'auto', 4, 2 or 'off', got"):
        fastres.winograd(tile)


def test_environment_variable():
    script = "import fastres; from fastres import ops, winograd; import torch;"
    script += "print(ops.extension.conv_algorithm("
    script += "torch.empty(1, 64, 56, 56), torch.empty(64, 64, 3, 3), 1, 1, 1, False))"

    def run(value):
        return subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True, text=True,
            env=os.environ | {"FASTRES_WINOGRAD": value},
        )  # fmt: skip

    assert not run("off").stdout.startswith("winograd")
    refused = run("8")
    assert refused.returncode == 1 and "FASTRES_WINOGRAD: expected 'auto'" in refused.stderr


def largest_error(model: nn.Module, images: torch.Tensor, tile) -> float:
    with torch.inference_mode(), fastres.winograd(tile):
        found = fastres.convert(model, inplace=False)(images).double()
        truth = model.double()(images.double())
        model.float()
    return ((found - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("tile", CHOICES)
def test_error_of_a_random_network(torchvision, tile):
    model = torchvision.models.resnet18().eval()
    assert largest_error(model, torch.randn(2, 3, 96, 96), tile) < BOUND


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 40), k=st.integers(1, 70), h=st.integers(3, 19),
    w=st.integers(3, 19), padding=st.integers(0, 2), bias=st.booleans(), last=st.booleans(),
    tile=st.sampled_from(CHOICES),
)  # fmt: skip
def test_shapes(n, c, k, h, w, padding, bias, last, tile):
    """3x3 convolutions of any shape, under every choice."""
    torch.manual_seed(n * c * k + h * w)
    conv, bn = nn.Conv2d(c, k, 3, padding=padding, bias=bias), nn.BatchNorm2d(k)
    bn.running_mean.normal_(0, 0.3)
    bn.running_var.uniform_(0.5, 1.5)
    model = nn.Sequential(conv, bn).eval()
    images = torch.randn(n, c, h, w)
    if last:
        images = images.to(memory_format=torch.channels_last)
    assert largest_error(model, images, tile) < BOUND
