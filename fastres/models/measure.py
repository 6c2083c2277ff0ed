"""What a model costs: output sizes, parameters, multiply-adds, activation memory, time an image."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..memory import kept_bytes
from ..timing import interleave, spread

Shape = tuple[int, ...]


def parameters(model: nn.Module) -> int:
    """The number of parameters (buffers are none)."""
    return sum(parameter.numel() for parameter in model.parameters())


def stage_shapes(model: nn.Module, input_shape: Sequence[int]) -> list[tuple[str, Shape]]:
    """Name and output shape of every stage (``model.stages``, or else its children), in the order
    in which they are called. Nothing is computed."""
    model = _on_meta(model)
    shapes: list[tuple[str, Shape]] = []

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(
            lambda _module, _inputs, output: shapes.append((name, tuple(output.shape)))
        )

    for name in getattr(model, "stages", [name for name, _ in model.named_children()]):
        watch(name, model.get_submodule(name))
    model(torch.empty(tuple(input_shape), device="meta"))
    return shapes


def multiply_adds(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiplications with an addition, of convolutions and linear layers in one call in eval.

    What He et al. 2015 call FLOPs. Nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which takes long

    model = _on_meta(model)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(tuple(input_shape), device="meta"))
    return counter.get_total_flops() // 2


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a training step keeps between forward and backward, parameters and images aside.

    ``model`` is called once in training mode, on a copy, so that its statistics stay. Hooks on saved
    tensors would not do: fastres keeps more where there are any.
    """
    model = copy.deepcopy(model).train()

    def graph() -> list:
        leaves = (leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor))
        # a sum keeps no tensor, but what is behind it: a function written in Python, which may have
        # given the leaf, does not live by its grad_fn alone in PyTorch 2.11
        return [leaf.sum().grad_fn for leaf in leaves]

    with torch.enable_grad():
        return kept_bytes(graph, images.device)


def milliseconds(model: nn.Module, images: Tensor, rounds: int = 5) -> float:
    """Median milliseconds an image in inference, ``images`` being one batch."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(images)
            seconds = interleave({"model": lambda: model(images)}, rounds)["model"]
    finally:
        model.train(was_training)
    return spread(seconds)["median"] * 1000 / len(images)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy in eval without values: shapes and counts are all that it gives."""
    memo = {id(p): _without_values(p) for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).eval()


def _without_values(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
