"""torch.compile on the same networks: training as people compile it, inference at its best."""

import contextlib

import torch

import fastres

from . import models


def run(emit, budget, device, net=None, image: int = models.IMAGE, batches=models.BATCHES) -> None:
    """The most telling first: compiling may take all the time there is."""
    net = models.network(device.device) if net is None else net
    eager = {"eager": lambda: fastres.backend("eager")}
    todo = [("train", batches[0], "torch.compile")]
    todo += [("eval", batch, "torch.compile max-autotune, freezing") for batch in batches]
    shares = budget.share(todo)
    for (mode, batch, provider), seconds in shares:
        torch.compiler.reset()
        calls = {provider: eager["eager"]}
        if mode == "train":
            models.train(emit, device, net, batch, image, calls, seconds, torch.compile)
            continue
        with freezing():
            models.evaluate(emit, device, net, batch, image, calls, seconds, autotuned)
    for mode, batch, provider in shares.left_out:
        emit(case=f"ResNet-50 {mode} batch {batch}", provider=provider, bad="no time left")


def autotuned(net):
    """With CUDA graphs of its own."""
    return torch.compile(net, mode="max-autotune")


@contextlib.contextmanager
def freezing():
    from torch._inductor import config

    with config.patch(freezing=True):
        yield
