"""Convolutions that the CUDA kernels are tried on by the emulator, and their operands."""

import emulating
import torch
import torch.nn.functional as F

LAST = torch.channels_last
MULTIPROCESSORS = 3  # fewer blocks than tiles: they are persistent

# n, c, h, w, k, r, s, stride, padding, dilation: a ResNet's kinds, and odd ones
SHAPES = {
    "1x1": (2, 64, 9, 8, 128, 1, 1, (1, 1), (0, 0), (1, 1)),
    "1x1, stride 2": (3, 72, 14, 15, 64, 1, 1, (2, 2), (0, 0), (1, 1)),
    "3x3": (2, 64, 14, 14, 64, 3, 3, (1, 1), (1, 1), (1, 1)),
    "3x3, stride 2": (3, 8, 15, 12, 136, 3, 3, (2, 2), (1, 1), (1, 1)),
    "3x3, dilated": (1, 16, 20, 17, 72, 3, 3, (1, 1), (2, 2), (2, 2)),
    "stem": (1, 8, 31, 29, 64, 7, 7, (2, 2), (3, 3), (1, 1)),
    "oblong": (2, 24, 11, 9, 8, 2, 5, (1, 3), (0, 4), (3, 1)),
    "one pixel": (5, 128, 1, 1, 264, 1, 1, (1, 1), (0, 0), (1, 1)),
    "padded only": (1, 8, 2, 2, 64, 1, 1, (1, 1), (3, 3), (1, 1)),
}


def numbers(shape):
    n, c, h, w, k, r, s, *pairs = shape
    return emulating.integers(n, h, w, c, k, r, s, *(value for pair in pairs for value in pair))


def pixels_of(t):
    """(N, C, H, W) as the kernels have it in memory."""
    return None if t is None else t.permute(0, 2, 3, 1).contiguous()


def operands_for(shape, dtype, residual=False):
    n, c, h, w, k, r, s, stride, padding, dilation = shape
    x = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)
    f = torch.randn(k, c, r, s, dtype=torch.float64) / (c * r * s) ** 0.5
    f = f.to(dtype).contiguous(memory_format=LAST)
    if min(x.stride()) != x.stride(1):
        x = x.as_strided(x.shape, (c * h * w, 1, w * c, c))
    raw = F.conv2d(x.double(), f.double(), None, stride, padding, dilation)
    skip = torch.randn(raw.shape, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)
    return x, f, raw, skip if residual else None
