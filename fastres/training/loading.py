"""From pictures to batches. What is drawn at random for an image depends on the seed, the epoch
and the image alone: however many workers or processes read them, and wherever a run goes on."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from .data import Images, UndecodableError, need_torchvision
from .distributed import Ranks
from .errors import TrainingError
from .recipes import Recipe
from .seeds import derive

MODES = {1: "L", 3: "RGB"}


def transform(recipe: Recipe, train: bool):
    """torchvision's transforms, from a pillow image to a (C, H, W) float32 tensor."""
    need_torchvision()
    from torchvision import transforms as T

    steps = []
    if recipe.crop and train:
        steps.append(T.RandomResizedCrop(recipe.crop))
    else:
        steps += [T.Resize(recipe.resize)] if recipe.resize else []
        steps += [T.CenterCrop(recipe.crop)] if recipe.crop else []
    if train:
        steps += [_PadAndCrop(recipe.pad)] if recipe.pad else []
        steps += [T.RandomHorizontalFlip()] if recipe.flip else []
    return T.Compose([*steps, T.ToTensor(), T.Normalize(recipe.mean, recipe.std)])


class _PadAndCrop:
    """Zeros around the image, then a crop of the image's own size somewhere in it."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, picture):
        from torchvision import transforms as T

        size = picture.size[::-1]
        return T.RandomCrop(size, padding=self.pad)(picture)


class Prepared(Dataset):
    """``prepared[epoch, index]`` is (image, label), or the path of a file that is no image."""

    def __init__(self, images: Images, recipe: Recipe, train: bool, seed: int):
        self.images, self.seed = images, seed
        self.transform, self.mode = transform(recipe, train), MODES[recipe.channels]

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = place
        try:
            picture, label = self.images[index]
        except UndecodableError as error:
            return str(error)
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(derive(self.seed, epoch, index))
        try:
            return self.transform(picture.convert(self.mode)), label
        finally:
            torch.default_generator.set_state(before)


class Batch:
    """Images (N, C, H, W), labels (N,), and the files that were left out.

    Made in a worker, where an error would lose its message: :meth:`check` raises it.
    """

    def __init__(self, samples: list):
        good = [sample for sample in samples if not isinstance(sample, str)]
        self.skipped = [sample for sample in samples if isinstance(sample, str)]
        self.shapes = sorted({tuple(image.shape) for image, _ in good})
        alike = len(self.shapes) == 1
        self.images = torch.stack([image for image, _ in good]) if alike else torch.empty(0)
        self.labels = torch.tensor([label for _, label in good], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, strict: bool) -> None:
        """Raise :class:`TrainingError` for images of several sizes, and, where ``strict``, for a
        file that is no image."""
        if strict and self.skipped:
            raise TrainingError(f"data: {self.skipped[0]} cannot be decoded as an image")
        if len(self.shapes) > 1:
            raise TrainingError(
                f"data: images of {self.shapes[0]} and {self.shapes[1]} are in one batch; make "
                "them one size with resize and crop"
            )

    def pin_memory(self) -> "Batch":
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


class ShuffledBatches(Sampler):
    """Places (epoch, index) of this rank's batches, from batch ``start`` of ``epoch`` on.

    A last batch of one image is left out: batch norm has no variance to learn from there.
    """

    def __init__(self, count: int, batch: int, seed: int, ranks: Ranks):
        if batch % ranks.world:
            raise TrainingError(f"batch: {batch} images cannot be shared by {ranks.world} ranks")
        self.epoch, self.start, self.batch = 0, 0, batch // ranks.world
        self.order = DistributedSampler(
            range(count), num_replicas=ranks.world, rank=ranks.rank, seed=seed
        )

    def __len__(self) -> int:
        """How many there are in a whole epoch."""
        full, rest = divmod(len(self.order), self.batch)
        return full + (rest > 1 or (rest == self.batch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.order.set_epoch(self.epoch)
        order = [(self.epoch, index) for index in self.order]
        for number in range(self.start, len(self)):
            yield order[number * self.batch : (number + 1) * self.batch]


class OrderedBatches(Sampler):
    """Every image once: rank ``r`` has each ``world``-th from the ``r``-th on."""

    def __init__(self, count: int, batch: int, ranks: Ranks):
        places = [(0, index) for index in range(ranks.rank, count, ranks.world)]
        self.batches = [places[start : start + batch] for start in range(0, len(places), batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


def loader(prepared: Prepared, batches: Sampler, workers: int, pin: bool) -> DataLoader:
    """torch's loader of :class:`Batch` objects."""
    return DataLoader(
        prepared, batch_sampler=batches, num_workers=workers, collate_fn=Batch,
        pin_memory=pin, persistent_workers=workers > 0,
        # its workers' seeds must not be drawn from the generator that the models use
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
