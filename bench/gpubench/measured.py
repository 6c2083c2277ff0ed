"""One provider's call: verified, timed, and reported, or the reason why it was not."""

from collections.abc import Callable

import torch
from torch import Tensor

# Relative L2 error that is forgiven beside twice eager's: one unit in bf16's last place, halved.
SLACK = 4e-3


def relative_error(found: Tensor, truth: Tensor) -> float:
    truth = truth.float()
    return ((found.float() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def measure(
    emit, device, call: Callable[[], Tensor], *, truth: Tensor | None, allowed: float,
    seconds: float, graph: bool = False, **row,
) -> None:  # fmt: skip
    """Emits ``row`` with ``ms``, or with ``bad`` where the call fails or gives another result."""
    try:
        if truth is not None:
            row["error"] = relative_error(call(), truth)
            if not row["error"] <= allowed:
                emit(**row, bad=f"wrong: relative error {row['error']:.1e} > {allowed:.1e}")
                return
        times = device.time(device.captured(call) if graph else call, seconds)
    except Exception as error:  # noqa: BLE001 - the other providers are measured all the same
        text = str(error).strip().splitlines()
        emit(**row, bad=f"{type(error).__name__}: {text[0][:200] if text else ''}")
        if isinstance(error, torch.AcceleratorError):  # the device is lost for this process
            raise
        device.empty_cache()
        return
    emit(**row, ms=times.median, p20=times.p20, p80=times.p80, rounds=times.rounds)
