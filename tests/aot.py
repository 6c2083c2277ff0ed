"""Triton kernels compiled ahead of time, on machines without a GPU, and what came out of it.

>>> with aot.recorded() as launches:
...     bn_relu(input, ...)          # meta tensors do: nothing runs
>>> for launch in launches:
...     binary = aot.compile_launch(launch, 90)
...     assert binary.spills == 0 and binary.count("LDG.128")

Arguments are specialised exactly as a launch specialises them: pointers and integers divisible by
16, ones and None as constants. A meta tensor's address is 0, so it counts as aligned.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHITECTURES = (80, 90, 100)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(NamedTuple):
    """``kernel[grid](*arguments, **keywords)``; ``keywords`` also holds num_warps and the like."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    keywords: dict


@dataclass(frozen=True)
class Binary:
    """One kernel for one architecture."""

    registers: int  # a thread
    stack: int  # bytes of local memory a thread
    shared: int  # bytes of shared memory a program
    warps: int
    ptx: str
    sass: tuple[str, ...]  # instructions, without predicates and addresses

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count("LDL") + self.count("STL")

    def count(self, opcode: str) -> int:
        """Instructions whose opcode begins with ``opcode``, or holds all its dotted parts:
        ``count("LDG.128")`` counts LDG.E.128 and LDG.E.EF.128 alike."""
        wanted = opcode.split(".")
        found = 0
        for instruction in self.sass:
            parts = instruction.split()[0].split(".")
            found += parts[0] == wanted[0] and set(wanted) <= set(parts)
        return found


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, in order; none of them runs."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **keywords):
        launches.append(Launch(kernel, grid, arguments, keywords))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, architecture: int) -> Binary:
    return compile_kernel(launch.kernel, architecture, *launch.arguments, **launch.keywords)


def compile_kernel(kernel: JITFunction, architecture: int, *arguments, **keywords) -> Binary:
    """``kernel`` as a launch with these arguments on ``sm_<architecture>`` would compile it.

    Tensors may be on "meta"; ``triton.runtime.jit.MockTensor(dtype)`` stands for one too.
    """
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    usage = _dump(compiled.asm["cubin"], "-res-usage")
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        ptx=compiled.asm["ptx"],
        sass=_instructions(_dump(compiled.asm["cubin"], "-sass")),
    )


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [_TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def _instructions(sass: str) -> tuple[str, ...]:
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", sass)
    return tuple(lines)
