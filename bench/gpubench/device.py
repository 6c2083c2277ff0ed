"""The GPU: what it is called, and how long a call takes on it."""

import re
import statistics
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import torch

ROUNDS = (7, 200)


class Times(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Times":
        low, *_, high = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), low, high, len(milliseconds))


class Cuda:
    """Times by CUDA events. The tests put a fake in its place."""

    device = torch.device("cuda")

    @staticmethod
    def missing() -> str:
        """Why there is nothing to measure; "" where there is."""
        if torch.cuda.is_available():
            return ""
        built = torch.version.cuda
        why = f"built for CUDA {built}" if built else "a CPU-only build"
        return (
            f"no CUDA device: torch.cuda.is_available() is False (PyTorch {torch.__version__}, {why})"
        )

    @staticmethod
    def describe() -> dict:
        import triton

        properties = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return {
            "name": properties.name,
            "slug": "-".join(re.findall(r"[a-z0-9]+", properties.name.lower())),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
            "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else "unknown",
        }

    def time(self, call: Callable[[], object], seconds: float = 0.05) -> Times:
        """Of one call, back to back with others, in ``seconds`` or seven rounds."""
        for _ in range(3):
            call()
        once = self._milliseconds(call, 3)
        rounds = min(max(int(seconds * 1e3 / max(statistics.median(once), 1e-3)), ROUNDS[0]), ROUNDS[1])
        return Times.of(self._milliseconds(call, rounds))

    @staticmethod
    def _milliseconds(call, rounds: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(rounds)]
        torch.cuda.synchronize()
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    @staticmethod
    def captured(call: Callable[[], object]) -> Callable[[], None]:
        """A CUDA graph of ``call``: what remains is the GPU's own time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    @staticmethod
    def synchronize() -> None:
        torch.cuda.synchronize()

    @staticmethod
    def empty_cache() -> None:
        torch.cuda.empty_cache()
