"""Several processes, started by torchrun: who is who, and what they must agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import TrainingError


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` ones."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, numbers: list[float]) -> list[float]:
        """Each of ``numbers`` summed over the ranks."""
        if self.world == 1:
            return numbers
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` in DistributedDataParallel, where there is more than one process."""
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        # a block that stochastic depth drops leaves its parameters without a gradient
        drops = any(getattr(module, "survival", 1) < 1 for module in model.modules())
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=drops,
        )

    def share_buffers(self, model: nn.Module) -> None:
        """Rank 0's running statistics for all, as DistributedDataParallel has it in training."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The process group that torchrun's environment describes, nccl on GPUs and gloo elsewhere;
    without torchrun this process alone."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if device == "cuda":
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def synchronised(model: nn.Module, device: str) -> nn.Module:
    """``model`` with SyncBatchNorm for its batch norms, which PyTorch has for GPUs only."""
    if device == "cpu":
        raise TrainingError("sync-bn: PyTorch's SyncBatchNorm works on GPUs only")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
