"""The stem and every distinct bottleneck block of ResNet-50, converted, batch 8."""

from cases import EVAL_PROVIDERS, OPERATOR_PROVIDERS, STAGES, Case, maps, randomise, short, variants
from torch import nn

from fastres.compat import import_torchvision

BATCH = 8


def stem():
    model = import_torchvision().models.resnet50()
    layers = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    return randomise(layers), maps(BATCH, 3, 224, 224)


def block(stage: int, index: int):
    """The first block of a stage has a projection shortcut, the others are alike."""
    model = import_torchvision().models.resnet50()
    module = getattr(model, f"layer{stage + 1}")[index]
    size = STAGES[stage][1]
    if index == 0 and stage > 0:
        size *= 2
    return randomise(module), maps(BATCH, module.conv1.in_channels, size, size)


BUILDERS = {"stem": stem} | {
    f"layer{stage + 1}.{index}": lambda stage=stage, index=index: block(stage, index)
    for stage in range(len(STAGES))
    for index in (0, 1)
}
CASES = [
    Case(
        name=f"{name}-b{BATCH}-{short(dtype)}-{mode}",
        build=build,
        providers=OPERATOR_PROVIDERS if mode == "train" else EVAL_PROVIDERS,
        dtype=dtype,
        train=mode == "train",
        autocast=mode == "train" and short(dtype) == "bf16",
    )
    for name, build in BUILDERS.items()
    for dtype, mode in variants()
]


def bench_block(comparison):
    comparison.run()
