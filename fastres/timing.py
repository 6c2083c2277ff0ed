"""Timing calls beside each other, so that a machine that slows down slows them all."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# glibc's parameters of mallopt(3), and the largest threshold it takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST = -1, -3, 32 << 20


def keep_freed_memory() -> None:
    """Let this process keep the memory that calls free, where glibc allocates.

    By default large blocks go back to the system, and who gets new ones has them filled with zeros,
    a page at a time: at batch 8 a tenth of a ResNet's time, paid by whichever call comes after one
    that freed more. With the memory kept, calls cost what they cost a process that makes only them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library has no such thing
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; a round makes every call once, in the mapping's order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(seconds_of(call))
    finally:
        if collecting:
            gc.enable()
    return seconds


def fastest(calls: Mapping[str, Callable[[], Any]], rounds: int = 3) -> str:
    """The name of the call with the smallest time in a short trial (after one call each)."""
    if len(calls) == 1:
        return next(iter(calls))
    trial = interleave(calls, rounds + 1)
    return min(trial, key=lambda name: min(trial[name][1:]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}


def ratios(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Spread of ``base / other`` within each round: how many times faster ``other`` is."""
    return spread([b / o for b, o in zip(base, other, strict=True)])
