"""torchvision's ResNet-18 and -50, converted: inference at batch 1 and 8, SGD steps at batch 8."""

from cases import DTYPES, EVAL_PROVIDERS, OPERATOR_PROVIDERS, Case, maps, short

from fastres import compare
from fastres.compat import import_torchvision

# Users' models and images come in either format; under fastres-cpu they are contiguous.
FORMATS = ("fastres-cpu-channels_last",)


def build(name: str, batch: int):
    model = getattr(import_torchvision().models, name)()
    images = maps(batch, 3, 224, 224)
    compare.calibrate_batch_norm(model, [images[0]])
    return model, images


CASES = [
    Case(
        name=f"{name}-b{batch}-{short(dtype)}-eval",
        build=lambda name=name, batch=batch: build(name, batch),
        providers=("compile", *EVAL_PROVIDERS, *FORMATS, "onnxruntime", "openvino"),
        dtype=dtype,
        model=True,
    )
    for name in ("resnet18", "resnet50")
    for batch in (1, 8)
    for dtype in DTYPES
] + [
    Case(
        name=f"resnet50-b8-{short(dtype)}-train",
        build=lambda: build("resnet50", 8),
        providers=(*OPERATOR_PROVIDERS, *FORMATS),
        dtype=dtype,
        train=True,
        autocast=short(dtype) == "bf16",
        model=True,
    )
    for dtype in DTYPES
]


def bench_model(comparison):
    comparison.run()
