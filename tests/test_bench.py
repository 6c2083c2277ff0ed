"""The benchmarks' harness, and a report made from a small run of them."""

import copy
import dataclasses
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
BENCH = Path(__file__).parent.parent / "bench"
RUN = "overhead and add_relu-64x7x7 and fp32-eval and (eager or fastres-cpu)"


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the folder ``bench``, which is no package."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """What pytest-benchmark writes for two operators under eager and fastres."""
    file = tmp_path_factory.mktemp("bench") / "raw.json"
    command = [sys.executable, "-m", "pytest", BENCH, "-q", "-k", RUN, f"--benchmark-json={file}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=BENCH.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


def report(raw: dict, folder: Path) -> Path:
    (folder / "raw.json").write_text(json.dumps(raw))
    script = [sys.executable, BENCH / "report.py", folder / "raw.json", "--out", folder / "results"]
    subprocess.run(script, check=True, capture_output=True)
    (device,) = (folder / "results").iterdir()
    return device


def test_every_round_gives_a_ratio(raw):
    measured = [entry for entry in raw["benchmarks"] if "ratio" in entry["extra_info"]]
    assert {entry["extra_info"]["provider"] for entry in measured} >= {"eager"}
    for entry in measured:
        info, stats = entry["extra_info"], entry["stats"]
        assert stats["rounds"] >= 7 and len(stats["data"]) == stats["rounds"]
        # median(a / b) lies between the extremes of what the two medians allow
        assert info["ratio"]["p20"] <= info["ratio"]["median"] <= info["ratio"]["p80"]
        assert info["eager_seconds"]["median"] > 0
        assert info["error"] <= 2 * info["eager_error"] + torch.finfo(torch.float32).eps
        assert entry["group"] == f"overhead {info['case']}"
    assert raw["machine_info"]["ceilings"]["copy_gbs"] > 0
    assert platform.node() not in json.dumps(raw["machine_info"])
    assert "project" not in raw["commit_info"] and "branch" not in raw["commit_info"]


def test_report_has_the_figures_of_the_run(raw, tmp_path):
    folder = report(raw, tmp_path)
    text, kept = (folder / "results.md").read_text(), (folder / "benchmark.json").read_text()
    entries = json.loads(kept)["benchmarks"]
    assert len(entries) == len(raw["benchmarks"]) and '"data"' not in kept
    for entry, original in zip(entries, raw["benchmarks"], strict=True):
        assert entry["seconds"]["median"] == pytest.approx(original["stats"]["median"], rel=1e-4)
        row = next(line for line in text.splitlines() if line.startswith(f"| {entry['case']} |"))
        assert f"{entry['ratio']['median']:.2f}" in row
    assert (folder / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert "![overhead.png](overhead.png)" in text


def test_report_names_what_is_slower_than_eager(raw, tmp_path):
    raw = copy.deepcopy(raw)
    template = next(e for e in raw["benchmarks"] if e["extra_info"]["provider"] == "eager")
    for case, ratio in (("slow", 0.5), ("noisy", 0.95), ("fast", 2.0)):
        entry = copy.deepcopy(template)
        entry["extra_info"] |= {
            "case": case,
            "provider": "fastres-cpu",
            "ratio": {"median": ratio, "p20": ratio - 0.1, "p80": ratio + 0.1},
        }
        raw["benchmarks"].append(entry)
    raw["benchmarks"] = [e for e in raw["benchmarks"] if e["extra_info"]["case"] in
                         ("slow", "noisy", "fast")]  # fmt: skip
    text = (report(raw, tmp_path) / "results.md").read_text()
    section = text.split("## Slower than eager")[1].split("\n## ")[0]
    assert "| overhead slow | fastres-cpu | 0.50 |" in section
    assert "noisy" not in section and "fast |" not in section
    geometric = (0.5 * 0.95 * 2.0) ** (1 / 3)
    assert f"| 3 | {geometric:.2f} | 0.50 | 2.00 |" in text


def test_report_of_first_calls_and_memory(raw, tmp_path):
    raw = copy.deepcopy(raw)
    entry = copy.deepcopy(raw["benchmarks"][0])
    entry["extra_info"] = {
        "family": "start", "case": "resnet50", "provider": "openvino",
        "first_call_seconds": 0.357829, "resident_bytes": 260349952,
    }  # fmt: skip
    raw["benchmarks"].append(entry)
    folder = report(raw, tmp_path)
    section = (folder / "results.md").read_text().split("## First call and resident memory")[1]
    assert "| resnet50 | openvino | 0.36 | 248 |" in section
    assert not (folder / "start.png").exists()


def test_report_of_a_training_steps_memory(raw, tmp_path):
    raw = copy.deepcopy(raw)
    raw["benchmarks"] = raw["benchmarks"][:1]
    raw["benchmarks"][0]["extra_info"] |= {
        "case": "net", "provider": "fastres-cpu", "peak_bytes": 3 << 20, "eager_peak_bytes": 5 << 20,
    }  # fmt: skip
    text = (report(raw, tmp_path) / "results.md").read_text()
    header, _, row = text.split("## overhead\n\n")[1].splitlines()
    assert header.endswith("| MiB of eager's step | MiB of fastres-cpu |")
    assert row.startswith("| net |") and row.endswith("| 5 | 3 |")


def test_losses_of_a_run_are_averaged(bench, tmp_path):
    rows = [f"{step},{step},{2 * step}" for step in range(1, 6)]
    (tmp_path / "steps.csv").write_text("\n".join(["iteration,fastres,eager", *rows]))
    steps = bench("steps")
    losses = steps.read(tmp_path)
    assert losses == {"fastres": [1, 2, 3, 4, 5], "eager": [2, 4, 6, 8, 10]}
    assert steps.averages(losses["eager"], 2) == [(2, 3.0), (4, 7.0)]
    steps.main(str(tmp_path / "losses.png"), "2", str(tmp_path))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_measurements_says_so(tmp_path):
    file = tmp_path / "raw.json"
    file.write_text(json.dumps({"benchmarks": [], "machine_info": {}, "datetime": "2026-01-01"}))
    done = subprocess.run(
        [sys.executable, BENCH / "report.py", file, "--out", tmp_path],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "holds no measured benchmark" in done.stderr


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("AMD EPYC (family 25, model 17)", "amd-epyc-zen4-avx2-2c"),
        (
            "AMD Ryzen 9 5950X 16-Core Processor (family 25, model 33)",
            "amd-ryzen-9-5950x-zen3-avx2-2c",
        ),
        (
            "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz (family 6, model 143)",
            "intel-xeon-platinum-8488c-avx2-2c",
        ),
        ("aarch64", "aarch64-avx2-2c"),
    ],
)
def test_folder_names(bench, cpu, expected):
    assert bench("report").slug({"cpu": cpu, "cpu_capability": "AVX2", "threads": 2}) == expected


def test_a_wrong_output_is_not_timed(bench):
    harness, cases = bench("harness"), bench("cases")

    def wrong(module):
        return lambda input, residual: torch.relu(input + residual) * 1.00001

    case = cases.Case(
        name="add", build=lambda: (cases.AddReLU(), cases.maps(1, 4, 5, 5, count=2)),
        providers=("eager", "fastres-cpu"), fused=wrong,
    )  # fmt: skip
    with torch.no_grad():
        prepared = harness.prepare(dataclasses.replace(case, fused=cases.on_fastres))
        task = dataclasses.replace(prepared.task, case=case)
        ready = harness.ready(task, "fastres-cpu", prepared.reference, ["contiguous"])
    with pytest.raises(AssertionError, match="output of add is wrong: relative L2 error 1.00e-05"):
        harness.verify(case, "fastres-cpu", ready.errors, prepared.eager.errors)
    harness.verify(case, "eager", prepared.eager.errors, prepared.eager.errors)


def test_training_cases_compare_every_gradient(bench):
    harness, cases = bench("harness"), bench("cases")
    case = cases.Case(
        name="bn", build=lambda: (cases.BNReLU(4), cases.maps(2, 4, 5, 5, count=2)),
        providers=("eager",), fused=cases.on_fastres, train=True,
    )  # fmt: skip
    prepared = harness.prepare(case)
    # output, then the gradients of input, residual, weight and bias
    assert [tuple(t.shape) for t in prepared.reference] == [(2, 4, 5, 5)] * 3 + [(4,)] * 2
    task = prepared.task
    expected = torch.autograd.functional.vjp(
        lambda x: torch.relu(
            torch.nn.functional.batch_norm(
                x, None, None, task.module.bn.weight.double(), task.module.bn.bias.double(), True
            )
            + task.inputs[1].double()
        ),
        task.inputs[0].double(),
        task.gradient.double(),
    )
    torch.testing.assert_close(prepared.reference[0], expected[0].detach())
    torch.testing.assert_close(prepared.reference[1], expected[1])


def test_convolutions_are_those_of_resnet50(bench, torchvision):
    model, found = torchvision.models.resnet50().to("meta"), set()

    def record(conv, inputs, output):
        found.add(
            (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0],
             inputs[0].shape[2])
        )  # fmt: skip

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(record)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    ours = bench("cases").convolutions()
    assert {conv[:5] for conv in ours} == found
    assert len(ours) == len({conv.name for conv in ours}) == 24


def test_compile_freezes_the_weights(bench):
    """The convolution's batch norm is gone from what runs, which the option alone did not do."""
    from fastres import compare

    cases = bench("cases")
    module = cases.ConvBNReLU(3, 8, 3).eval()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), compare.compiling(freezing=True):
        frozen = compare.compiled(module)
        first = frozen(images)
        module.bn.weight.mul_(2)
    with torch.no_grad():
        assert torch.equal(frozen(images), first), "folded weights do not follow the parameters"


def test_openvinos_input_outlives_its_set_up(bench):
    """It reads the images where they lie, and holds no reference to them."""
    pytest.importorskip("openvino")
    module = torch.nn.Conv2d(3, 4, 3).eval()
    images = torch.randn(1, 3, 32, 32).bfloat16()
    run = bench("external").openvino(module, (images,), torch.bfloat16)
    others = [torch.full(images.shape, 1e30) for _ in range(64)]
    torch.testing.assert_close(run(), module(images.float()), rtol=0.05, atol=0.05)
    assert len(others) == 64
