"""The sections that run other programs: the build, the tests, the search for memory errors."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What pytest -v says of a test, and what compute-sanitizer sums up.
TEST = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def build(emit, budget, device) -> None:
    """Into the environment that runs this, the CUDA part where there is a toolkit."""
    cuda = "1" if _found("nvcc") else "0"
    env = os.environ | {"FASTRES_CUDA": cuda, "MAX_JOBS": str(os.cpu_count() or 2)}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    lines, code = follow([*command, "--no-deps", "-e", str(ROOT)], budget.left, env=env)
    if code:
        emit(case=f"FASTRES_CUDA={cuda}", bad=_last(lines, code))
        sys.exit(1)
    emit(case=f"FASTRES_CUDA={cuda}")


def tests(emit, budget, device) -> None:
    """``pytest -m gpu``: the numbers of each outcome, and every failure by its name."""
    counts: dict[str, int] = {}

    def read(line: str) -> None:
        if found := TEST.match(line):
            name, state = found.groups()
            counts[state.lower()] = counts.get(state.lower(), 0) + 1
            if state in ("FAILED", "ERROR"):
                emit(case=name, bad=state.lower())

    command = [*_pytest(), "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "tests"]
    lines, code = follow(command, budget.left, read)
    bad = {}
    if code is None:
        bad = {"bad": "stopped: out of time"}
    elif not counts:
        bad = {"bad": _last(lines, code)}
    emit(case="all", **counts, **bad)


def sanitizer(emit, budget, device) -> None:
    """Every kernel once, on small shapes, under memcheck and racecheck."""
    tool = _found("compute-sanitizer")
    if tool is None:
        emit(case="compute-sanitizer", note="not found")
        return
    # without a cache every tensor ends where its allocation ends
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = str(Path(__file__).with_name("small.py"))
    checks = ("memcheck", "racecheck")
    for index, check in enumerate(checks):
        command = [tool, "--tool", check, sys.executable, script]
        lines, code = follow(command, budget.left / (len(checks) - index), env=env)
        found = [int(a or b) for line in lines for a, b in ERRORS.findall(line)]
        if code is None:
            emit(case=check, bad="stopped: out of time")
        elif code or not found:
            emit(case=check, bad=_last(lines, code))
        elif any(found):
            emit(case=check, errors=sum(found), bad=f"{sum(found)} errors")
        else:
            emit(case=check, errors=0)


def follow(command: list[str], seconds: float, read=None, env=None) -> tuple[list[str], int | None]:
    """Lines of output as they come, also printed; the exit code, None where it was stopped."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
    )
    stopped = []

    def stop(*_) -> None:
        stopped.append(True)
        process.kill()

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if read:
                read(line)
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        process.kill()
    return lines, None if stopped else code


def _last(lines: list[str], code: int | None) -> str:
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exit code {code}: {said[:200]}"


def _found(tool: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(tool) or shutil.which(tool, path=f"{home}/bin")


def _pytest() -> list[str]:
    """Not python -m pytest, which would put the checkout before an installed fastres."""
    script = Path(sys.executable).with_name("pytest")
    return [str(script)] if script.exists() else [shutil.which("pytest") or "pytest"]
