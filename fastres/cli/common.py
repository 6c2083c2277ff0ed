"""What every command shares: its error, its argument types, its tables."""

import argparse
import difflib
from collections.abc import Sequence

MODEL_HELP = "torchvision:NAME, timm:NAME, fastres:NAME or package.module:callable"


class UserError(Exception):
    """Wrong use of the command; printed as one line."""


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of an error about ``name``: those of ``names`` that look like it, if any."""
    near = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; those that hold numbers are aligned to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() or cell == "-" for cell in c[1:]) for c in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def machine(environment: dict) -> str:
    """The processor and threads of :func:`fastres.environment.environment`, in words."""
    capability, threads = environment["cpu_capability"], environment["threads"]
    return f"{environment['cpu']}, {capability}, {threads} thread{'s' * (threads > 1)}"
