"""What one call costs beside its arithmetic: the operators on 64 maps of 7x7, batch 1."""

from cases import (
    OPERATOR_PROVIDERS,
    AddReLU,
    BNReLU,
    Case,
    ConvBNReLU,
    maps,
    on_fastres,
    short,
    variants,
)

CHANNELS, SIZE = 64, 7


def tiny(count: int):
    return maps(1, CHANNELS, SIZE, SIZE, count=count)


OPERATORS = {
    "add_relu": (AddReLU, 2),
    "bn_relu": (lambda: BNReLU(CHANNELS), 1),
    "bn_add_relu": (lambda: BNReLU(CHANNELS), 2),
    "conv_bn_relu": (lambda: ConvBNReLU(CHANNELS, CHANNELS, 3), 1),
}
CASES = [
    Case(
        name=f"{operator}-{CHANNELS}x{SIZE}x{SIZE}-b1-{short(dtype)}-{mode}",
        build=lambda module=module, count=count: (module(), tiny(count)),
        providers=OPERATOR_PROVIDERS,
        fused=on_fastres,
        dtype=dtype,
        train=mode == "train",
        autocast=operator == "conv_bn_relu" and mode == "train" and short(dtype) == "bf16",
    )
    for operator, (module, count) in OPERATORS.items()
    for dtype, mode in variants()
]


def bench_overhead(comparison):
    comparison.run()
