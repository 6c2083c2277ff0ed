"""Every fused operator once, forward and backward, on shapes with a tail in every direction: what
compute-sanitizer looks at. ``python bench/gpubench/small.py [device]``"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastres.kernels.conv_class import class_of

from fastres import functional as FF
from fastres.chain import Convolution, Norm, chain
from gpubench import providers

# channels, size, filters, window, stride, groups. In training PyTorch's own operators serve maps of
# less than 16,384 elements: these have a few more.
CONVOLUTIONS = (
    (3, 53, 17, 7, 2, 1),
    (40, 15, 72, 1, 1, 1),
    (24, 19, 40, 3, 2, 1),
    (24, 19, 24, 3, 1, 6),
    (24, 91, 40, 3, 9, 1),  # beyond the tensor maps of sm_90: the portable kernel
    (264, 9, 72, 3, 1, 1),  # few pixels, a long depth: it is split
)


def main(device: str = "cuda", dtypes=(torch.bfloat16, torch.float32)) -> None:
    for dtype in dtypes:
        for backend in providers.served("bn_relu"):
            elementwise(backend, device, dtype)
        for backend in providers.served("conv_bn_relu"):
            for shape in CONVOLUTIONS:
                convolution(backend, device, dtype, *shape)
                chain_of_two(backend, device, dtype, *shape)
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


def chain_of_two(backend, device, dtype, channels, size, filters, taps, stride, groups) -> None:
    """Batch norm and ReLU, and two convolutions with the same between them, as one in training."""
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    x = torch.randn(2, channels, size, size + 1, device=device).to(**last).requires_grad_()
    window = ((stride,) * 2, (taps // 2,) * 2, (1, 1), groups)
    convolutions, norms, classes = [], [], set()
    for width, out, geometry in (
        (channels, channels, ((1, 1), *window[1:])), (channels, filters, window),
    ):  # fmt: skip
        w = torch.randn(out, width // groups, taps, taps, device=device).to(**last)
        classes.add(class_of(w.shape, *geometry[::2], groups))
        convolutions.append(Convolution(w.requires_grad_(), None, geometry))
        v = torch.rand(4, width, device=device) + 0.5
        norms.append(Norm(*v[:2], *(vector.requires_grad_() for vector in v[2:]), 0.1, 1e-5))
    with serving(backend, classes):
        chain(x, None, convolutions, [*norms, None], False, backend).sum().backward()


def serving(backend: str, classes: set[str]):
    import fastres

    return providers.triton(classes) if backend == "triton" else fastres.backend(backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
