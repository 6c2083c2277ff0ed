"""How a run is carried out: what serves it, in which precision, where."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import backend
from .errors import TrainingError

DTYPES = {"float32": torch.float32, "float64": torch.float64}
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """``backend``: as ``FASTRES_BACKEND``, None for what that says; with "eager" the model is not
    converted. ``amp``: None, or the 16-bit type that autocast computes in.

    Raises :class:`TrainingError` for what this machine or PyTorch cannot do.
    """

    seed: int = 0
    backend: str | None = None
    dtype: str = "float32"
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    compare: bool = False
    sync_bn: bool = False
    device: str = "cpu"
    workers: int = 0
    strict: bool = False

    def __post_init__(self):
        try:
            self.serving()
        except (ValueError, RuntimeError) as error:
            raise TrainingError(f"backend: {error}") from error
        if self.device == "cuda" and not torch.cuda.is_available():
            raise TrainingError("device: torch.cuda.is_available() is False")
        if self.amp == "float16" and self.device == "cpu":
            raise TrainingError("amp: float16 needs a GPU; on the CPU it is bfloat16")
        if self.amp and self.dtype == "float64":
            raise TrainingError("amp: the parameters of mixed precision are float32, not float64")
        if self.compare and self.backend == "eager":
            raise TrainingError("compare: eager beside eager shows nothing; name another backend")

    def serving(self) -> AbstractContextManager:
        """The context in which fastres' operators run."""
        return backend(self.backend) if self.backend else nullcontext()

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device, AMP[self.amp])

    def place(self, images: Tensor) -> Tensor:
        """``images`` as the model takes them."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.device, DTYPES[self.dtype], non_blocking=True)
        return images.contiguous(memory_format=layout)
