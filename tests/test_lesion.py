"""Lesion studies: a deleted block is the shortcut alone, a path is a path."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import close, fill

from fastres import lesion
from fastres.cli import main
from fastres.models import create
from fastres.residual import residual_blocks

SMALL = {"widths": (4, 6, 8), "num_classes": 3}


def small(name="cifar_resnet14"):
    return fill(create(name, **SMALL)).eval()


def test_deleting_a_block_leaves_its_shortcut(one_thread):
    for name in ("cifar_resnet14", "cifar_resnetv2_11"):
        model, x = small(name), torch.randn(2, 3, 12, 12)
        for block in lesion.deletable(model).values():
            seen = []
            handle = block.register_forward_hook(lambda _m, x, y, seen=seen: seen.append((x[0], y)))
            with torch.no_grad(), lesion.without([block]):
                model(x)
            handle.remove()
            (input, output), preact = seen[0], hasattr(block, "branch")
            if block.downsample is None:
                assert output is input
            else:
                operand = block.bn1(input).relu() if preact else input
                expected = block.downsample(operand)
                expected = expected if preact else expected.relu()
                torch.testing.assert_close(output, expected.detach(), rtol=1e-4, atol=1e-5)
            assert block.survival == 1.0, "restored"


def test_a_plain_network_loses_blocks_that_keep_the_shape(one_thread):
    model = small("cifar_plain14")
    assert list(lesion.deletable(model)) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    shorter = create("cifar_plain14", **SMALL).eval()
    shorter.load_state_dict(model.state_dict())
    del shorter.layer2[1]
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad(), lesion.without([model.layer2[1]]):
        torch.testing.assert_close(model(x), shorter(x))
    changes = pytest.raises(ValueError, match="changes the shape")
    with torch.no_grad(), changes, lesion.without([model.layer2[0]]):
        model(x)
    assert model.layer2[0].survival == 1.0, "restored after an error"
    with pytest.raises(ValueError, match="model: DenseNet has no block of fastres to delete"):
        lesion.deletable(create("densenet121"))


def test_scores_one_by_one_and_at_random():
    model = small()
    blocks = lesion.deletable(model)

    def score():  # which blocks are there, as a number
        return sum(2**i for i, block in enumerate(blocks.values()) if block.survival)

    rows = lesion.one_by_one(model, score)
    assert [(row.deleted, row.blocks) for row in rows] == [(0, ""), *((1, n) for n in blocks)]
    assert [63 - row.score for row in rows] == [0, 1, 2, 4, 8, 16, 32]
    rows = lesion.at_random(model, score, [0, 2, 6], repeats=4, seed=1)
    assert [row.deleted for row in rows] == [0, 2, 2, 2, 2, 6]
    for row in rows:
        names = row.blocks.split()
        assert len(set(names)) == row.deleted
        assert 63 - row.score == sum(2 ** list(blocks).index(name) for name in names)
    assert rows == lesion.at_random(model, score, [0, 2, 6], repeats=4, seed=1)
    assert rows != lesion.at_random(model, score, [0, 2, 6], repeats=4, seed=2)
    every = lesion.at_random(model, score, [1, 4], repeats=10)
    assert len({row.score for row in every}) == 6 + 10, "no set comes twice"
    with pytest.raises(ValueError, match="counts: expected at most 6 blocks, got 7"):
        lesion.at_random(model, score, [7])


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_resnetv2_11"])
def test_the_gradient_is_the_sum_over_all_paths(one_thread, name):
    """Every block passes the gradient by its branch or by its shortcut: 2^3 paths make it whole."""
    model = small(name).double()
    blocks = residual_blocks(model)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2])

    def gradient():
        return torch.autograd.grad(F.cross_entropy(model(x), labels), x)[0]

    whole, total = gradient(), torch.zeros_like(x)
    for path in range(2 ** len(blocks)):
        with lesion.one_path(blocks, [b for i, b in enumerate(blocks) if path >> i & 1]):
            total = total + gradient()
    close(total, whole, "sum over paths")
    close(gradient(), whole, "the blocks' own forward is back")


def test_gradient_by_path_length(one_thread):
    model, count = small(), 6
    x, labels = torch.randn(3, 3, 9, 9), torch.tensor([0, 1, 2])
    rows = lesion.gradient_by_path_length(model.train(), x, labels, samples=2)
    assert model.training and [row.length for row in rows] == list(range(count + 1))
    assert [row.paths * 64 for row in rows] == [1, 6, 15, 20, 15, 6, 1]
    assert sum(row.share for row in rows) == pytest.approx(1)
    products = [row.paths * row.gradient for row in rows]
    for row, product in zip(rows, products, strict=True):
        assert row.share == pytest.approx(product / sum(products))
    model.eval()
    for length, keep in ((0, ()), (count, residual_blocks(model))):
        images = x.clone().requires_grad_()
        with lesion.one_path(residual_blocks(model), keep):
            loss = F.cross_entropy(model(images), labels, reduction="sum")
        expected = torch.autograd.grad(loss, images)[0].flatten(1).norm(dim=1).mean()
        assert rows[length].gradient == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(ValueError, match="model: ResNet is no residual network"):
        lesion.gradient_by_path_length(small("cifar_plain14"), x, labels)


@pytest.fixture
def digits(tmp_path):
    """Bright and dark squares, and untrained networks that took on their statistics."""
    draw = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 24)):
        labels = np.arange(number) % 3
        noise = draw.integers(0, 60, (number, 8, 8, 3))
        pixels = (noise + 80 * labels[:, None, None, None]).astype(np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=pixels, y=labels)
    files = {}
    for name in ("cifar_resnet14", "cifar_plain14"):
        files[name] = tmp_path / f"{name}.pt"
        torch.save(small(name).state_dict(), files[name])
    return tmp_path, files


def test_lesion_command(one_thread, digits, capsys):
    folder, files = digits
    out = folder / "out"
    arguments = [
        "lesion", "fastres:cifar_resnet14", "--checkpoint", str(files["cifar_resnet14"]),
        "--plain", "fastres:cifar_plain14", str(files["cifar_plain14"]),
        "--model-options", "widths=(4,6,8)", "--recipe", "cifar", "--data", str(folder),
        "--limit", "24", "--counts", "1", "3", "--repeats", "2", "--samples", "1",
        "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = list(csv.DictReader((out / "deleted.csv").open()))
    residual = [row for row in rows if row["model"] == "fastres:cifar_resnet14"]
    plain = [row for row in rows if row["model"] == "fastres:cifar_plain14"]
    assert len(residual) == 7 + 4 and len(plain) == 5 + 4
    for row in rows:
        assert float(row["score"]) * 24 == pytest.approx(round(float(row["score"]) * 24))
    by_name = {row["blocks"]: row["score"] for row in residual[:7]}
    for row in residual[7:9]:  # one block at random: what one by one gave
        assert row["score"] == by_name[row["blocks"]]
    paths = list(csv.DictReader((out / "paths.csv").open()))
    assert [row["length"] for row in paths] == [str(k) for k in range(7)]
    assert {row["model"] for row in paths} == {"fastres:cifar_resnet14"}
    assert (out / "lesion.png").read_bytes().startswith(b"\x89PNG")
    assert "without 3 at random" in capsys.readouterr().out
    assert main([*arguments[:4], "--data", str(folder / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
