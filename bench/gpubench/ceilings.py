"""What the device does at most: copying, and multiplying matrices in bf16."""

import torch

COPIED = 2**30  # bytes, far beyond any cache
SIDE = 8192


def run(emit, budget, device, copied: int = COPIED, side: int = SIDE) -> None:
    source = torch.zeros(copied, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    times = device.time(lambda: target.copy_(source), budget.left / 8)
    emit(case="copy", ms=times.median, gbs=2 * copied / times.median / 1e6)
    # random values: zeros draw less power, and so run at a higher clock
    a, b = (torch.randn(side, side, device=device.device, dtype=torch.bfloat16) for _ in "ab")
    product = torch.empty_like(a)
    times = device.time(lambda: torch.mm(a, b, out=product), budget.left / 8)
    emit(case="matrix", ms=times.median, tflops=2 * side**3 / times.median / 1e9)
