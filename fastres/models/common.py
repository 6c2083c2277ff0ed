"""What the families share: stems, initialisation, depths, errors about choices."""

from collections.abc import Collection

from torch import nn

from ..nn import BasicBlock, Bottleneck

STEMS = ("imagenet", "cifar")


def check_choice(argument: str, value, choices: Collection) -> None:
    """Raise ``ValueError`` where ``value`` is none of ``choices``."""
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise ValueError(f"{argument}: expected one of {expected}, got {value!r}")


def stem_convolution(stem: str, in_channels: int, planes: int) -> nn.Conv2d:
    """7x7 at stride 2 for ImageNet, 3x3 at stride 1 for CIFAR."""
    check_choice("stem", stem, STEMS)
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    return nn.Conv2d(in_channels, planes, kernel, stride, kernel // 2, bias=False)


def stem_pooling(stem: str) -> nn.Module | None:
    """3x3 at stride 2 for ImageNet, none for CIFAR."""
    check_choice("stem", stem, STEMS)
    return nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None


def initialise(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers"; with ``zero_init_residual`` every v1 block
    starts as the identity (Goyal et al. 2017, section 5.1)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)


def blocks_of_depth(depth: int, layers_a_block: int, stages: int = 3, others: int = 2) -> int:
    """Blocks a stage for ``depth`` counted layers: ``others`` beside ``stages`` equal stages.

    Raises ``ValueError`` for a depth that does not fit, with the nearest that do.
    """
    step = layers_a_block * stages
    blocks, rest = divmod(depth - others, step) if isinstance(depth, int) else (0, 1)
    if rest or blocks < 1:
        near = [n for n in (blocks * step + others, (blocks + 1) * step + others) if n > others]
        raise ValueError(
            f"depth: expected {step}n+{others} (such as {', '.join(map(str, near))}), got {depth!r}"
        )
    return blocks
