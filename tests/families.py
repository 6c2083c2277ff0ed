"""How a family is held to an independent implementation of it."""

import copy
from collections.abc import Callable

import torch
from agreement import assert_close
from torch import Tensor, nn

import fastres


def fill(model: nn.Module) -> nn.Module:
    """Parameters and statistics away from their defaults, such that activations stay finite."""
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("mean", "bias")):
            value.uniform_(-0.2, 0.2)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.0)
    return model


def same_name(name: str) -> str:
    return name


def assert_same_network(
    ours: nn.Module, theirs: nn.Module, images: Tensor, rename: Callable[[str], str] = same_name
) -> None:
    """``ours`` with the state of ``theirs`` (whose keys ``rename`` turns into ours) gives its
    outputs in eval, and its outputs, gradients and statistics in training.

    Training is compared in fp64, where the two may differ by rounding alone and a ReLU does not
    flip; inference in fp64 and, by the error rule, in fp32.
    """
    fill(theirs)
    state = {rename(name): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    exact = _eval(copy.deepcopy(theirs).double(), images.double())
    close(_eval(copy.deepcopy(ours).double(), images.double()), exact, "output in eval")
    # a chain of rounded layers: errors add up differently, not more
    assert_close(_eval(ours, images), _eval(theirs, images), exact, "fp32 in eval", scale=8)
    results = [_train(copy.deepcopy(model).double(), images.double()) for model in (ours, theirs)]
    expected = {rename(name): value for name, value in results[1].items()}
    assert results[0].keys() == expected.keys()
    for name, value in results[0].items():
        close(value, expected[name], f"{name} in training")


def close(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Equal but for fp64's rounding, by the largest value: sums of large terms may be small."""
    scale = max(theirs.abs().max().item(), 1e-3)
    worst = (ours - theirs).abs().max().item() / scale
    assert ours.shape == theirs.shape and worst < 1e-8, f"{name}: relative error {worst}"


def _eval(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def _train(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    output = model.train()(images)
    (
        output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ).sum().backward()
    results = {"output": output.detach(), "images": images.grad}
    results |= {name: p.grad for name, p in model.named_parameters()}
    return results | {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}


def trace(name: str, size: int, channels: int = 3, **options) -> list[tuple[int, int]]:
    """(channels, height) behind each stage of a model, without computing anything."""
    with torch.device("meta"):
        model = fastres.models.create(name, **options)
    shapes = fastres.models.measure.stage_shapes(model, (2, channels, size, size))
    for _, shape in shapes[:-1]:
        assert shape[0] == 2 and shape[2] == shape[3]
    return [shape[1:3] for _, shape in shapes[:-1]] + [shapes[-1][1][1:]]


def count(name: str, **options) -> int:
    with torch.device("meta"):
        return fastres.models.measure.parameters(fastres.models.create(name, **options))
