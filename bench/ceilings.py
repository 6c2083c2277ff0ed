"""What this machine can do at most, measured through PyTorch in the same run as the benchmarks."""

import torch
import torch.nn.functional as F

from fastres.timing import interleave

SIDE = 1024  # of the square matrices
COPIED = 2**26  # float32 elements: beyond every cache
BATCH, CHANNELS, MAP = 8, 256, 28  # of the 3x3 convolution


def measure(rounds: int = 7) -> dict[str, float]:
    """The best of ``rounds``: ``fp32_gflops`` and ``bf16_gflops`` of a large matrix product or a
    large 3x3 convolution, whichever library is better tuned here; ``copy_gbs``, read and written.
    """
    matrix = torch.randn(SIDE, SIDE)
    images = torch.randn(BATCH, CHANNELS, MAP, MAP).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3).contiguous(memory_format=torch.channels_last)
    source = torch.zeros(COPIED)
    target = torch.empty_like(source)
    calls, work = {"copy": lambda: target.copy_(source)}, {"copy": 8 * COPIED}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, x, w = matrix.to(dtype), images.to(dtype), weight.to(dtype)
        calls[f"{name} product"] = lambda a=a: a @ a
        work[f"{name} product"] = 2 * SIDE**3
        calls[f"{name} convolution"] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
        work[f"{name} convolution"] = 2 * BATCH * MAP**2 * CHANNELS**2 * 9
    seconds = interleave(calls, rounds)
    best = {name: work[name] / min(times) / 1e9 for name, times in seconds.items()}
    return {
        "fp32_gflops": max(best["fp32 product"], best["fp32 convolution"]),
        "bf16_gflops": max(best["bf16 product"], best["bf16 convolution"]),
        "copy_gbs": best["copy"],
    }
