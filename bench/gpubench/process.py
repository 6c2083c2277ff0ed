"""A section in a process of its own: started, stopped in time, its results read line by line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .schedule import Outcome, Section

GRACE = 3  # seconds: a section ends by itself that long before it would be stopped


class Emitter:
    """Writes a result a line, at once: a process that is stopped has written all it found."""

    def __init__(self, path: Path):
        self._file = path.open("w")

    def __call__(self, **row) -> None:
        print(json.dumps(row), file=self._file, flush=True)

    def __enter__(self) -> "Emitter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


class Starter:
    """Runs a section as ``python script --child <name>``; ``folder`` gets its output."""

    def __init__(self, script: Path, folder: Path):
        self.script, self.folder = script, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, section: Section, limit: float) -> Outcome:
        rows, log = (self.folder / f"{section.name}.{kind}" for kind in ("jsonl", "log"))
        rows.unlink(missing_ok=True)
        command = [
            sys.executable, str(self.script), "--child", section.name, "--rows", str(rows),
            "--seconds", str(max(limit - GRACE, limit / 2)),
        ]  # fmt: skip
        begin = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            state = self._wait(process, limit)
        return Outcome(
            section.name, state, time.monotonic() - begin, read(rows), log.read_text()[-2000:]
        )

    @staticmethod
    def _wait(process: subprocess.Popen, limit: float) -> str:
        try:
            return "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:  # whatever it started goes with it
            for how in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None or how == signal.SIGTERM:
                    _signal_group(process.pid, how)
                    _reap(process)


def _signal_group(group: int, how: int) -> None:
    try:
        os.killpg(group, how)
    except ProcessLookupError:
        pass


def _reap(process: subprocess.Popen) -> None:
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        pass


def read(rows: Path) -> list[dict]:
    """Whole lines only: the last one may have been cut off."""
    if not rows.exists():
        return []
    return [json.loads(line) for line in rows.read_text().splitlines(True) if line.endswith("\n")]
