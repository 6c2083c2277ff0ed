"""ResNet-50's bottlenecks in training, forward and backward: as chains, and site by site.

Also how much each way keeps for backward.
"""

import copy

import torch
from cases import STAGES, randomise

import fastres

from . import models, providers
from .measured import measure, relative_error

BATCH = 256


def run(emit, budget, device, stages=STAGES, batch: int = BATCH) -> None:
    torch.backends.cudnn.benchmark = True
    shares = budget.share(stages)
    for (planes, size), seconds in shares:
        torch.manual_seed(0)
        block = randomise(fastres.nn.Bottleneck(4 * planes, planes)).to(device.device).train()
        block.to(memory_format=torch.channels_last)
        x = torch.randn(batch, 4 * planes, size, size, device=device.device)
        x = x.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
        _measure_block(emit, device, block, x, seconds)
        del block, x
        device.empty_cache()
    for planes, _ in shares.left_out:
        emit(case=f"Bottleneck {planes}", bad="no time left")


def _measure_block(emit, device, block, x, seconds: float) -> None:
    grad = torch.randn_like(x)
    with fastres.backend("eager"):
        truth = Step(copy.deepcopy(block), x.detach().float().requires_grad_(), grad, False)()
    step = Step(block, x, grad)
    calls = models.with_sites_apart(models.contexts())
    allowed = None
    for provider, context in calls.items():
        call = providers.under(context, step)
        if allowed is None:
            allowed = 2 * relative_error(call(), truth) + models.SLACK
        measure(
            emit, device, call, truth=truth, allowed=allowed, seconds=min(seconds / len(calls) / 2, 1),
            provider=provider, case=f"Bottleneck {x.shape[1] // 4}, batch {x.shape[0]}",
            kept_mb=_kept(providers.under(context, step.forward)) / 1e6,
        )  # fmt: skip


class Step:
    """Forward and backward; gives the gradient of the input."""

    def __init__(self, block, x, grad, autocast: bool = True):
        self.block, self.x, self.grad, self.autocast = block, x, grad, autocast

    def forward(self):
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.block(self.x)

    def __call__(self):
        output = self.forward()
        tensors = (self.x, *self.block.parameters())
        return torch.autograd.grad(output, tensors, self.grad.to(output.dtype))[0]


def _kept(forward) -> int:
    """Bytes of what ``forward`` keeps for its backward, each memory once."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())
