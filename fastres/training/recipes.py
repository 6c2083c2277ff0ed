"""Recipes: everything that decides what a model learns, beside the model and the data."""

from dataclasses import dataclass, field, replace

from .errors import TrainingError

OPTIMIZERS = ("sgd", "adam")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _value(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """How to train. Every value is an option of ``fastres train``.

    The run is ``iterations`` steps long, or ``epochs`` passes over the data where that is 0.
    ``milestones`` are shares of the run, so that a shorter one has the same schedule.

    Raises :class:`TrainingError` for values that cannot be meant.
    """

    optimizer: str = _value("sgd", "sgd or adam")
    lr: float = _value(0.1, "learning rate")
    momentum: float = _value(0.9, "of sgd")
    weight_decay: float = _value(1e-4, "L2 penalty")
    batch: int = _value(128, "images a step, of all processes together")
    epochs: int = _value(0, "passes over the data")
    iterations: int = _value(0, "steps; instead of epochs")
    milestones: tuple[float, ...] = _value((), "shares of the run after which lr falls")
    gamma: float = _value(0.1, "what lr is multiplied by at a milestone")
    warmup: int = _value(0, "steps at a tenth of lr before the rest")
    channels: int = _value(3, "1 grey, 3 colour")
    resize: int = _value(0, "shorter side to resize to; 0: as it is")
    crop: int = _value(0, "side of the crop, at random (area and shape too) in training")
    pad: int = _value(0, "pixels of zeros around an image before it is cropped at random")
    flip: int = _value(0, "1: mirror every second image, at random")
    mean: tuple[float, ...] = _value(CIFAR_MEAN, "of the pixels, a channel")
    std: tuple[float, ...] = _value(CIFAR_STD, "of the pixels, a channel")
    classes: tuple[str, ...] = _value((), "names or numbers of those to learn; none: all")

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise TrainingError(
                f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if self.channels not in (1, 3):
            raise TrainingError(f"channels: expected 1 or 3, got {self.channels}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                count = len(getattr(self, name))
                raise TrainingError(f"{name}: expected {self.channels} values, got {count}")
        if min(self.std) <= 0:
            raise TrainingError(f"std: expected positive values, got {min(self.std)}")
        if self.batch < 1 or bool(self.epochs > 0) == bool(self.iterations > 0):
            raise TrainingError(
                "expected a positive batch and either epochs or iterations, got "
                f"batch {self.batch}, epochs {self.epochs}, iterations {self.iterations}"
            )
        if any(not 0 < share < 1 for share in self.milestones):
            raise TrainingError(
                f"milestones: expected shares of the run between 0 and 1, got {self.milestones}"
            )

    def changed(self, values: dict) -> "Recipe":
        """The recipe with other ``values``; a length in one unit replaces that in the other."""
        if values.get("epochs"):
            values = {"iterations": 0} | values
        elif values.get("iterations"):
            values = {"epochs": 0} | values
        return replace(self, **values)


RECIPES = {
    # He et al. 2015, "Deep Residual Learning", section 4.2: 64k iterations, lr falls at 32k, 48k.
    # Their ResNet-110 is warmed up for 400.
    "cifar": Recipe(iterations=64_000, milestones=(0.5, 0.75), pad=4, flip=1),
    "cifar2": Recipe(
        optimizer="adam", lr=1e-3, weight_decay=0.0, batch=64, epochs=5,
        classes=("airplane", "bird"),
    ),
    "fashion": Recipe(
        lr=0.05, momentum=0.0, weight_decay=0.0, batch=256, epochs=10, channels=1, resize=96,
        mean=(0.2860,), std=(0.3530,),
    ),
    # The same paper, section 3.4, in epochs as is usual since.
    "imagenet": Recipe(
        batch=256, epochs=90, milestones=(1 / 3, 2 / 3), resize=256, crop=224, flip=1,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    ),
}  # fmt: skip
