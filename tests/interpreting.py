"""Triton's kernels run by Triton's interpreter, on CPU tensors, in a process that also compiles them.

The interpreter truncates fp32 to bf16 where a GPU rounds, and compares bf16 by its bits: kernels
compare in fp32, and bf16 results are held to the error rule here, to equal bits only on a GPU.
"""

import contextlib
import dataclasses
import importlib
import sys
from types import SimpleNamespace

import pytest

from fastres import launches

_PACKAGE = "fastres.kernels"


@contextlib.contextmanager
def interpreted():
    """Inside, ``fastres.kernels`` is imported anew for the interpreter, and the backend "triton"
    serves CPU tensors."""
    triton = pytest.importorskip("triton")
    compiled = _forget_kernels()
    launches.launcher.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            _interpret_library(triton, patch)
            _patch_once_a_launch(triton, patch)
            _skip_overflow_checks(patch)
            patch.setattr(launches, "INTERPRETS", True)
            yield
    finally:
        _forget_kernels()
        launches.launcher.cache_clear()
        for name, module in compiled.items():
            sys.modules[name] = module
            setattr(sys.modules[_PACKAGE], name.rpartition(".")[2], module)


def launchers() -> SimpleNamespace:
    """Of the convolutions' kernels, and what they take: interpreted ones inside ``interpreted``."""
    found = {
        "conv_fprop": ("fprop",),
        "conv_dgrad": ("dgrad", "Behind"),
        "conv_wgrad": ("wgrad",),
        "conv_operands": ("Affine", "Norm"),
    }
    return SimpleNamespace(
        **{
            name: getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
            for module, names in found.items()
            for name in names
        }
    )


def _forget_kernels() -> dict:
    names = [name for name in sys.modules if name.startswith(f"{_PACKAGE}.")]
    for name in names:
        delattr(sys.modules[_PACKAGE], name.rpartition(".")[2])
    return {name: sys.modules.pop(name) for name in names}


def _interpret_library(triton, patch) -> None:
    """``tl.sum`` and its like are kernels too, compiled ones where Triton was imported as usual."""
    language, standard = triton.language, triton.language.standard
    for name, function in list(vars(standard).items()):
        if isinstance(function, triton.runtime.jit.JITFunction):
            replacement = triton.jit(function.fn)
            patch.setattr(standard, name, replacement)
            if getattr(language, name, None) is function:
                patch.setattr(language, name, replacement)


def _patch_once_a_launch(triton, patch) -> None:
    """The interpreter patches the language for a launch, and again, never to be undone before the
    launch ends, for every call of a device function: a launch of n calls takes time n squared."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_language = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": triton.language, "core": triton.language.core})
    patch.setattr(interpreter, "_patch_lang", lambda function: patch_language(everything))
    patch.setattr(
        interpreter.InterpretedFunction,
        "__call__",
        lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs),
    )


def _skip_overflow_checks(patch) -> None:
    """Of integers, in twice the time of everything else; the sizes here are far from any."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch.setattr(builder, "options", options)
