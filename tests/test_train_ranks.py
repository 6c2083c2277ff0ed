"""Two processes over gloo train as one does, and stop and go on together."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from learning import Interrupting, make_run, small_recipe, weights, write_arrays

from fastres import training
from fastres.training.distributed import Ranks, joined, synchronised

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
    pytest.mark.usefixtures("torchvision", "one_thread"),
]
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
RANKS = 2
# without batch norm, whose statistics are each rank's own, two half batches are one batch
ALIKE = {"recipe": small_recipe(flip=1), "norm": False, "dtype": "float64"}


def run_rank(rank: int, port: int, data, folder):
    """Everything one of the two processes does, in torchrun's environment."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    with joined("cpu") as ranks:
        assert ranks == Ranks(rank, RANKS, rank)
        straight = make_run(data, folder / "straight", ranks=ranks, **ALIKE)
        straight.train()
        stopped = make_run(data, folder / "stopped", ranks=ranks, **ALIKE)
        if rank == 1:  # only this one is told
            images = stopped.train_loader.dataset.images
            images.source = Interrupting(images.source, 40)
        with pytest.raises(training.Interrupted):
            stopped.train()
        position = stopped.iteration
        dist.barrier()
        stopped = make_run(data, folder / "stopped", ranks=ranks, **ALIKE)
        stopped.resume()
        stopped.train()
    results = {
        "straight": weights(straight), "resumed": weights(stopped), "position": position,
        "history": straight.history, "resumed history": stopped.history,
    }  # fmt: skip
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, data, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def figures(history):
    return [
        [row[name] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")]
        for row in history
    ]


def test_two_ranks_are_one_process(ranks, data, tmp_path):
    alone = make_run(data, tmp_path, **ALIKE)
    alone.train()
    for name, value in weights(alone).items():
        for results in ranks:
            torch.testing.assert_close(results["straight"][name], value, rtol=1e-9, atol=1e-11)
    for ours, wanted in zip(figures(ranks[0]["history"]), figures(alone.history), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-9)
    assert [row["iteration"] for row in ranks[0]["history"]] == [4, 8, 12]


def test_a_signal_to_one_stops_both_and_they_go_on_bit_for_bit(ranks):
    assert ranks[0]["position"] == ranks[1]["position"] < 12
    for results in ranks:
        for name, value in results["straight"].items():
            assert torch.equal(results["resumed"][name], value), name
    for ours, wanted in zip(
        figures(ranks[0]["resumed history"]), figures(ranks[0]["history"]), strict=True
    ):
        assert ours == pytest.approx(wanted, rel=1e-12)


def test_synchronised_batch_norm_needs_a_gpu(data, tmp_path):
    with pytest.raises(training.TrainingError, match="SyncBatchNorm works on GPUs only"):
        make_run(data, tmp_path, sync_bn=True)
    converted = synchronised(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), "cuda")
    assert type(converted[0]) is torch.nn.SyncBatchNorm
