"""A run: one model, or two side by side, from the first step or a checkpoint to the last."""

import copy
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

from . import checkpoint
from .data import Images
from .distributed import ALONE, Ranks
from .errors import TrainingError, library
from .evaluation import Score, evaluate, predict
from .interrupt import Interrupts
from .learner import Learner
from .loading import Batch, OrderedBatches, Prepared, ShuffledBatches, loader
from .log import Log
from .recipes import Recipe
from .settings import Settings

FLUSH_EVERY = 20  # steps between two looks at the losses, for which a GPU has to be waited for
WARM_UP = 2  # steps that are not timed; the second one's memory is measured
CHECKPOINT = "checkpoint.pt"


class Interrupted(Exception):
    """A signal came, and everything is saved; ``number`` is the signal's."""

    def __init__(self, number: int, iteration: int, file: Path):
        super().__init__(f"interrupted at iteration {iteration}, saved to {file}")
        self.number = number


class Run:
    """Training of ``model`` on ``data`` (training and test images) as ``recipe`` says.

    ``folder`` takes the results. ``identity`` is what else they depend on, such as the model's
    name: a checkpoint with another one is refused. ``say`` is given a line for every epoch.
    """

    def __init__(
        self, model: nn.Module, data: tuple[Images, Images], recipe: Recipe, settings: Settings,
        folder: Path, identity: dict | None = None, ranks: Ranks = ALONE,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.settings, self.ranks, self.folder, self.say = settings, ranks, folder, say
        self.classes = len(data[0].classes)
        pin = settings.device == "cuda"
        self.batches = ShuffledBatches(len(data[0]), recipe.batch, settings.seed, ranks)
        if not len(self.batches):
            raise TrainingError(f"data: {len(data[0])} training image is not enough")
        prepared = Prepared(data[0], recipe, True, settings.seed)
        self.train_loader = loader(prepared, self.batches, settings.workers, pin)
        test = Prepared(data[1], recipe, False, settings.seed)
        ordered = OrderedBatches(len(data[1]), self.batches.batch, ranks)
        self.test_loader = loader(test, ordered, settings.workers, pin)
        self.iterations = recipe.iterations or recipe.epochs * len(self.batches)

        names = ["fastres", "eager"] if settings.compare else [_name(settings)]
        models = [model, *(copy.deepcopy(model) for _ in names[1:])]
        self.learners = [
            Learner(name, twin, recipe, self.iterations, settings, ranks)
            for name, twin in zip(names, models, strict=True)
        ]
        self.identity = (identity or {}) | _identity(data, recipe, settings, ranks)
        self.iteration = self.epoch = self.batch = self.skipped = self.fresh = 0
        self.history: list[dict] = []

    @property
    def file(self) -> Path:
        return self.folder / CHECKPOINT

    def train(self) -> list[dict]:
        """Train to the end; the rows of ``metrics.csv``.

        Raises :class:`Interrupted` after SIGINT or SIGTERM, when all is saved, and
        :class:`TrainingError`; then the last checkpoint holds what was reached before.
        """
        self.log = self._open_log() if self.ranks.first else None
        try:
            with Interrupts() as self.interrupts:
                self._check_fit()
                while self.iteration < self.iterations or self.batch:
                    self._run_epoch()
        finally:
            if self.log:
                self.log.close()
        return self.history

    def _open_log(self) -> Log:
        return Log(self.folder, [learner.name for learner in self.learners], self.iteration)

    def _check_fit(self) -> None:
        """The model runs on these images and has these classes, seen before anything is learnt."""
        place = (0, 0)
        batch = Batch([self.train_loader.dataset[place]] * 2)
        if not len(batch):  # undecodable, which the first epoch will say
            return
        for learner in self.learners:
            learner.model.eval()
            predict(
                learner.model, self.settings.place(batch.images), learner.settings, self.classes
            )

    # --- an epoch ----------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        self.batches.epoch, self.batches.start = self.epoch, self.batch
        if self.iteration < self.iterations:
            with self._progress() as bar:
                self._run_steps(bar)
        self._flush()
        self._finish_epoch()
        self._save()

    def _run_steps(self, bar) -> None:
        """To the end of the epoch, or of the run."""
        for batch in self.train_loader:
            self._step(batch)
            self._show(bar, len(batch))
            self._stop_if_asked()
            if self.iteration == self.iterations:
                return

    def _step(self, batch: Batch) -> None:
        batch.check(self.settings.strict)
        if not len(batch):
            raise TrainingError(
                f"data: no image of a batch can be decoded, such as {batch.skipped[0]}"
            )
        images = self.settings.place(batch.images)
        labels = batch.labels.to(self.settings.device, non_blocking=True)
        losses = {}
        # turns are taken in leading, so that neither has the warmer caches
        for learner in self.learners[:: 1 if self.iteration % 2 else -1]:
            call = learner.step
            if self.settings.compare and self.iteration == WARM_UP - 1:
                call = learner.measured_step
            elif self.fresh >= WARM_UP:
                call = learner.timed_step
            losses[learner.name] = call(images, labels, self.iteration)
        self.iteration += 1
        self.batch += 1
        self.fresh += 1
        self.skipped += len(batch.skipped)
        if self.log:
            self.log.step(self.iteration, [losses[learner.name] for learner in self.learners])
        if self.iteration % FLUSH_EVERY == 0:
            self._flush()

    def _finish_epoch(self) -> None:
        rows = []
        for learner in self.learners:
            score = evaluate(
                learner.model, self.test_loader, learner.settings, self.classes, self.ranks,
                lambda: bool(self.interrupts.number),
            )  # fmt: skip
            if score is None:
                self._interrupt()
            rows.append(self._row(learner, score))
        self.history += rows
        for learner in self.learners:
            learner.totals.reset()
        self.epoch, self.batch, self.skipped = self.epoch + 1, 0, 0
        if self.log:
            self.log.epoch(self.history)
            self.say(_sentence(rows))

    def _row(self, learner: Learner, score: Score) -> dict:
        totals = learner.totals
        loss, correct, images, skipped = self.ranks.sum([*totals.sums.tolist(), self.skipped])
        seconds, timed = totals.seconds, totals.timed * self.ranks.world
        return {
            "epoch": self.epoch + 1,
            "model": learner.name,
            "iteration": self.iteration,
            "lr": learner.lr,
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "test_loss": score.loss,
            "test_accuracy": score.accuracy,
            "images_per_second": round(timed / seconds, 2) if timed else None,
            "peak_bytes": learner.peak,
            "skipped": int(skipped) + score.skipped,
        }

    # --- the progress bar ----------------------------------------------------------------------

    def _progress(self):
        tqdm = library("tqdm").tqdm
        shown = self.batches.batch * self.ranks.world
        return tqdm(
            total=min(len(self.batches), self.batch + self.iterations - self.iteration) * shown,
            initial=self.batch * shown, unit=" images", smoothing=0.1,
            desc=f"epoch {self.epoch + 1}", disable=None if self.ranks.first else True,
        )  # fmt: skip

    def _show(self, bar, images: int) -> None:
        bar.update(images * self.ranks.world)
        if self.iteration % FLUSH_EVERY == 0 and not bar.disable:
            means = {learner.name: learner.totals.mean_loss() for learner in self.learners}
            bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()}, refresh=False)

    def _flush(self) -> None:
        if self.log:
            self.log.flush()

    # --- interruption, saving, resuming --------------------------------------------------------

    def _stop_if_asked(self) -> None:
        if self.ranks.any(bool(self.interrupts.number)):
            self._interrupt()

    def _interrupt(self) -> None:
        self._flush()
        self._save()
        # the signal may have reached other ranks only
        raise Interrupted(self.interrupts.number or signal.SIGTERM, self.iteration, self.file)

    def _save(self) -> None:
        state = self.state()
        if self.ranks.first:
            checkpoint.save(self.file, state)

    def state(self) -> dict:
        """All that a run needs to go on as if it had not been interrupted; every rank has to call
        it. What is drawn at random follows from the seed, the iteration, the epoch and the batch.
        """
        return {
            "identity": self.identity,
            "iteration": self.iteration,
            "epoch": self.epoch,
            "batch": self.batch,
            "skipped": int(self.ranks.sum([self.skipped])[0]),
            "history": self.history,
            "learners": {learner.name: learner.state() for learner in self.learners},
        }

    def resume(self) -> None:
        """Go on from the checkpoint in the folder, at the next :meth:`train`.

        Raises :class:`TrainingError` where it is damaged, or of a run with other settings.
        """
        state = checkpoint.load(self.file)
        if "identity" not in state:
            raise TrainingError(f"checkpoint: {self.file} is none of a run of fastres train")
        _compare_identities(state["identity"], self.identity, self.file)
        for learner in self.learners:
            learner.load_state(state["learners"][learner.name])
        for name in ("iteration", "epoch", "batch", "skipped", "history"):
            setattr(self, name, state[name])
        if not self.ranks.first:
            self.skipped = 0  # the sum over the ranks is rank 0's


def _name(settings: Settings) -> str:
    return "eager" if settings.backend == "eager" else "fastres"


def _sentence(rows: list[dict]) -> str:
    """An epoch's rows in one line."""
    parts = [
        f"{row['model']}: loss {row['train_loss']:.4f}, test loss {row['test_loss']:.4f}, "
        f"test accuracy {row['test_accuracy']:.4f}"
        + (f", {row['images_per_second']:.0f} images/s" if row["images_per_second"] else "")
        for row in rows
    ]
    skipped = f" ({rows[0]['skipped']} files skipped: no images)" if rows[0]["skipped"] else ""
    return f"epoch {rows[0]['epoch']}: {'; '.join(parts)}{skipped}"


def _identity(data, recipe: Recipe, settings: Settings, ranks: Ranks) -> dict:
    kept = ("seed", "backend", "dtype", "amp", "channels_last", "compile", "compare", "sync_bn")
    values = asdict(recipe) | {name: getattr(settings, name) for name in kept}
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    return values | {
        "processes": ranks.world,
        "class names": list(data[0].classes),
        "training images": len(data[0]),
    }


def _compare_identities(stored: dict, asked: dict, file: Path) -> None:
    differ = [
        f"{key} {stored.get(key)!r} there, {asked.get(key)!r} here"
        for key in dict.fromkeys([*stored, *asked])
        if stored.get(key) != asked.get(key)
    ]
    if differ:
        raise TrainingError(f"checkpoint: {file} is of another run: {'; '.join(differ[:4])}")
