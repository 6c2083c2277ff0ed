"""Batch norm and ReLU, with and without a residual, on the maps of ResNet-50, batch 8."""

from cases import (
    OPERATOR_PROVIDERS,
    BNReLU,
    Case,
    block_outputs,
    maps,
    normalised_maps,
    on_fastres,
    short,
    variants,
)

BATCH = 8
# Passes over the map, by (mode, residual). Training: statistics read once, then read and write;
# backward reads input and gradient for the reduction and again to write the gradient. A residual
# adds a read forward, and backward the output (for the mask) twice and a gradient.
PASSES = {("eval", False): 2, ("eval", True): 3, ("train", False): 8, ("train", True): 12}

CASES = [
    Case(
        name=f"{'add-' * residual}{channels}x{size}x{size}-b{BATCH}-{short(dtype)}-{mode}",
        build=lambda c=channels, s=size, r=residual: (
            BNReLU(c),
            maps(BATCH, c, s, s, count=1 + r),
        ),
        providers=OPERATOR_PROVIDERS,
        fused=on_fastres,
        dtype=dtype,
        train=mode == "train",
        traffic=PASSES[mode, residual] * BATCH * channels * size * size,
    )
    for residual, shapes in ((False, normalised_maps()), (True, block_outputs()))
    for channels, size in shapes
    for dtype, mode in variants()
]


def bench_bn_relu(comparison):
    comparison.run()
