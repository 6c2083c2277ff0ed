"""The command ``fastres`` and the measuring behind it: figures, exit statuses, JSON, errors."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastres
from fastres import cli, compare, compat, models, timing
from fastres.cli.images import batches_of, load_images
from fastres.cli.model import build_model
from fastres.training.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES

SMALL = ["--size", "32", "--rounds", "2", "--providers", "eager", "fastres"]


class Tiny(nn.Module):
    """A small residual network, the outputs of which a test can spoil by ``factor``."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 8)
        self.factor = 1.0

    def forward(self, images):
        skip = torch.relu(self.bn1(self.conv1(images)))
        features = torch.relu(self.bn2(self.conv2(skip)) + skip)
        return self.fc(features.mean((2, 3))) * self.factor


def tiny() -> nn.Module:
    return Tiny()


def needs_argument(depth) -> nn.Module:
    return Tiny()


def no_module() -> str:
    return "resnet"


lazy = nn.LazyConv2d(4, 3)
not_callable = 3


@pytest.fixture
def photographs(tmp_path):
    image = pytest.importorskip("PIL.Image")
    files = []
    for seed in range(3):
        noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(seed))
        files.append(tmp_path / f"photo{seed}.png")
        image.fromarray(noise.to(torch.uint8).numpy()).save(files[-1])
    return files


@pytest.fixture
def here(monkeypatch, request):
    """``test_cli:NAME`` is a model on the command line, found from the folder it is called in."""
    monkeypatch.chdir(request.path.parent)
    return "test_cli"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- compare -------------------------------------------------------------------------------------


def test_compare_agrees_and_saves_every_figure(capsys, photographs, here, tmp_path):
    saved = tmp_path / "result.json"
    status, out, _ = run(
        capsys, "compare", f"{here}:tiny", "--image", *photographs, "--batch", 2,
        "--json", saved, *SMALL,
    )  # fmt: skip
    result = json.loads(saved.read_text())
    assert status == 0 and result["agrees"] is True
    assert result["input_shape"] == [2, 3, 32, 32] and result["mode"] == "eval"
    assert result["batch_norm_calibrated"] == 2
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["environment"]["threads"] == torch.get_num_threads()
    eager, ours = result["providers"]
    assert eager["sites"] == {} and ours["sites"] == {"fused": 3, "left_alone": 0}
    assert [eager["provider"], ours["provider"]] == ["eager", "fastres"]
    # 3 pictures in batches of 2: the last batch is filled up
    assert ours["same_top5"] == ours["images"] == 4
    assert 0 < ours["error"]["max_abs"] <= ours["error"]["allowed_abs"]
    assert eager["error"]["max_abs"] < 1e-4 and eager["vs_eager"]["max_abs"] == 0
    for row in (eager, ours):
        assert len(row["seconds"]) == 2
        expected = 1e3 * sum(row["seconds"]) / 2 / 2  # the median of two, and two images a call
        assert row["ms_per_image"]["median"] == pytest.approx(expected)
    ratios = [a / b for a, b in zip(eager["seconds"], ours["seconds"], strict=True)]
    assert ours["speedup"]["median"] == pytest.approx(sum(ratios) / 2)
    assert f"{ours['ms_per_image']['median']:.2f}" in out and "4 of 4" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_compare_in_other_dtypes(capsys, photographs, here, dtype, tmp_path):
    saved = tmp_path / "result.json"
    status, _, _ = run(
        capsys, "compare", f"{here}:tiny", "--image", *photographs, "--dtype", dtype,
        "--json", saved, *SMALL,
    )  # fmt: skip
    eager, _ours = json.loads(saved.read_text())["providers"]
    assert status == 0
    # the reference is an fp64 run of the rounded model, so the error is the dtype's own
    low, high = {"bfloat16": (1e-4, 0.2), "float64": (0, 1e-12)}[dtype]
    assert low <= eager["error"]["max_rel"] <= high


def test_compare_training_steps(capsys, photographs, here, tmp_path):
    saved = tmp_path / "result.json"
    status, out, _ = run(
        capsys, "compare", f"{here}:tiny", "--train", "--image", *photographs,
        "--json", saved, *SMALL,
    )  # fmt: skip
    eager, ours = json.loads(saved.read_text())["providers"]
    assert status == 0
    assert len(ours["losses"]) == compare.TRAINING_STEPS
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-2)
    assert ours["losses"][-1] < ours["losses"][0], "SGD on fixed labels must make progress"
    assert f"{ours['losses'][0]:.4f}" in out


def test_compare_fails_where_outputs_disagree(capsys, photographs, here, monkeypatch):
    def spoil(model):
        model.factor = 1.001
        return model

    monkeypatch.setattr(compare, "convert", spoil)
    status, out, _ = run(
        capsys, "compare", f"{here}:tiny", "--image", *photographs, *SMALL
    )  # fmt: skip
    assert status == 1 and "DISAGREES" in out


def test_weights_are_loaded(capsys, photographs, here, tmp_path):
    torch.manual_seed(5)
    trained, file, saved = tiny(), tmp_path / "weights.pt", tmp_path / "result.json"
    torch.save(trained.state_dict(), file)
    model = build_model(f"{here}:tiny", file)
    assert all(
        torch.equal(value, trained.state_dict()[name])
        for name, value in model.state_dict().items()
    )  # fmt: skip
    status, _, _ = run(
        capsys, "compare", f"{here}:tiny", "--weights", file, "--image", *photographs,
        "--json", saved, *SMALL,
    )  # fmt: skip
    assert status == 0 and json.loads(saved.read_text())["batch_norm_calibrated"] == 0


def test_a_failing_compiler_is_reported(capsys, photographs, here, monkeypatch):
    def refuse(function):
        def call(*inputs):
            raise RuntimeError("no C++ compiler\nsecond line")

        return call

    monkeypatch.setattr(compare, "compiled", refuse)
    status, out, _ = run(
        capsys, "compare", f"{here}:tiny", "--image", *photographs, "--size", 32,
        "--rounds", 1,
    )  # fmt: skip
    assert status == 0 and "compile: not run: RuntimeError: no C++ compiler\n" in out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet50", "expected FAMILY:NAME such as torchvision:resnet50, got 'resnet50'"),
        ("fastres:resnet51", "no model is called 'resnet51'; did you mean resnet"),
        ("torchvision:resnet5O", "torchvision has no 'resnet5O'; did you mean resnet50"),
        ("torchvison:resnet18", "no module named 'torchvison'; did you mean torchvision?"),
        ("test_cli:tniy", "test_cli has no 'tniy'; did you mean tiny"),
        ("test_cli:needs_argument", "without arguments: missing a required argument: 'depth'"),
        ("test_cli:no_module", "to return a torch.nn.Module, got str"),
        ("test_cli:not_callable", "expected a callable, test_cli:not_callable is int"),
        ("test_cli:lazy", "test_cli:lazy holds a LazyConv2d without weights yet; call the model"),
    ],
)
def test_unknown_models_are_named(capsys, here, model, message):
    if model.startswith("torchvision:"):
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    status, out, err = run(capsys, "compare", model, *SMALL)
    assert status == 2 and out == ""
    assert message in err and err.startswith("fastres: error: ") and err.count("\n") == 1


def test_files_that_do_not_fit_are_named(capsys, here, photographs, tmp_path):
    text, weights = tmp_path / "notes.txt", tmp_path / "weights.pt"
    text.write_text("no picture")
    torch.save({"conv.weight": torch.zeros(1)}, weights)
    for arguments, message in [
        (["--image", tmp_path / "none.jpg"], "none.jpg: No such file"),
        (["--image", text], "no picture that pillow can read"),
        (["--image", tmp_path], f"{tmp_path}: Is a directory"),
        (["--weights", tmp_path / "none.pt"], "--weights: checkpoint: no such file"),
        (["--weights", text], "is damaged, or no checkpoint"),
        (["--weights", weights], "is of another model"),
        (["--json", tmp_path / "none" / "a.json"], "--json: no such folder"),
    ]:
        status, _, err = run(
            capsys, "compare", f"{here}:tiny", "--image", photographs[0], *arguments, *SMALL
        )
        assert status == 2 and message in err and err.count("\n") == 1, (arguments, err)


def test_images_too_small_for_the_model(capsys, here, photographs):
    status, _, err = run(
        capsys, "compare", f"{here}:tiny", "--image", *photographs, "--size", 2
    )  # fmt: skip
    assert status == 2 and "does not run on these images" in err


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--rounds", "many"], ["--dtype", "int8"], ["--providers", "x"]]
)
def test_wrong_options(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["compare", "fastres:resnet18", *arguments])
    assert exit.value.code == 2 and arguments[1] in capsys.readouterr().err


def test_a_provider_that_cannot_serve(capsys, here):
    status, _, err = run(capsys, "compare", f"{here}:tiny", "--providers", "fastres-triton")
    if fastres.backends()["triton"].available:
        pytest.skip("Triton serves here")
    assert status == 2 and fastres.backends()["triton"].reason in err


# --- info, summary, module -----------------------------------------------------------------------


def test_info_lists_versions_and_backends(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0 and f"torch {torch.__version__}" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name, state in fastres.backends().items():
        assert lines[name].split()[1] == ("yes" if state.available else "no")
        assert state.reason in lines[name]


def test_models_of_every_family_are_built_from_seed_0(torchvision):
    for spec, weight in [("torchvision:resnet18", "fc"), ("fastres:resnet18", "fc")]:
        first, second = build_model(spec), build_model(spec)
        assert isinstance(first, nn.Module) and first is not second
        assert torch.equal(getattr(first, weight).weight, getattr(second, weight).weight)
    pytest.importorskip("timm")
    assert build_model("timm:resnet18").num_classes == 1000
    # a backbone that would be downloaded by default
    assert build_model("torchvision:fcn_resnet50").backbone.conv1.out_channels == 64


def test_summary_prints_what_the_library_says(capsys, here):
    status, out, _ = run(capsys, "summary", f"{here}:tiny")
    assert status == 0
    assert out.strip() == str(fastres.summary(fastres.convert(tiny()))).strip()


def test_help_says_what_an_exit_status_means(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert "1 fastres disagrees with eager, 2 wrong use" in " ".join(out.split())
    assert "``" not in out


def test_help_of_training_shows_every_recipes_values(capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "fashion", RECIPES["fashion"].changed({"lr": 0.0123}))
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for line in (
        "learning rate [cifar, imagenet: 0.1; cifar2: 0.001; fashion: 0.0123]",
        "at a milestone [all: 0.1]",
        "[cifar: 0.5 0.75; cifar2, fashion: none; imagenet: 0.33333 0.66667]",
        "[cifar, fashion, imagenet: none; cifar2: airplane bird]",
    ):
        assert line in out


def test_models_are_listed(capsys):
    assert run(capsys, "models") == (0, "\n".join(models.list_models()) + "\n", "")
    status, out, _ = run(capsys, "models", "wide_*", "wide_resnet50_2", "teaching_resnet18")
    listed = out.split()
    assert status == 0 and listed[-1] == "teaching_resnet18"
    assert listed[:-1] == models.list_models("wide_*") and len(listed) > 2
    status, out, err = run(capsys, "models", "resnet5")
    assert (status, out) == (2, "") and "PATTERN: no model" in err and "resnet50" in err


def test_python_m_fastres():
    shown = subprocess.run(
        [sys.executable, "-m", "fastres", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"fastres {fastres.__version__}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_nobody_has_to_read_the_output_to_its_end(unbuffered):
    """``fastres table | head`` ends as ``yes | head`` does."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastres", "table", "cifar_resnet8", "--rounds", "1"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, check=False, stdout=write, stderr=subprocess.PIPE, env=environment
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


# --- measuring -----------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_ratios_taken_within_them():
    order = []
    seconds = timing.interleave({name: lambda n=name: order.append(n) for name in "ab"}, 3)
    assert order == ["a", "b"] * 3 and [len(times) for times in seconds.values()] == [3, 3]
    # the machine became ten times slower, the ratio did not change
    assert timing.ratios([1.0, 2.0, 10.0], [2.0, 4.0, 20.0])["median"] == 0.5
    assert timing.spread([1, 2, 3, 4, 5, 6]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_fastest_ignores_the_first_call():
    waits = {"slow": iter([0.0] + [0.004] * 5), "cold": iter([0.02] + [0.0] * 5)}

    def call(name):
        import time

        time.sleep(next(waits[name]))

    assert timing.fastest({name: lambda n=name: call(n) for name in waits}) == "cold"


def test_max_error():
    reference = {"out": torch.tensor([1.0, -4.0]), "count": torch.tensor(3)}
    ours = {"out": torch.tensor([1.0, -3.0]), "count": torch.tensor(4)}
    assert compare.max_error(ours, reference) == (1.0, 0.25)
    nan, inf = float("nan"), float("inf")
    special = torch.tensor([nan, inf, 1.0])
    assert compare.max_error(special, special.clone()) == (0.0, 0.0)
    assert compare.max_error(torch.tensor([nan, inf, nan]), special) == (inf, inf)
    assert compare.max_error(torch.zeros(2), torch.zeros(3)) == (inf, inf)


def test_same_top_allows_ties_only():
    expected = torch.tensor([[5.0, 4.0, 3.0], [5.0, 4.0, 3.999]])
    swapped = torch.tensor([[5.0, 3.0, 4.0], [5.0, 4.0, 4.001]])
    assert compare.same_top(expected, expected, tie=0.0) == 2
    assert compare.same_top(swapped, expected, tie=0.01) == 1
    assert compare.same_top(swapped, expected, tie=0.0001) == 0
    assert compare.same_top(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), tie=0) is None


def test_calibration_sets_the_mean_over_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5)).train()
    batches = [torch.randn(4, 2, 5, 5) * 3 + 1 for _ in range(3)]
    assert compare.calibrate_batch_norm(model, batches) == 1
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    var = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[0].momentum == 0.3 and all(module.training for module in model.modules())


def test_batches_are_full_and_repeat_no_picture():
    images = torch.arange(5.0).view(5, 1, 1, 1)
    batches = batches_of(images, 2)
    assert [batch.flatten().tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    (batch,) = batches_of(torch.randn(2, 3, 16, 16), 8)
    distances = (batch[:, None] - batch).abs().amax((2, 3, 4)) + torch.eye(8)
    assert batch.shape[0] == 8 and distances.min() > 0


def test_images_are_normalised(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (50, 30), (255, 128, 0)).save(tmp_path / "flat.png")
    (pixels,) = load_images([tmp_path / "flat.png"], 16)
    assert pixels.shape == (3, 16, 16)
    for channel, level in enumerate((255, 128, 0)):
        expected = (level / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(pixels[channel], torch.full((16, 16), expected))


def test_training_step_is_sgd_on_cross_entropy():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 4))
    images = torch.randn(2, 3, 2, 2)
    expected = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))
    (weight_gradient,) = torch.autograd.grad(expected, model[1].weight)
    before = model[1].weight.detach().clone()
    step = compare.training_step(model, model, images, torch.float32)
    assert step().item() == pytest.approx(expected.item())
    torch.testing.assert_close(
        model[1].weight.detach(), before - compare.LEARNING_RATE * weight_gradient
    )


# --- imports of other libraries ------------------------------------------------------------------


def test_torchvision_and_timm_import_beside_this_pytorch(torchvision):
    assert compat.import_torchvision() is torchvision
    timm = pytest.importorskip("timm")
    assert compat.import_timm() is timm
    assert math.prod(torchvision.models.resnet18().fc.weight.shape) == 512 * 1000


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_missing_libraries_come_with_the_command_to_install_them(capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    status, _, err = run(capsys, "compare", f"{name}:resnet18")
    assert status == 2 and f"pip install {name}" in err
