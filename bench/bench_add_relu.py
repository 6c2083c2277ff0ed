"""``relu(input + residual)`` on the block outputs of ResNet-50, batch 8."""

from cases import (
    OPERATOR_PROVIDERS,
    AddReLU,
    Case,
    block_outputs,
    maps,
    on_fastres,
    short,
    variants,
)

BATCH = 8
# forward: two reads, one write; backward: output and gradient read, one gradient written for both
PASSES = {"eval": 3, "train": 6}

CASES = [
    Case(
        name=f"{channels}x{size}x{size}-b{BATCH}-{short(dtype)}-{mode}",
        build=lambda c=channels, s=size: (AddReLU(), maps(BATCH, c, s, s, count=2)),
        providers=OPERATOR_PROVIDERS,
        fused=on_fastres,
        dtype=dtype,
        train=mode == "train",
        traffic=PASSES[mode] * BATCH * channels * size * size,
    )
    for channels, size in block_outputs()
    for dtype, mode in variants()
]


def bench_add_relu(comparison):
    comparison.run()
