"""The head of ResNet-18 and -50 in inference: global average pooling and the last layer."""

import torch
from cases import DTYPES, EVAL_PROVIDERS, Case, maps, short
from torch import Tensor, nn

OUTPUTS, SIZE = 1000, 7


class Head(nn.Module):
    """As torchvision's ResNet has it."""

    def __init__(self, channels: int):
        super().__init__()
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(channels, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(x), 1))


CASES = [
    Case(
        name=f"{channels}x{SIZE}x{SIZE}-b{batch}-{short(dtype)}-eval",
        build=lambda c=channels, n=batch: (Head(c), maps(n, c, SIZE, SIZE)),
        providers=EVAL_PROVIDERS,
        dtype=dtype,
        traffic=channels * (batch * SIZE * SIZE + OUTPUTS),
    )
    for channels in (512, 2048)
    for batch in (1, 8)
    for dtype in DTYPES
]


def bench_mean_linear(comparison):
    comparison.run()
