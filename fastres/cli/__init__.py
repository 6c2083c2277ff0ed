"""The command ``fastres``: look at, compare, train and evaluate models as fastres serves them.

Exit status: 0 done and agreed, 1 fastres disagrees with eager, 2 wrong use (said in one line),
128 and the signal's number where training was interrupted, or nobody reads the output any more.
"""

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence

import fastres

from ..compare import ProviderError
from . import compare, evaluate, info, lesion, models, summary, table, train
from .common import UserError

COMMANDS = (info, models, summary, compare, table, train, evaluate, lesion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (default: the process's); returns the exit status."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # at its exit Python could only complain
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to write
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (UserError, ProviderError) as error:
        print(f"fastres: error: {error}", file=sys.stderr)
        return 2


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads from any more."""
    pipe = select.poll()
    pipe.register(sys.stdout, 0)  # its errors, which are always told
    return bool(pipe.poll(0))


def _parser() -> argparse.ArgumentParser:
    what, status = __doc__.replace("``", "").strip().split("\n\n")
    parser = argparse.ArgumentParser(prog="fastres", description=what, epilog=status)
    parser.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
