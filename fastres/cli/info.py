"""``fastres info``: versions, backends, and how to get what is missing."""

import argparse
import os

import fastres

from .. import ops
from ..backend import ENVIRONMENT_VARIABLE
from ..environment import environment
from .common import machine, table


def add_parser(commands) -> None:
    parser = commands.add_parser("info", help="versions, backends, and how to get what is missing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    found = environment()
    versions = found["versions"] | {"fastres": fastres.__version__}
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    print(f"{machine(found)}, {found['platform']}")
    print(f"extension: {_build()}")
    print(f"{ENVIRONMENT_VARIABLE}: {os.environ.get(ENVIRONMENT_VARIABLE, 'not set (auto)')}\n")
    rows = [
        (name, "yes" if status.available else "no", status.reason)
        for name, status in fastres.backends().items()
    ]
    print(table(("backend", "available", "why not, and how to mend it"), rows))
    return 0


def _build() -> str:
    if ops.extension is None:
        return f"not there ({ops.extension_error})"
    return ", ".join(
        f"{key} {' '.join(value) if isinstance(value, list) else value}"
        for key, value in ops.extension.build_info().items()
    )
