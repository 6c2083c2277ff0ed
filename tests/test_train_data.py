"""Data in folders, the recipes' values, and what is done to a picture."""

import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from learning import CLASSES, pictures, small_recipe, write_arrays, write_tree

from fastres.training import RECIPES, Recipe, TrainingError, open_data, open_split
from fastres.training.distributed import Ranks
from fastres.training.loading import Batch, OrderedBatches, Prepared, ShuffledBatches, transform
from fastres.training.seeds import derive

pytestmark = pytest.mark.usefixtures("torchvision")
Image = pytest.importorskip("PIL.Image")


# --- folders -------------------------------------------------------------------------------------


def test_arrays_and_a_tree_hold_the_same_pictures(tmp_path):
    (from_arrays, _), (from_tree, test) = (
        open_data(write_arrays(tmp_path / "a", 24, 12)),
        open_data(write_tree(tmp_path / "b")),
    )
    assert from_arrays.classes == ("0", "1", "2", "3") and from_tree.classes == tuple("abcd")
    assert len(from_tree) == len(from_arrays) == 24 and len(test) == 12
    pixels, labels = pictures(24, 1)
    in_tree = sorted(range(24), key=lambda index: (labels[index], index))
    for index, place in enumerate(in_tree):
        picture, label = from_tree[index]
        assert label == labels[place] == from_arrays[place][1]
        assert np.array_equal(np.asarray(picture), pixels[place])
        assert np.array_equal(np.asarray(from_arrays[place][0]), pixels[place])


def test_some_images_are_of_all_classes(tmp_path):
    _, test = open_data(write_tree(tmp_path))
    assert list(test.labels) == sorted(test.labels), "a tree's order"
    some = test.some(4)
    labels = [some[place][1] for place in range(len(some))]
    assert labels == list(test.labels)[::3] and len(set(labels)) >= 3
    assert len(test.some(10**6)) == len(test)


def test_some_classes_are_numbered_in_the_order_named(tmp_path):
    whole, _ = open_data(write_tree(tmp_path))
    some, test = open_data(tmp_path, ("c", "0"))
    assert some.classes == test.classes == ("c", "a")
    expected = [(2, 0) if label == 2 else (0, 1) for label in whole.labels if label in (0, 2)]
    assert list(some.labels) == [new for _, new in expected]
    assert [whole.labels[place] for place in some.chosen] == [old for old, _ in expected]


def test_names_come_with_arrays(tmp_path):
    pixels, labels = pictures(8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=pixels[..., None], y=labels, classes=list("wxyz"))
    train, _ = open_data(tmp_path, ("y",))
    assert train.classes == ("y",) and len(train) == (labels == 2).sum()


def test_what_torchvision_downloads(tmp_path):
    """Its CIFAR-10 as stored: five pickled batches, one for the test, with their MD5 unchecked."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    names = [name for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": [seed, 0, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.cifar, "check_integrity", lambda *file: True)
        train, test = open_data(tmp_path)
    assert (len(train), len(test)) == (15, 3) and train.classes == tuple("abcdefghij")
    assert train[3][1] == 1 and test[0][1] == 5
    raw = np.random.default_rng(1).integers(0, 256, (3, 3072), dtype=np.uint8)
    assert np.array_equal(np.asarray(train[3][0]), raw[0].reshape(3, 32, 32).transpose(1, 2, 0))


def _save(**arrays):
    def make(folder):
        np.savez(folder / "train.npz", **arrays)

    return make


def _other_classes(folder):
    write_tree(folder)
    (folder / "test" / "d").rename(folder / "test" / "e")


def _no_files(folder):
    (folder / "train" / "a").mkdir(parents=True)


X, Y = np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: None, "holds no train images: expected train.npz, train/CLASS"),
        (lambda folder: (folder / "train").mkdir(), "Couldn't find any class folder"),
        (_no_files, "Found no valid file for the classes a"),
        (lambda folder: (folder / "train.npz").write_text("?"), "has no arrays x and y"),
        (_save(x=X), "has no arrays x and y"),
        (_save(x=X.astype(float), y=Y), r"dtype uint8, got \(3, 8, 8\) float64"),
        (_save(x=X[0], y=Y), r"got \(8, 8\) uint8"),
        (_save(x=X, y=Y[:2]), r"expected y of 3 .* got \(2,\)"),
        (_save(x=X, y=Y - 1), r"must lie in 0 ... 0, got -1"),
        (_save(x=X, y=Y, classes=["one"]), r"labels of 1 classes must lie in 0 ... 0, got 0 ... 1"),
        (_save(x=X[:0], y=Y[:0]), "at least one"),
        (lambda folder: (folder / "cifar-10-batches-py").mkdir(), "torchvision's CIFAR10 in"),
        (_other_classes, "4 classes to train on and 4 to test with: d, e"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(TrainingError, match=message) as caught:
        open_data(folder)
    assert "\n" not in str(caught.value)


def test_classes_that_are_not_there(tmp_path):
    write_tree(tmp_path)
    with pytest.raises(TrainingError, match="the data has no 'bird', its 4 classes are a, b, c, d"):
        open_split(tmp_path, "test", ("bird",))


def test_a_file_that_is_no_image_is_left_out(tmp_path):
    write_tree(tmp_path)
    bad = sorted((tmp_path / "train" / "b").iterdir())[:2]
    bad[0].write_text("no picture")
    bad[1].write_bytes(bad[1].read_bytes()[:60])  # cut off within the pixels
    images = open_split(tmp_path, "train")
    prepared = Prepared(images, small_recipe(), True, 0)
    batch = Batch([prepared[0, index] for index in range(len(images))])
    assert batch.skipped == list(map(str, bad))
    assert len(batch) == len(batch.images) == 22
    assert batch.labels.bincount().tolist()[1] == (pictures(24, 1)[1] == 1).sum() - 2
    batch.check(strict=False)
    with pytest.raises(TrainingError, match=f"{bad[0].name} cannot be decoded"):
        batch.check(strict=True)


def test_images_of_several_sizes_need_a_recipe_that_makes_them_one():
    samples = [(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 8, 9), 1)]
    with pytest.raises(TrainingError, match=r"\(1, 8, 8\) and \(1, 8, 9\) are in one batch"):
        Batch(samples).check(strict=False)


# --- batches -------------------------------------------------------------------------------------


def test_ranks_share_every_batch():
    alone = ShuffledBatches(40, 8, 5, Ranks())
    parts = [ShuffledBatches(40, 8, 5, Ranks(rank, 2, rank)) for rank in range(2)]
    whole = list(alone)
    assert len(whole) == 5 and sorted(chain(*whole)) == [(0, index) for index in range(40)]
    for batch, one, two in zip(whole, *parts, strict=True):
        assert len(one) == len(two) == 4 and sorted(batch) == sorted(one + two)
    alone.epoch, alone.start = 1, 3
    rest = list(alone)
    alone.start = 0
    again = list(alone)
    assert rest == again[3:] and again[0] != [(1, index) for _, index in whole[0]]


@pytest.mark.parametrize(("count", "batches"), [(16, 2), (17, 2), (18, 3), (1, 0), (7, 1)])
def test_a_last_batch_of_one_image_is_left_out(count, batches):
    shuffled = ShuffledBatches(count, 8, 0, Ranks())
    assert len(shuffled) == len(list(shuffled)) == batches


def test_every_test_image_is_seen_once():
    parts = [OrderedBatches(11, 3, Ranks(rank, 2, rank)) for rank in range(2)]
    assert sorted(chain(*parts[0], *parts[1])) == [(0, i) for i in range(11)]


def test_a_batch_that_ranks_cannot_share():
    with pytest.raises(TrainingError, match="9 images cannot be shared by 2 ranks"):
        ShuffledBatches(40, 9, 0, Ranks(0, 2, 0))


# --- recipes -------------------------------------------------------------------------------------


def test_the_recipes_are_the_published_ones():
    cifar, cifar2 = RECIPES["cifar"], RECIPES["cifar2"]
    fashion, imagenet = RECIPES["fashion"], RECIPES["imagenet"]
    assert (cifar.optimizer, cifar.lr, cifar.momentum, cifar.weight_decay) == (
        "sgd",
        0.1,
        0.9,
        1e-4,
    )
    assert (cifar.batch, cifar.iterations, cifar.gamma) == (128, 64_000, 0.1)
    assert [share * cifar.iterations for share in cifar.milestones] == [32_000, 48_000]
    assert (cifar.pad, cifar.flip, cifar.resize, cifar.crop) == (4, 1, 0, 0)
    assert cifar.mean == (0.4914, 0.4822, 0.4465) and cifar.std == (0.2470, 0.2435, 0.2616)
    assert (cifar2.optimizer, cifar2.lr, cifar2.batch, cifar2.epochs) == ("adam", 1e-3, 64, 5)
    assert cifar2.classes == ("airplane", "bird") and cifar2.weight_decay == 0
    assert (fashion.optimizer, fashion.lr, fashion.momentum) == ("sgd", 0.05, 0)
    assert (fashion.batch, fashion.resize, fashion.channels) == (256, 96, 1)
    assert (imagenet.lr, imagenet.momentum, imagenet.weight_decay) == (0.1, 0.9, 1e-4)
    assert (imagenet.batch, imagenet.resize, imagenet.crop) == (256, 256, 224)
    assert [share * imagenet.epochs for share in imagenet.milestones] == [30, 60]


def test_values_are_changed_and_a_length_replaces_the_other():
    changed = RECIPES["cifar"].changed({"epochs": 4, "lr": 0.2})
    assert (changed.epochs, changed.iterations, changed.lr) == (4, 0, 0.2)
    assert RECIPES["imagenet"].changed({"iterations": 7}).epochs == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adam, got 'lion'"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"channels": 1}, "mean: expected 1 values, got 3"),
        ({"std": (0.2, 0.0, 0.2)}, "std: expected positive values, got 0.0"),
        ({"epochs": 0}, "epochs 0, iterations 0"),
        ({"iterations": 5}, "epochs 1, iterations 5"),
        ({"batch": 0}, "batch 0"),
        ({"milestones": (30.0,)}, "shares of the run between 0 and 1"),
    ],
)
def test_recipes_that_cannot_be_meant(values, message):
    with pytest.raises(TrainingError, match=message):
        Recipe(**{"epochs": 1} | values)


# --- pictures ------------------------------------------------------------------------------------


def colour(height=8, width=8):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels, Image.fromarray(pixels)


def test_pixels_are_normalised():
    pixels, picture = colour()
    recipe = RECIPES["cifar"]
    expected = (torch.from_numpy(pixels) / 255 - torch.tensor(recipe.mean)) / torch.tensor(
        recipe.std
    )
    torch.testing.assert_close(transform(recipe, False)(picture), expected.permute(2, 0, 1))


def test_padded_cropped_and_mirrored():
    """A training image is a window of the padded one, as it is or mirrored; all of them come."""
    pixels, picture = colour()
    recipe = RECIPES["cifar"].changed({"pad": 1})
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    windows = {}
    for row in range(3):
        for column in range(3):
            window = padded[row : row + 8, column : column + 8]
            for flipped in (window, window[:, ::-1]):
                image = transform(recipe, False)(Image.fromarray(np.ascontiguousarray(flipped)))
                windows[image.numpy().tobytes()] = 0
    assert len(windows) == 18
    augment = transform(recipe, True)
    for _ in range(300):
        windows[augment(picture).numpy().tobytes()] += 1
    assert len(windows) == 18 and min(windows.values()) > 0


@pytest.mark.parametrize("train", [True, False])
def test_sizes(train):
    _, picture = colour(40, 60)
    assert transform(RECIPES["imagenet"], train)(picture).shape == (3, 224, 224)
    grey = transform(RECIPES["fashion"], train)(Image.fromarray(colour(28, 28)[0]).convert("L"))
    assert grey.shape == (1, 96, 96)


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path):
    images = open_split(write_arrays(tmp_path), "train")
    recipe = small_recipe(flip=1, pad=2)
    prepared = Prepared(images, recipe, True, 1)
    first = prepared[0, 5][0]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(prepared[0, 5][0], first)
    assert torch.equal(torch.get_rng_state(), state), "the model's random numbers are its own"
    others = [prepared[epoch, 5][0] for epoch in range(1, 12)]
    others += [Prepared(images, recipe, True, seed)[0, 5][0] for seed in range(2, 6)]
    assert any(not torch.equal(other, first) for other in others)
    assert len({derive(a, b) for a in range(50) for b in range(50)}) == 2500
    assert images.labels.max() == CLASSES - 1
