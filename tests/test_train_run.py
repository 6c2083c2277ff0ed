"""A run of training: it learns, and an interrupted one ends as if it had not been interrupted."""

import csv
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from learning import CLASSES, Interrupting, Net, make_run, small_recipe, weights, write_arrays

import fastres
from fastres import training
from fastres.memory import peak_bytes
from fastres.training import checkpoint
from fastres.training.learner import Learner

pytestmark = pytest.mark.usefixtures("torchvision", "one_thread")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
BY_THE_CLOCK = ("images_per_second", "peak_bytes")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data"))


def assert_same(run, other):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    for row, wanted in zip(run.history, other.history, strict=True):
        assert {k: v for k, v in row.items() if k not in BY_THE_CLOCK} == {
            k: v for k, v in wanted.items() if k not in BY_THE_CLOCK
        }
    assert (run.folder / "steps.csv").read_text() == (other.folder / "steps.csv").read_text()


def interrupted(data, folder, recipe, at, test=False, number=signal.SIGTERM, **settings):
    """A new run that goes on from where the signal at the ``at``-th picture stopped the first."""
    first = make_run(data, folder, recipe, **settings)
    images = (first.test_loader if test else first.train_loader).dataset.images
    images.source = Interrupting(images.source, at, number)
    with pytest.raises(training.Interrupted, match="saved to") as caught:
        first.train()
    assert caught.value.number == number
    assert 0 < first.iteration < first.iterations or test
    second = make_run(data, folder, recipe, **settings)
    second.learners[0].model.fc.weight.data.zero_()  # nothing of it may survive
    second.resume()
    return second


# --- learning ------------------------------------------------------------------------------------


def test_it_learns_beside_eager(data, tmp_path, capsys):
    run = make_run(data, tmp_path, small_recipe(epochs=12, warmup=0), compare=True)
    said = []
    run.say = said.append
    history = run.train()
    assert len(said) == 12 and "test accuracy" in said[-1]
    last = {row["model"]: row for row in history[-2:]}
    assert last["fastres"]["test_accuracy"] > 0.8
    assert last["fastres"]["test_accuracy"] == pytest.approx(
        last["eager"]["test_accuracy"], abs=0.1
    )
    assert history[0]["train_loss"] > last["fastres"]["train_loss"]
    with open(tmp_path / "steps.csv", newline="") as stream:
        steps = [list(map(float, row)) for row in list(csv.reader(stream))[1:]]
    assert len(steps) == 12 * 4 and [row[0] for row in steps] == list(range(1, 49))
    assert steps[0][1] == pytest.approx(steps[0][2], rel=1e-5)
    with open(tmp_path / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[-1]["test_accuracy"]) == last["eager"]["test_accuracy"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for row in last.values():
        assert row["images_per_second"] > 0 and row["peak_bytes"] > 16 * 8 * 64 * 4


def test_side_by_side_both_draw_the_same(data, tmp_path):
    """In fp64 the two differ by rounding only: same images, same dropout, same order."""
    run = make_run(data, tmp_path, compare=True, dtype="float64")
    run.train()
    ours, eager = (learner.model.state_dict() for learner in run.learners)
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-9, atol=1e-9)
    assert len(fastres.summary(run.learners[0].model).fused) == 2
    assert type(run.learners[1].model) is Net


def test_a_step_is_sgd_on_cross_entropy():
    model = Net().eval()
    twin = Net()
    twin.load_state_dict(model.state_dict())
    twin.drop.p = model.drop.p = 0.0
    recipe = small_recipe(warmup=0, milestones=())
    learner = Learner("fastres", model, recipe, 10, training.Settings(), training.run.ALONE)
    images, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    sgd = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for number in range(3):
        loss = learner.step(images, labels, number)
        sgd.zero_grad()
        expected = F.cross_entropy(twin(images), labels)
        expected.backward()
        sgd.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert learner.totals.sums[2] == 15


def test_the_schedule_is_stepped_every_iteration():
    recipe = small_recipe(lr=1.0, milestones=(0.5, 0.75), warmup=3)
    learner = Learner("eager", Net(), recipe, 8, training.Settings(), training.run.ALONE)
    rates = []
    for _ in range(8):
        rates.append(learner.lr)
        learner.optimizer.step()
        learner.schedule.step()
    assert rates == pytest.approx([0.1, 0.1, 0.1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("settings", [{"amp": "bfloat16"}, {"channels_last": True}], ids=str)
def test_other_settings_learn_too(data, tmp_path, settings):
    history = make_run(data, tmp_path, small_recipe(epochs=10, warmup=0), **settings).train()
    assert history[-1]["test_accuracy"] > 0.8


def test_compiled_it_learns_the_same(data, tmp_path):
    """A compiler that only traces: what it is given is what is trained."""
    compiled = []

    def trace(function, **options):
        compiled.append(function)
        return function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", trace)
        (tmp_path / "a").mkdir()
        run = make_run(data, tmp_path / "a", compile=True)
        run.train()
    plain = make_run(data, tmp_path / "b")
    plain.train()
    assert compiled == [run.learners[0].model]
    assert_same(run, plain)


def test_a_run_may_end_within_an_epoch(data, tmp_path):
    run = make_run(data, tmp_path, small_recipe(iterations=6))
    history = run.train()
    assert [row["iteration"] for row in history] == [4, 6]
    assert run.epoch == 2 and run.batch == 0


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    run = make_run(data, tmp_path, small_recipe(lr=1e30, warmup=0))
    with pytest.raises(training.TrainingError, match=r"loss of fastres is (nan|inf) at iteration"):
        run.train()
    assert not run.file.exists(), "such weights must not replace a checkpoint"


def test_tensorboard_has_the_same_figures(data, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = make_run(data, tmp_path, small_recipe(epochs=2)).train()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    accuracies = [event.value for event in events.Scalars("test_accuracy/fastres")]
    assert accuracies == pytest.approx([row["test_accuracy"] for row in history])
    assert [event.step for event in events.Scalars("loss/fastres")] == list(range(1, 9))


def test_peak_memory_is_that_of_the_tensors_alive_together():
    def call():
        first = torch.empty(1000)
        del first
        second, third = torch.empty(2000), torch.empty(500)
        return second, third

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(10_000, abs=200)


# --- interruption --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory, request):
    """Runs to the end by their settings, made once."""
    done = {}

    def get(recipe, **settings):
        key = (recipe, *settings.items())
        if key not in done:
            done[key] = make_run(data, tmp_path_factory.mktemp("run"), recipe, **settings)
            done[key].train()
        return done[key]

    return get


# pictures are read in batches of 16, 60 an epoch (the first of all is read once more, to look
# whether the model fits): 70 lies in the second epoch, 100 near its end
@pytest.mark.parametrize("at", [20, 70, 100])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_bit_for_bit(data, tmp_path, straight, optimizer, at):
    recipe = small_recipe(optimizer=optimizer, lr=0.05)
    second = interrupted(data, tmp_path, recipe, at)
    second.train()
    assert_same(second, straight(recipe))


def test_resumed_bit_for_bit_beside_eager(data, tmp_path, straight):
    recipe = small_recipe()
    second = interrupted(data, tmp_path, recipe, 70, number=signal.SIGINT, compare=True)
    second.train()
    assert_same(second, straight(recipe, compare=True))


def test_interrupted_while_it_evaluates(data, tmp_path, straight):
    """24 test images: picture 30 is in the second epoch's evaluation."""
    recipe = small_recipe()
    second = interrupted(data, tmp_path, recipe, 30, test=True)
    assert (second.epoch, second.batch, len(second.history)) == (1, 4, 1)
    second.train()
    assert_same(second, straight(recipe))


def test_workers_change_nothing(data, tmp_path, straight):
    run = make_run(data, tmp_path, small_recipe(), workers=2)
    run.train()
    assert_same(run, straight(small_recipe()))


def test_handlers_are_restored(data, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupted(data, tmp_path, small_recipe(), 20)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_has_ended_does_nothing_more(data, tmp_path):
    make_run(data, tmp_path).train()
    before = (tmp_path / "steps.csv").read_text()
    again = make_run(data, tmp_path)
    again.resume()
    assert len(again.train()) == 3 and (tmp_path / "steps.csv").read_text() == before


def test_losses_written_after_the_checkpoint_are_written_once(data, tmp_path):
    """A run that was killed, not interrupted: its log is ahead of its checkpoint."""
    run = make_run(data, tmp_path)
    run.train()
    whole = (tmp_path / "steps.csv").read_text()
    second = interrupted(data, tmp_path / "b", small_recipe(), 70)
    with open(tmp_path / "b" / "steps.csv", "a") as stream:
        stream.write("6,9.0\n7,9.0\n8,")
    second.train()
    assert (tmp_path / "b" / "steps.csv").read_text() == whole


# --- checkpoints of others -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": small_recipe(lr=0.2)}, r"of another run: lr 0.1 there, 0.2 here"),
        ({"seed": 3}, "seed 0 there, 3 here"),
        ({"compare": True}, "compare False there, True here"),
    ],
    ids=["lr", "seed", "compare"],
)
def test_another_run_is_refused(data, tmp_path, change, message):
    make_run(data, tmp_path, small_recipe(iterations=1)).train()
    change = {"recipe": small_recipe(iterations=1)} | change
    if change["recipe"].iterations == 0:
        change["recipe"] = change["recipe"].changed({"iterations": 1})
    with pytest.raises(training.TrainingError, match=message):
        make_run(data, tmp_path, **change).resume()


def test_weights_alone_are_no_run(data, tmp_path):
    run = make_run(data, tmp_path)
    checkpoint.save(run.file, Net().state_dict())
    with pytest.raises(training.TrainingError, match="none of a run of fastres train"):
        run.resume()


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    """The checkpoint of the first epoch survives, and the run goes on from it."""
    run = make_run(data, tmp_path)
    saved, save = [], checkpoint.save

    def second_fails(file, state):
        saved.append(file)
        with pytest.MonkeyPatch.context() as patch:
            if len(saved) == 2:
                patch.setattr(checkpoint.os, "fsync", no_space)
            save(file, state)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", second_fails)
    with pytest.raises(training.TrainingError, match="No space left on device.* is kept in"):
        run.train()
    monkeypatch.undo()
    again = make_run(data, tmp_path)
    again.resume()
    assert again.epoch == 1 and again.iteration == 4
    again.train()
    assert math.isclose(again.history[-1]["lr"], 0.1 * 0.1 * 0.1) and again.classes == CLASSES
