"""Who serves a call: eager PyTorch, the vendor's fused calls, fastres by Triton and by CUDA."""

import contextlib
import os

from fastres.kernels import configs, conv_choice

import fastres
from fastres import ops


@contextlib.contextmanager
def triton(classes: set[str] | None = None, tuned: bool = False):
    """By Triton's kernels, those of convolutions too for the ``classes`` of shape."""
    architecture = configs.architecture(_device())
    everywhere = dict.fromkeys(conv_choice.PASSES, frozenset(classes or ()))
    table = {(architecture, precision): everywhere for precision in ("half", "tf32", "ieee")}
    before = os.environ.get("FASTRES_AUTOTUNE")
    os.environ["FASTRES_AUTOTUNE"] = str(int(tuned))
    try:
        with fastres.backend("triton"), conv_choice.serving(table):
            yield
    finally:
        os.environ.pop("FASTRES_AUTOTUNE")
        if before is not None:
            os.environ["FASTRES_AUTOTUNE"] = before


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def under(context, call):
    """``call`` inside ``context()``, at every call."""

    def inside():
        with context():
            return call()

    return inside


def served(operator: str) -> list[str]:
    """Those of fastres' GPU backends that have a kernel for it here: an operator without one would
    be PyTorch's own maths."""
    available = fastres.backends()
    names = ["triton"] if available["triton"] else []
    return [*names, "cuda"] if available["cuda"] and ops.has_kernel(operator, "cuda") else names
