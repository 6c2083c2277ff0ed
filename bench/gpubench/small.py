"""Every fused operator once, forward and backward, on shapes with a tail in every direction: what
compute-sanitizer looks at. ``python bench/gpubench/small.py [device]``"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastres.kernels.conv_choice import class_of

from fastres import functional as FF
from fastres import ops
from gpubench import providers

# channels, size, filters, window, stride, groups. In training PyTorch's own operators serve maps of
# less than 16,384 elements: these have a few more.
CONVOLUTIONS = (
    (3, 53, 17, 7, 2, 1),
    (40, 15, 72, 1, 1, 1),
    (24, 19, 40, 3, 2, 1),
    (24, 19, 24, 3, 1, 6),
    (24, 91, 40, 3, 9, 1),  # beyond the tensor maps of sm_90: the portable kernel
)


def main(device: str = "cuda", dtypes=(torch.bfloat16, torch.float32)) -> None:
    for dtype in dtypes:
        for backend in providers.served("bn_relu"):
            elementwise(backend, device, dtype)
        for backend in providers.served("conv_bn_relu"):
            for shape in CONVOLUTIONS:
                convolution(backend, device, dtype, *shape)
                if backend == "cuda":
                    around_batch_norm(device, dtype, *shape)
    if device == "cuda":
        torch.cuda.synchronize()


def elementwise(backend: str, device: str, dtype: torch.dtype) -> None:
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x, r = (
            torch.randn(3, 37, 11, 15, device=device).to(dtype, memory_format=memory_format)
            for _ in "ab"
        )
        v = torch.rand(37, device=device) + 0.5
        with serving(backend, set()):
            for training in (True, False):
                x.requires_grad_(), r.requires_grad_()
                y = FF.bn_add_relu(x, r, v.clone(), v.clone(), v, v, training=training)
                FF.add_relu(FF.bn_relu(y, v.clone(), v.clone(), v, v, training), r).sum().backward()


def convolution(backend, device, dtype, channels, size, filters, taps, stride, groups) -> None:
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    x = torch.randn(2, channels, size, size + 1, device=device).to(**last).requires_grad_()
    w = torch.randn(filters, channels // groups, taps, taps, device=device).to(**last)
    v = torch.rand(filters, device=device) + 0.5
    window = ((stride,) * 2, (taps // 2,) * 2, (1, 1), groups)
    with serving(backend, {class_of(w.shape, *window[::2], groups)}):
        with torch.no_grad():
            FF.conv_bn_relu(x, w, None, *window, v, v, v, v)
        w.requires_grad_()
        FF.conv_bn_relu(x, w, None, *window, v.clone(), v.clone(), v, v, True).sum().backward()


def around_batch_norm(device, dtype, channels, size, filters, taps, stride, groups) -> None:
    """A convolution with the batch norm and ReLU before it, and the gradient through both."""
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    x, y = (torch.randn(2, channels, size, size + 1, device=device).to(**last) for _ in "ab")
    w = torch.randn(filters, channels // groups, taps, taps, device=device).to(**last)
    window = ([stride] * 2, [taps // 2] * 2, [1, 1], groups)
    dy = torch.nn.functional.conv2d(x, w, None, *window)
    v = torch.rand(channels, device=device) + 0.5
    ops.bn_relu_conv(x, v, v.clone(), v.clone(), v.clone(), 1e-5, w, *window)
    ops.conv_dgrad_bn_relu(dy, y.relu(), w, *window, x, v, v.clone(), v.clone(), [True] * 3)


def serving(backend: str, classes: set[str]):
    import fastres

    return providers.triton(classes) if backend == "triton" else fastres.backend(backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
