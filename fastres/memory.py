"""The memory that a call takes, and what it leaves allocated."""

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that ``call`` has allocated at any time, beyond what was there before it.

    On a GPU PyTorch's allocator says so. On the CPU the profiler lists every allocation through it;
    what a library allocates for itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(_held_over_time(call), default=0)


def kept_bytes(call: Callable[[], object], device: torch.device) -> int:
    """What the result of ``call`` keeps allocated: counted as in :func:`peak_bytes`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        kept = call()
        after = torch.cuda.memory_allocated(device)
        del kept  # until here it was alive
        return after - before
    return [0, *_held_over_time(call)][-1]


def _held_over_time(call: Callable[[], object]) -> list[int]:
    """Bytes on the CPU after each allocation and release in ``call``, whose result stays alive."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints its stages otherwise
    # all events of a single cycle: without a word PyTorch 2.11 warns that it keeps no more
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        kept = call()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(accumulate(event.nbytes() for event in events))
