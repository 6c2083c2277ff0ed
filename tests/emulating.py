"""CUDA kernels run on the CPU: compiled by the host's compiler with ``cuda_emulator/emulator.h``.

>>> library = emulating.library("bn_relu")      # tests/cuda_emulator/bn_relu.cpp
>>> emulating.call(library.bn_relu, b"float32", shape, emulating.arrays(x, None, y), ...)
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

_HERE = Path(__file__).parent
_FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-DFASTRES_EMULATOR"]


@functools.cache
def setup() -> object:
    """setup.py as a module, for what it knows of the CUDA toolkit."""
    path = _HERE.parent / "setup.py"
    if not path.is_file():
        pytest.skip("needs the source tree")
    spec = importlib.util.spec_from_file_location("fastres_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc() -> Path:
    found = setup().find_nvcc()
    if found is None:
        pytest.skip("no CUDA toolkit here")
    return found


@functools.cache
def library(name: str) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    headers = setup().toolkit_home(nvcc()) / "include"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.so"
        source = _HERE / "cuda_emulator" / f"{name}.cpp"
        command = [compiler, *_FLAGS, f"-isystem{headers}", f"-I{source.parent}", str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


def dtype_name(tensor: Tensor) -> bytes:
    return str(tensor.dtype).removeprefix("torch.").encode()


def integers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


def arrays(*tensors: Tensor | None):
    """Their addresses; None where there is none. They live as long as the result does."""
    found = (ctypes.c_void_p * len(tensors))(
        *(None if t is None else t.data_ptr() for t in tensors)
    )
    found.tensors = tensors
    return found


def call(function, *arguments) -> None:
    function.restype = ctypes.c_char_p
    error = function(*arguments)
    assert error is None, error.decode()


class Guarded:
    """Tensors whose surroundings must stay as they are: a kernel that writes past an end is seen."""

    _MARGIN = 256  # elements
    _MARK = 77.0

    def __init__(self):
        self._made = []

    def empty_like(self, like: Tensor) -> Tensor:
        """Uninitialised (NaN), dense as ``like`` is, 16-byte aligned as ``like`` is."""
        numel, margin = like.numel(), self._MARGIN
        whole = torch.full((numel + 2 * margin + 8,), self._MARK, dtype=like.dtype)
        start = margin + (like.data_ptr() - whole[margin:].data_ptr()) % 16 // like.element_size()
        inside = whole[start : start + numel].fill_(float("nan"))
        self._made.append((whole, start, numel))
        return inside.as_strided(like.shape, like.stride())

    def check(self) -> None:
        for whole, start, numel in self._made:
            assert (whole[:start] == self._MARK).all(), "written before the beginning"
            assert (whole[start + numel :] == self._MARK).all(), "written past the end"
