"""A model that is being trained, with its optimizer and its schedule."""

import random
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from ..convert import convert
from ..memory import peak_bytes
from .distributed import Ranks, synchronised
from .recipes import Recipe
from .seeds import derive
from .settings import DTYPES, Settings


class Learner:
    """``model`` with what trains it; ``name`` is "fastres" or "eager", which stays unconverted."""

    def __init__(
        self, name: str, model: nn.Module, recipe: Recipe, iterations: int,
        settings: Settings, ranks: Ranks,
    ):  # fmt: skip
        self.name, self.recipe, self.ranks = name, recipe, ranks
        self.settings = replace(settings, backend="eager", compare=False)
        if name != "eager":
            self.settings, model = settings, convert(model)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = model.to(settings.device, DTYPES[settings.dtype]).to(memory_format=layout)
        self.model = synchronised(model, settings.device) if settings.sync_bn else model
        forward = ranks.wrap(self.model)
        self.forward = torch.compile(forward) if settings.compile else forward
        self.optimizer = _optimizer(self.model, recipe)
        self.schedule = _schedule(self.optimizer, recipe, iterations)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.amp == "float16")
        self.totals = Totals(settings.device)
        self.peak: int | None = None

    def step(self, images: Tensor, labels: Tensor, number: int) -> Tensor:
        """Learn from a batch, as step ``number`` of the run; returns the loss, detached.

        What the model draws at random depends on the seed, the step and the rank alone: the same
        for the two models of a comparison, and after an interruption.
        """
        seed = derive(self.settings.seed, -1, number, self.ranks.rank)
        torch.manual_seed(seed)
        random.seed(seed)
        self.model.train()
        self.optimizer.zero_grad()
        with self.settings.serving():
            with self.settings.autocast():
                scores = self.forward(images)
            loss = F.cross_entropy(_wide(scores), labels)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.totals.add(loss, scores, labels)
        return loss.detach()

    def timed_step(self, images: Tensor, labels: Tensor, number: int) -> Tensor:
        """:meth:`step`, with its seconds in the totals."""
        self._wait()
        begin = time.perf_counter()
        loss = self.step(images, labels, number)
        self._wait()
        self.totals.seconds += time.perf_counter() - begin
        self.totals.timed += len(labels)
        return loss

    def measured_step(self, images: Tensor, labels: Tensor, number: int) -> Tensor:
        """:meth:`step`, with its peak memory in ``peak``: activations, gradients and whatever
        else it allocates, but not parameters and the optimizer's state."""
        losses = []
        self.optimizer.zero_grad()
        self.peak = peak_bytes(
            lambda: losses.append(self.step(images, labels, number)), images.device
        )
        return losses[0]

    def _wait(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state(self) -> dict:
        """What :meth:`load_state` goes on from; every rank has to call it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "totals": {
                "sums": self.ranks.sum(self.totals.sums.tolist()),
                "seconds": self.totals.seconds,
                "timed": self.totals.timed,
            },
            "peak": self.peak,
        }

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.totals.load_state(state["totals"], self.ranks.first)
        self.peak = state["peak"]


class Totals:
    """Sums since the epoch began: on the device, so that it need not be waited for."""

    def __init__(self, device: str):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
        self.seconds, self.timed = 0.0, 0

    def add(self, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        count = len(labels)
        with torch.no_grad():
            correct = (scores.argmax(1) == labels).sum()
            self.sums += torch.stack(
                [loss.double() * count, correct.double(), loss.new_tensor(count).double()]
            )

    def mean_loss(self) -> float:
        return (self.sums[0] / self.sums[2]).item()

    def reset(self) -> None:
        self.sums.zero_()
        self.seconds, self.timed = 0.0, 0

    def load_state(self, state: dict, first: bool) -> None:
        """The sums are those of all ranks, and go on in the first."""
        if first:
            self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.seconds, self.timed = state["seconds"], state["timed"]


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, iterations: int):
    """Stepped once an iteration."""
    milestones = [round(share * iterations) for share in recipe.milestones]
    parts = [lr_scheduler.MultiStepLR(optimizer, milestones, recipe.gamma)]
    if recipe.warmup:
        parts.append(lr_scheduler.ConstantLR(optimizer, 0.1, recipe.warmup))
    return lr_scheduler.ChainedScheduler(parts)
