"""Convolution, batch norm, residual and ReLU in eval: every distinct shape of ResNet-50, batch 8."""

from cases import (
    DTYPES,
    EVAL_PROVIDERS,
    Case,
    ConvBNReLU,
    Convolution,
    convolutions,
    maps,
    on_fastres,
    short,
)

BATCH = 8


def build(conv: Convolution):
    module = ConvBNReLU(conv.cin, conv.cout, conv.kernel, conv.stride, conv.relu)
    inputs = maps(BATCH, conv.cin, conv.size, conv.size)
    if conv.residual:
        inputs += maps(BATCH, conv.cout, conv.size // conv.stride, conv.size // conv.stride)
    return module, inputs


def traffic(conv: Convolution) -> int:
    """Input, weights, residual read and output written once."""
    output = BATCH * conv.cout * (conv.size // conv.stride) ** 2
    weights = conv.cin * conv.cout * conv.kernel**2
    return BATCH * conv.cin * conv.size**2 + weights + output * (1 + conv.residual)


CASES = [
    Case(
        name=f"{conv.name}-b{BATCH}-{short(dtype)}-eval",
        build=lambda conv=conv: build(conv),
        providers=EVAL_PROVIDERS,
        fused=on_fastres,
        dtype=dtype,
        traffic=traffic(conv),
    )
    for conv in convolutions()
    for dtype in DTYPES
]


def bench_conv_bn_relu(comparison):
    comparison.run()
