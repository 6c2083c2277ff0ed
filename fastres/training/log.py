"""What a run leaves behind beside its checkpoint: CSV, curves, TensorBoard's events.

``metrics.csv`` has a row for every epoch and model, ``steps.csv`` the loss of every step.
"""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .checkpoint import write_atomically
from .errors import TrainingError

COLUMNS = (
    "epoch", "model", "iteration", "lr", "train_loss", "train_accuracy", "test_loss",
    "test_accuracy", "images_per_second", "peak_bytes", "skipped",
)  # fmt: skip


class Log:
    """Writes into ``folder``, which may hold the first ``iteration`` steps of the same run."""

    def __init__(self, folder: Path, names: Sequence[str], iteration: int):
        self.folder, self.names = folder, names
        self.waiting: list[tuple[int, list[Tensor]]] = []
        self.steps = folder / "steps.csv"
        rows = _rows_up_to(self.steps, iteration) if iteration else []
        write_atomically(self.steps, _csv(("iteration", *names), rows))
        self.events = _summary_writer(folder / "tensorboard", iteration)

    def step(self, iteration: int, losses: list[Tensor]) -> None:
        """Note the losses of a step; they are written by :meth:`flush`."""
        self.waiting.append((iteration, losses))

    def flush(self) -> None:
        """Write the losses noted, for which a GPU is waited for.

        Raises :class:`TrainingError` where one is not finite.
        """
        rows = [
            (iteration, *(loss.item() for loss in losses)) for iteration, losses in self.waiting
        ]
        self.waiting.clear()
        with _disk(self.steps), open(self.steps, "ab") as stream:
            stream.write(_csv(None, rows))
        for iteration, *losses in rows:
            for name, loss in zip(self.names, losses, strict=True):
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss of {name} is {loss} at iteration {iteration}: try a lower lr"
                    )
                if self.events:
                    self.events.add_scalar(f"loss/{name}", loss, iteration)

    def epoch(self, history: Sequence[dict]) -> None:
        """Write the metrics of every epoch so far, and draw them."""
        from .plots import draw_curves

        rows = [[row[column] for column in COLUMNS] for row in history]
        write_atomically(self.folder / "metrics.csv", _csv(COLUMNS, rows))
        write_atomically(self.folder / "curves.png", draw_curves(history))
        if self.events:
            for row in history[-len(self.names) :]:
                for column in ("test_loss", "test_accuracy", "train_accuracy", "lr"):
                    self.events.add_scalar(
                        f"{column}/{row['model']}", row[column], row["iteration"]
                    )
            self.events.flush()

    def close(self) -> None:
        if self.events:
            self.events.close()


class _disk:
    """Context that makes a full disk an error of one line."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError):
            raise TrainingError(f"cannot write {self.file}: {error.strerror}") from error


def _csv(header: Sequence[str] | None, rows: Sequence[Sequence]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _rows_up_to(file: Path, iteration: int) -> list[list[str]]:
    """What an interrupted run has written after its checkpoint is trained, and written, again."""
    if not file.is_file():
        return []
    with open(file, newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    return [row for row in rows if row and row[0].isdecimal() and int(row[0]) <= iteration]


def _summary_writer(folder: Path, iteration: int):
    """TensorBoard's writer, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TensorBoard's own imports
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=iteration or None)
