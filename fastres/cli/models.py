"""``fastres models [PATTERN ...]``: the models of our own, by name."""

import argparse

from ..models import list_models
from .common import UserError, did_you_mean


def add_parser(commands) -> None:
    parser = commands.add_parser("models", help="list the models of fastres' own")
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", default=("*",),
        help="such as 'cifar_*' (default: all); other depths can be created too: cifar_resnet26",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    found = [name for pattern in options.patterns for name in _matching(pattern)]
    print("\n".join(dict.fromkeys(found)))
    return 0


def _matching(pattern: str) -> list[str]:
    names = list_models(pattern)
    if not names:
        raise UserError(
            f"PATTERN: no model is called {pattern!r}{did_you_mean(pattern, list_models())}"
        )
    return names
