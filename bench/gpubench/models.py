"""ResNet-50 whole: inference at three batch sizes inside a CUDA graph, and a training step."""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from cases import randomise
from torch import nn

import fastres

from . import providers
from .measured import measure, relative_error

BATCHES = (256, 32, 1)
TRAINING_BATCH = 256
IMAGE = 224
# A whole network amplifies rounding; another function would be off by the order of 1.
SLACK = 2e-2


def network(device: torch.device) -> nn.Module:
    """torchvision's architecture with PyTorch's own modules, random weights."""
    torch.manual_seed(0)
    net = randomise(fastres.models.resnet50()).to(device)
    return net.to(memory_format=torch.channels_last)


def images(batch: int, size: int, device: torch.device) -> torch.Tensor:
    values = torch.randn(batch, 3, size, size, device=device)
    return values.to(memory_format=torch.channels_last)


def contexts() -> dict:
    """Provider to what it is called in."""
    served = {
        f"fastres-{name}": functools.partial(fastres.backend, name)
        for name in providers.served("conv_bn_relu")
    }
    if "fastres-triton" in served:
        everything = functools.partial(providers.triton, classes())
        tuned = functools.partial(providers.triton, classes(), True)
        served["fastres-triton, its convolutions"] = everything
        served["fastres-triton, its convolutions tuned"] = tuned
    return {"eager": functools.partial(fastres.backend, "eager")} | served


def with_sites_apart(calls: dict) -> dict:
    """And each of fastres' providers with the sites of a branch one by one, instead of a chain."""
    apart = {
        f"{provider}, sites apart": functools.partial(_apart, context)
        for provider, context in calls.items()
        if provider.startswith("fastres-")
    }
    return calls | apart


@contextlib.contextmanager
def _apart(context):
    with fastres.chained(False), context():
        yield


def classes() -> set[str]:
    """Of all of ResNet-50's convolutions."""
    from cases import convolutions
    from fastres.kernels.conv_class import class_of

    return {
        class_of((c.cout, c.cin, c.kernel, c.kernel), (c.stride,) * 2, (1, 1), 1)
        for c in convolutions()
    }


def run(emit, budget, device, batches=BATCHES, image: int = IMAGE, net=None) -> None:
    torch.backends.cudnn.benchmark = True
    net = network(device.device) if net is None else net
    things = [("train", TRAINING_BATCH if batches is BATCHES else batches[0])]
    things += [("eval", batch) for batch in batches]
    shares = budget.share(things)
    for (mode, batch), seconds in shares:
        if mode == "eval":
            evaluate(emit, device, net, batch, image, contexts(), seconds)
        else:
            train(emit, device, net, batch, image, with_sites_apart(contexts()), seconds)
        device.empty_cache()
    for mode, batch in shares.left_out:
        emit(case=f"ResNet-50 {mode} batch {batch}", bad="no time left")


def evaluate(emit, device, net, batch: int, image: int, calls: dict, seconds: float, wrap=None):
    """bf16 in a CUDA graph; ``wrap`` compiles, and then the compiler makes the graph."""
    x = images(batch, image, device.device)
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        truth = net(x)
        half = copy.deepcopy(net).bfloat16()
        x = x.bfloat16()
        allowed = 2 * relative_error(half(x), truth) + SLACK
        for provider, context in calls.items():
            forward = wrap(half) if wrap else half
            measure(
                emit, device, torch.no_grad()(providers.under(context, functools.partial(forward, x))),
                truth=truth, allowed=allowed, seconds=min(seconds / len(calls) / 4, 1),
                graph=wrap is None, provider=provider, case=f"ResNet-50 eval batch {batch}",
                images=batch,
            )  # fmt: skip


def train(emit, device, net, batch: int, image: int, calls: dict, seconds: float, wrap=None):
    """One step of SGD under bf16 autocast, launched from Python as people launch it."""
    x, target = images(batch, image, device.device), torch.arange(batch, device=device.device)
    truth = None
    for provider, context in calls.items():
        own = copy.deepcopy(net).train()
        forward = wrap(own) if wrap else own
        optimizer = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=0.9)

        def step(forward=forward, optimizer=optimizer):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = F.cross_entropy(forward(x).float(), target % 10)
            loss.backward()
            optimizer.step()
            return loss.detach().view(1)

        if truth is None:  # the first step's loss; later ones differ by what the steps did
            with fastres.backend("eager"), torch.no_grad():
                truth = F.cross_entropy(copy.deepcopy(own)(x), target % 10).view(1)
        measure(
            emit, device, providers.under(context, step), truth=truth, allowed=SLACK,
            seconds=min(seconds / len(calls) / 4, 2), provider=provider,
            case=f"ResNet-50 training step batch {batch}", images=batch,
        )  # fmt: skip
        del own, forward, optimizer, step
        device.empty_cache()
