"""The stem of ResNet-18 and -50 in inference, with its max-pool."""

from cases import DTYPES, EVAL_PROVIDERS, Case, maps, randomise, short
from torch import Tensor, nn

SIZE, FILTERS = 224, 64


class Stem(nn.Module):
    """As torchvision's ResNet has it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, FILTERS, 7, 2, 3, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(FILTERS), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))


CASES = [
    Case(
        name=f"3to{FILTERS}-7x7s2-{SIZE}px-pool-b{batch}-{short(dtype)}-eval",
        build=lambda n=batch: (randomise(Stem()), maps(n, 3, SIZE, SIZE)),
        providers=EVAL_PROVIDERS,
        dtype=dtype,
        traffic=batch * (3 * SIZE**2 + FILTERS * (SIZE // 4) ** 2),
    )
    for batch in (1, 8)
    for dtype in DTYPES
]


def bench_conv_bn_relu_pool(comparison):
    comparison.run()
