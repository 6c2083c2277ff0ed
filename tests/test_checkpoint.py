"""Files of checkpoints: whole or not there; damaged ones, others', and a disk that is full."""

import os
import resource

import pytest
import torch
from learning import Net

from fastres.training import TrainingError
from fastres.training.checkpoint import load, load_weights, save, write_atomically


def state():
    torch.manual_seed(0)
    return {"learners": {"fastres": Net().state_dict()}, "epoch": 3, "history": [{"lr": 0.1}]}


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "checkpoint.pt"
    save(file, state())
    loaded = load(file)
    assert loaded["epoch"] == 3 and loaded["history"] == [{"lr": 0.1}]
    for name, value in state()["learners"]["fastres"].items():
        assert torch.equal(loaded["learners"]["fastres"][name], value)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file):
    """One bit of a weight, which torch.load does not notice."""
    weight = state()["learners"]["fastres"]["conv2.weight"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(weight) + 100] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["epoch"] == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is damaged, or no checkpoint"),
        (_flip, "is damaged: checksum of"),
        (lambda file: file.write_bytes(b""), "is damaged, or no checkpoint"),
        (lambda file: file.write_text("weights"), "is damaged, or no checkpoint"),
        (lambda file: file.unlink(), "no such file"),
        (lambda file: torch.save([1], file), "holds a list, not a state"),
        (lambda file: torch.save({"format": 99}, file), "of format 99, not 1"),
        (lambda file: torch.save({"a": Net()}, file), "is damaged, or no checkpoint"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    file = tmp_path / "checkpoint.pt"
    save(file, state())
    damage(file)
    with pytest.raises(TrainingError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_disk_that_is_full_half_way(tmp_path):
    """The system refuses to write beyond 4 KB: what was there stays, and nothing else is left."""
    file = tmp_path / "checkpoint.pt"
    save(file, {"epoch": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot save .*: File too large; .* is kept in"):
            save(file, state() | {"more": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(file)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(TrainingError, match="cannot save .*: No such file or directory$"):
        write_atomically(tmp_path / "gone" / "file", b"")


def test_weights_as_scripts_save_them(tmp_path):
    torch.manual_seed(3)
    trained, model = Net(), Net()
    theirs = {
        f"module.{name}".replace(".fc.", ".linear."): value
        for name, value in trained.state_dict().items()
    }
    assert "module.linear.weight" in theirs
    load_weights(model, {"state_dict": theirs}, tmp_path)
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    "other", [{"conv1.weight": torch.zeros(1)}, Net(num_classes=7).state_dict(), {"epoch": 1}]
)
def test_weights_of_another_model(tmp_path, other):
    with pytest.raises(TrainingError, match="is of another model: Error") as caught:
        load_weights(Net(), other, tmp_path / "file")
    assert "\n" not in str(caught.value)
