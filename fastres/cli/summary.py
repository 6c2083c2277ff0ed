"""``fastres summary MODEL``: what fastres fuses in a model, and why not."""

import argparse

import fastres

from .common import MODEL_HELP
from .model import build_model


def add_parser(commands) -> None:
    parser = commands.add_parser("summary", help="what fastres fuses in a model, and why not")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print(fastres.summary(fastres.convert(build_model(options.model))))
    return 0
