"""Checkpoints: a file is either whole, or the one before it."""

import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from .errors import TrainingError

FORMAT = 1  # of what a run stores; another one is refused


def write_atomically(file: Path, content: bytes) -> None:
    """``content`` to ``file``, which never holds a part of it: what was there stays till the end.

    Raises :class:`TrainingError` where the disk is full or the folder cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(part, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        kept = f"; what was saved before is kept in {file}" if file.exists() else ""
        raise TrainingError(f"cannot save {file}: {error.strerror}{kept}") from error


def save(file: Path, state: dict) -> None:
    """``state`` (tensors, numbers, text, lists, dicts) to ``file``, as ``torch.save`` stores it."""
    stream = io.BytesIO()
    torch.save({"format": FORMAT} | state, stream)
    write_atomically(file, stream.getvalue())


def load(file: Path) -> dict:
    """What :func:`save` stored, or any other file of tensors; on the CPU.

    Raises :class:`TrainingError` where the file is missing, damaged, or no file of tensors.
    """
    if not file.is_file():
        raise TrainingError(f"checkpoint: no such file: {file}")
    try:
        _check_sums(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except TrainingError:
        raise
    except Exception as error:  # torch.load raises what the unpickler, zipfile or struct raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"checkpoint: {file} is damaged, or no checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise TrainingError(f"checkpoint: {file} holds a {type(state).__name__}, not a state")
    if state.get("format", FORMAT) != FORMAT:
        raise TrainingError(f"checkpoint: {file} is of format {state['format']}, not {FORMAT}")
    return state


def _check_sums(file: Path) -> None:
    """The archive's checksums, which torch.load does not look at."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise TrainingError(f"checkpoint: {file} is damaged: checksum of {damaged}")


def load_weights(model: torch.nn.Module, weights: dict, file: Path) -> None:
    """``weights`` into ``model``, all of them; as they are, or as scripts in use save them: under
    "state_dict", out of DistributedDataParallel, with the last layer called ``linear``.

    Raises :class:`TrainingError` where they are another model's.
    """
    weights = weights.get("state_dict", weights)
    own = model.state_dict()
    renamed = {_own_name(name, own): value for name, value in weights.items()}
    try:
        model.load_state_dict(renamed)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(f"checkpoint: {file} is of another model: {reason}") from error


def _own_name(name: str, own: dict) -> str:
    short = name.removeprefix("module.")
    for candidate in (name, short, short.replace("linear.", "fc.", 1)):
        if candidate in own:
            return candidate
    return name
