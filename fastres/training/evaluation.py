"""Accuracy and loss of a model on labelled images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import ALONE, Ranks
from .errors import TrainingError
from .loading import Batch
from .settings import Settings


@dataclass
class Score:
    """Mean loss and share of right answers over ``images``; ``skipped`` files were no images."""

    loss: float
    accuracy: float
    images: int
    skipped: int


def evaluate(
    model: nn.Module, batches: Iterable[Batch], settings: Settings, classes: int,
    ranks: Ranks = ALONE, stop: Callable[[], bool] = lambda: False,
) -> Score | None:  # fmt: skip
    """The score of ``model`` in eval mode, over the batches of all ranks together; None where
    ``stop()`` became true on any of them.

    Raises :class:`TrainingError` where the model has not as many outputs as there are ``classes``,
    or no image could be decoded.
    """
    ranks.share_buffers(model)
    model.eval()
    loss, correct, images, skipped, stopped = 0.0, 0, 0, 0, False
    for batch in batches:
        stopped = stop()
        if stopped:
            break
        batch.check(settings.strict)
        skipped += len(batch.skipped)
        if not len(batch):
            continue
        labels = batch.labels.to(settings.device)
        scores = predict(model, settings.place(batch.images), settings, classes)
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        correct += int((scores.argmax(1) == labels).sum())
        images += len(labels)
    numbers = ranks.sum([loss, correct, images, skipped, float(stopped)])
    loss, correct, images, skipped = numbers[0], *map(int, numbers[1:4])
    if numbers[4]:
        return None
    if not images:
        raise TrainingError(f"data: none of the {skipped} test images can be decoded")
    return Score(loss / images, correct / images, images, skipped)


def predict(model: nn.Module, images: Tensor, settings: Settings, classes: int) -> Tensor:
    """Scores (N, classes) in float32 or float64, of a model that is in eval mode."""
    with torch.no_grad(), settings.serving(), settings.autocast():
        try:
            scores = model(images)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(
                f"model: it does not run on images of {tuple(images.shape)}: {reason}"
            ) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] != classes:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TrainingError(
            f"model: expected (N, {classes}) scores for the {classes} classes of the data, "
            f"got {shape}"
        )
    return scores if scores.dtype == torch.float64 else scores.float()
