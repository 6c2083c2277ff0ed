"""Convolutions whose depth is split over programs, under Triton's interpreter: numbers by the error
rule, bits, what is written, and when a depth is split."""

import importlib
import itertools

import pytest
import torch
from agreement import assert_close, assert_same_bits
from test_triton_conv import SHAPES, Case, check_eval, kernels, merged

triton = pytest.importorskip("triton")

__all__ = ["kernels"]  # the fixture

# 3x3 of 40 channels are 27 steps of 16: in 4 parts 7, 7, 7 and 6; more parts than steps are empty ones
NAMES = [name for name in SHAPES if name not in ("7x7 stem", "5 channels")]
PARTS = {name: (3,) for name in NAMES} | {"3x3": (2, 4, 28), "1x1": (2, 5)}
FORMS = [(name, parts, torch.float16) for name in NAMES for parts in PARTS[name]]
FORMS += [(name, 4, torch.float32) for name in ("1x1", "3x3 stride 2", "ResNeXt 4")]


def ids(parameter):
    return "{} in {} {}".format(*parameter[:2], str(parameter[2])[6:])


@pytest.fixture(params=FORMS, ids=ids)
def split(request, kernels):
    """The case, and its tile."""
    name, parts, dtype = request.param
    return Case(SHAPES[name], dtype), kernels.configs.Tile(64, 32, 16, 8, 4, 2, parts=parts)


def test_eval(kernels, split):
    case, tile = split
    check_eval(kernels, case, prologue=True, tile=tile)


def test_training(kernels, split):
    case, tile = split
    ours, moments = kernels.launch.fprop(
        case.x, case.w, *case.arguments, statistics=True, tile=tile
    )
    truth, eager = case.conv(case.x.double(), case.w.double()), case.conv(case.x, case.w)
    assert_close(ours, eager, truth)
    found = merged(moments, truth)
    for of, name in enumerate(("mean", "variance")):
        exact, rounded = (
            torch.var_mean(t.double(), (0, 2, 3), correction=0)[1 - of] for t in (truth, eager)
        )
        assert_close(found[of], rounded, exact, name, torch.float32)


@pytest.mark.parametrize("name", ["3x3", "ResNeXt 4"])
def test_two_runs_give_the_same_bits(kernels, name):
    case, tile = Case(SHAPES[name], torch.float16), kernels.configs.Tile(64, 32, 16, 8, 4, 2)

    def run():
        y, moments = kernels.launch.fprop(
            case.x, case.w, *case.arguments, statistics=True, tile=tile._replace(parts=5)
        )
        return {"y": y} | moments._asdict()

    assert_same_bits(run(), run())


def test_the_parts_are_added_in_their_order(kernels):
    """One after the other, whatever they hold: 2^24 + 1 + 1 - 2^24 is 0 in fp32, 1 + 1 is not."""
    parts = importlib.import_module("fastres.kernels.conv_parts")
    for order in itertools.permutations((2.0**24, 1.0, 1.0, -(2.0**24))):
        sums = torch.tensor(order).view(4, 1, 1).expand(4, 10, 70).contiguous()
        y = torch.empty(1, 70, 2, 5).to(memory_format=torch.channels_last)
        nothing = (None,) * 6, (None,) * 3
        parts.finish_parts(sums, y, *nothing, 0.0, False, lambda kernel: kernel)
        expected = torch.zeros(())
        for value in order:
            expected = expected + value
        assert (y == expected).all()


@pytest.mark.parametrize("name", ["3x3", "1x1", "ResNeXt 8 stride 2"])
@pytest.mark.parametrize("count", [3, 30])
def test_every_sum_is_written_and_nothing_beside_them(kernels, monkeypatch, name, count):
    parts = importlib.import_module("fastres.kernels.conv_parts")
    case, rooms = Case(SHAPES[name], torch.float16), []
    room_for, guard = parts.room_for, 4096

    def guarded(parts, y):
        size = room_for(parts, y).shape
        room = torch.full((size.numel() + 2 * guard,), float("nan"))
        rooms.append(room)
        return room[guard:-guard].view(size)

    monkeypatch.setattr(parts, "room_for", guarded)
    tile = kernels.configs.Tile(32, 32, 16, 8, 4, 2, parts=count)
    ours, _ = kernels.launch.fprop(case.x, case.w, *case.arguments, tile=tile)
    (room,) = rooms
    assert room.numel() - 2 * guard == count * ours.numel()
    assert room[guard:-guard].isfinite().all()
    assert room[:guard].isnan().all() and room[-guard:].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("name", ["3x3", "ResNeXt 4", "depthwise"])
def test_nan_and_inf_stay(kernels, name):
    case = Case(SHAPES[name], torch.float32)
    case.x[0, 1, 2, 2], case.x[0, -1, 3, 1] = float("inf"), float("nan")
    tile = kernels.configs.Tile(16, 32, 32, 8, 4, 2, parts=3)
    ours, _ = kernels.launch.fprop(case.x, case.w, *case.arguments, tile=tile)
    expected = case.conv(case.x, case.w)
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert ours.isnan().any() and ours.isinf().any() and ours.isfinite().any()


def test_refused(kernels):
    """Few channels are one axis with the taps, which has no steps to share out."""
    tile = kernels.configs.Tile(16, 32, 16, 8, 4, 2, parts=2)
    with pytest.raises(ValueError, match=r"^tile: no parts of a convolution of so few channels"):
        kernels.launch.fprop(torch.randn(1, 3, 9, 9), torch.randn(8, 3, 3, 3), tile=tile)


# --- choice ---------------------------------------------------------------------------------------

# map, channels, filters, taps of ResNet-50's last stages
SMALL = [(14, 256, 256, 9), (14, 1024, 256, 1), (7, 512, 512, 9), (7, 2048, 512, 1)]
LARGE = [(56, 64, 64, 9), (56, 64, 256, 1), (28, 128, 128, 9), (14, 256, 256, 9), (7, 512, 512, 9)]


def chosen(configs, images, size, channels, filters, taps, architecture=90, multiprocessors=132):
    problem = configs.Problem(
        "plain", architecture, "half", 1, images * size * size, filters, channels,
        multiprocessors, taps,
    )  # fmt: skip
    tiles = configs.candidates(problem) + configs.split_candidates(problem)
    tile = configs.shipped(problem, tiles)
    programs = triton.cdiv(problem.rows, tile.BLOCK_M) * triton.cdiv(filters, tile.BLOCK_N)
    return problem, tile, programs * tile.parts


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_single_image_fills_half_of_the_device(kernels, shape):
    """Where it was 8 or 16 programs; and no part is empty, nor its sums more than the filters."""
    for architecture, multiprocessors in ((80, 108), (90, 132), (100, 148)):
        problem, tile, programs = chosen(kernels.configs, 1, *shape, architecture, multiprocessors)
        assert multiprocessors < 2.5 * programs and programs <= 2 * multiprocessors
        steps = problem.taps * triton.cdiv(problem.depth, tile.BLOCK_K)
        parts, each = kernels.configs.equal_parts(steps, tile.parts)
        assert parts == tile.parts and (parts - 1) * each < steps <= parts * each
        sums = tile.parts * problem.rows * problem.columns * 4 * (tile.parts > 1)
        assert sums <= problem.taps * problem.depth * problem.columns * 2


def test_the_longest_depth_is_split(kernels):
    _, tile, programs = chosen(kernels.configs, 1, 7, 512, 512, 9)
    assert tile.parts > 4 and programs > 90


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_a_batch_is_not_split(kernels, shape):
    _, tile, programs = chosen(kernels.configs, 256, *shape)
    assert tile.parts == 1 and tile.BLOCK_M == 128 and programs > 132


def test_parts_are_equal(kernels):
    for steps, parts in itertools.product(range(1, 40), range(1, 45)):
        count, each = kernels.configs.equal_parts(steps, parts)
        assert count <= parts and (count - 1) * each < steps <= count * each


# sizes of which 4 multiprocessors, the interpreter's, would have one tile
DEEP = (1, 1100, 3, 3, 20, (3, 3), (1, 1), (1, 1), (1, 1), 1)


def test_the_shipped_choice_runs(kernels, monkeypatch):
    parts, made = importlib.import_module("fastres.kernels.conv_parts"), []
    room_for = parts.room_for
    monkeypatch.setattr(
        parts, "room_for", lambda count, y: made.append(count) or room_for(count, y)
    )
    case = Case(DEEP, torch.float16)
    ours, _ = kernels.launch.fprop(case.x, case.w, *case.arguments)
    assert made == [4]
    assert_close(ours, case.conv(case.x, case.w), case.conv(case.x.double(), case.w.double()))


@pytest.mark.parametrize("faster", ["whole", "parts"])
def test_autotuning_measures_with_and_without_parts(kernels, monkeypatch, faster):
    """What is measured of parts is the whole: both kernels."""
    tuning, launch = kernels.tuning, kernels.launch
    parts, make = importlib.import_module("fastres.kernels.conv_parts"), tuning.tuner_of.__wrapped__
    finish_parts, finished, whole = parts.finish_parts, [], []

    def bench(call, quantiles):
        before = len(finished)
        call()
        whole.append(len(finished) == before)
        return [1.0 if whole[-1] == (faster == "whole") else 2.0] * 3

    monkeypatch.setattr(
        parts, "finish_parts", lambda *args: finished.append(1) or finish_parts(*args)
    )
    monkeypatch.setattr(tuning, "tuner_of", lambda *of: make(*of, bench))
    monkeypatch.setattr(tuning, "_measurable", lambda like: True)
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setenv("FASTRES_AUTOTUNE", "1")
    case = Case(DEEP, torch.float16)
    ours, _ = launch.fprop(case.x, case.w, *case.arguments)
    (_, tile), *more = tuning._measured.values()
    assert (tile.parts > 1) == (faster == "parts") and not tile.descriptors and not more
    assert True in whole and False in whole
    assert_close(ours, case.conv(case.x, case.w), case.conv(case.x.double(), case.w.double()))
