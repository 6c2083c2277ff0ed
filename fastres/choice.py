"""Which backend ``auto`` takes on a GPU, as data."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .arguments import compute_dtype, pair
from .kernels.conv_class import class_of

# By compute capability: the fastest backend of "add_relu" and "bn_relu", and of convolutions, with
# all that belongs to their site, in "eval", in "eval, one image" and in "training" (forward and
# backward together), by their classes. What is not here is PyTorch's. Only what was measured on
# such a device belongs here, and nothing has been yet: `make gpu` measures, and writes what to put
# here to bench/results/<device>/choice.py, beside the figures.
FASTEST: dict[tuple[int, int], dict[str, str | dict[str, str]]] = {}


class Convolution(NamedTuple):
    """What the choice for a convolution depends on."""

    name: str  # of its class
    what: str  # it is asked for, as in the table
    measured: bool  # whether in such a format: 16-bit values in channels_last

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, stride, dilation, groups: int, training) -> Self:
        window = pair("stride", stride), pair("dilation", dilation)
        half = compute_dtype(input) in (torch.bfloat16, torch.float16)
        last = torch.channels_last in map(suggest_memory_format, (input, weight))
        one = "eval, one image" if input.shape[0] == 1 else "eval"
        name = class_of(weight.shape, *window, groups)
        return cls(name, "training" if training else one, half and last)


def fastest(
    operator: str, device: torch.device, convolution: Callable[[], Convolution] | None = None
) -> str | None:
    """The backend to take on a GPU; None where that is PyTorch. ``convolution`` tells of that which
    "conv_bn_relu" is asked for."""
    if not FASTEST:
        return None
    measured = FASTEST.get(torch.cuda.get_device_capability(device), {})
    if convolution is None:
        return measured.get(operator)
    name, what, is_measured = convolution()
    return measured.get(what, {}).get(name) if is_measured else None
