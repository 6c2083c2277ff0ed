"""What a model costs, beside what can be counted by hand and the paper's table."""

import csv

import pytest
import torch
from families import trace
from torch import nn

import fastres
from fastres import ops
from fastres.cli import main
from fastres.models import create, measure

BOTTLENECK = {"stride_on": "1x1"}


@pytest.mark.parametrize("name, options, billions", [
    ("resnet18", {}, 1.8), ("resnet34", {}, 3.6), ("resnet50", BOTTLENECK, 3.8),
    ("resnet101", BOTTLENECK, 7.6), ("resnet152", BOTTLENECK, 11.3),
])  # fmt: skip
def test_multiply_adds_of_the_papers_table(name, options, billions):
    """He et al. 2015, table 1. The paper rounds; its own counts leave out the projections here and
    there: within 2 %."""
    with torch.device("meta"):
        counted = measure.multiply_adds(create(name, **options), (1, 3, 224, 224)) / 1e9
    assert counted == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_output_sizes_of_the_papers_table(name):
    factor = 1 if name in ("resnet18", "resnet34") else 4
    planes = [(64, 56), (128, 28), (256, 14), (512, 7)]
    expected = [(64, 112), *((factor * c, size) for c, size in planes), (1000,)]
    for options in ({}, BOTTLENECK) if factor == 4 else ({},):
        assert trace(name, 224, **options) == expected


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4)
    )


def test_counts_by_hand():
    net = network()
    assert measure.parameters(net) == 3 * 8 * 9 + 8 * 25 * 4 + 4
    assert measure.multiply_adds(net, (1, 3, 5, 5)) == 3 * 8 * 9 * 25 + 8 * 25 * 4
    assert measure.multiply_adds(net, (6, 3, 5, 5)) == 6 * measure.multiply_adds(net, (1, 3, 5, 5))
    shapes = [("0", (2, 8, 5, 5)), ("1", (2, 8, 5, 5)), ("2", (2, 200)), ("3", (2, 4))]
    assert measure.stage_shapes(net, (2, 3, 5, 5)) == shapes
    assert not any(p.is_meta for p in net.parameters()), "the model itself keeps its values"
    # kept beside the images: the ReLU's output, which the linear layer shares (flattened, it is the
    # same memory)
    assert measure.activation_bytes(net, torch.randn(2, 3, 5, 5)) == 4 * 2 * 8 * 25


def test_measuring_leaves_the_model_as_it_was():
    model = create("cifar_resnet8").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 16, 16)
    measure.stage_shapes(model, images.shape), measure.multiply_adds(model, images.shape)
    assert measure.activation_bytes(model, images) > 0
    assert measure.milliseconds(model, images, rounds=1) > 0
    assert model.training and not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("backend, kept", [
    pytest.param("cpu", 3, marks=pytest.mark.skipif(ops.extension is None, reason="recomputes")),
    ("eager", 4),
])  # fmt: skip
def test_an_activation_is_counted_once(backend, kept):
    """Per block and image: its input, two convolutions' outputs, and in eager the ReLU between
    them, which fastres makes again."""
    shallow, deep = (create(f"cifar_resnet{depth}") for depth in (8, 14))
    images = torch.randn(4, 3, 16, 16)
    with fastres.backend(backend):
        more = [measure.activation_bytes(model, images) for model in (shallow, deep)]
    maps = 16 * 16 * 16 + 32 * 8 * 8 + 64 * 4 * 4
    vectors = 2 * 2 * (16 + 32 + 64)  # means and deviations of two batch norms
    assert more[1] - more[0] == 4 * (4 * kept * maps + vectors)


def test_table_command(tmp_path, capsys):
    file = tmp_path / "table.csv"
    arguments = ["table", "cifar_resnet8", "cifar_resnet?0,num_classes=3", "--rounds", "1"]
    assert main([*arguments, "--size", "8", "--csv", str(file)]) == 0
    output = capsys.readouterr().out
    assert "cifar_resnet20,num_classes=3" in output and "multiply-adds" in output
    rows = list(csv.DictReader(file.open()))
    assert [row["model"] for row in rows] == ["cifar_resnet8", "cifar_resnet20,num_classes=3"]
    for row, depth, classes in zip(rows, (8, 20), (10, 3), strict=True):
        model = fastres.models.cifar_resnet(depth, num_classes=classes)
        assert int(row["parameters"]) == measure.parameters(model)
        assert int(row["multiply_adds"]) == measure.multiply_adds(model, (1, 3, 8, 8))
        assert row["maps"] == "8 8 4 2" and float(row["ms_per_image"]) > 0
        fewer = int(row["activation_bytes"]) < int(row["eager_activation_bytes"])
        assert fewer or ops.extension is None


@pytest.mark.parametrize("arguments, message", [
    (["resnet5"], "no model is called 'resnet5'; did you mean resnet50"),
    (["resnet18,stem=mnist"], "stem: expected one of imagenet, cifar, got 'mnist'"),
    (["resnet18", "--csv", "/nowhere/table.csv"], "--csv: no such folder: /nowhere"),
])  # fmt: skip
def test_table_called_wrongly(capsys, arguments, message):
    assert main(["table", *arguments]) == 2
    assert message in capsys.readouterr().err
