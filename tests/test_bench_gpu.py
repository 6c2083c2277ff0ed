"""``bench/gpu.py`` without a GPU: the schedule, the processes, every section's code on small shapes
under Triton's interpreter with a clock of its own, and the report."""

import dataclasses
import importlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreting import interpreted

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def gpubench():
    """Gives a module of the package, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        before = set(sys.modules)
        yield lambda name: importlib.import_module(f"gpubench.{name}")
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCH)):
                del sys.modules[name]


class FakeDevice:
    """On the CPU. Every call really runs, once; the n-th one to be timed takes n milliseconds."""

    device = torch.device("cpu")

    def __init__(self, times):
        self.times, self.count = times, 0

    def time(self, call, seconds=0.05):
        call()
        self.count += 1
        return self.times(float(self.count), self.count * 0.9, self.count * 1.1, 7)

    @staticmethod
    def captured(call):
        return call

    @staticmethod
    def empty_cache():
        pass


@pytest.fixture
def device(gpubench):
    return FakeDevice(gpubench("device").Times)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def rows():
    found = []
    return SimpleNamespace(all=found, emit=lambda **row: found.append(row))


# --- the schedule ---------------------------------------------------------------------------------


def sections(gpubench, *limits):
    section = gpubench("schedule").Section
    return [section(f"s{i}", least, most, "") for i, (least, most) in enumerate(limits)]


def scheduled(gpubench, limits, seconds, takes):
    """Each section's limit, when it takes ``takes`` seconds, or its limit if that is less."""
    schedule, clock, given = gpubench("schedule"), Clock(), []

    def start(section, limit):
        given.append(limit)
        spent = min(limit, takes[section.name])
        clock.now += spent
        state = "done" if spent == takes[section.name] else "timed out"
        return schedule.Outcome(section.name, state, spent)

    outcomes = schedule.run(
        sections(gpubench, *limits), seconds, start, lambda outcomes: None, clock
    )
    return given, [outcome.state for outcome in outcomes], clock.now


def test_a_section_gets_what_the_later_ones_can_spare(gpubench):
    kept = gpubench("schedule").REPORT_SECONDS
    given, states, spent = scheduled(
        gpubench, [(10, 50), (20, 30), (40, 100)], 100 + kept, {"s0": 5, "s1": 99, "s2": 99}
    )
    assert given == [40, 30, 65] and spent == 100
    assert states == ["done", "timed out", "timed out"]


def test_every_section_that_hangs_still_leaves_the_others_their_least(gpubench):
    names = [(s.least, s.most) for s in gpubench("sections").SECTIONS.values()]
    takes = {f"s{i}": 1e9 for i in range(len(names))}
    given, states, spent = scheduled(gpubench, names, 540, takes)
    assert spent <= 540 - gpubench("schedule").REPORT_SECONDS
    assert set(states) == {"timed out"}
    assert all(limit >= least for limit, (least, _) in zip(given, names, strict=True))


def test_no_time_left(gpubench):
    kept = gpubench("schedule").REPORT_SECONDS
    _, states, _ = scheduled(gpubench, [(10, 10), (50, 50)], 30 + kept, {"s0": 20, "s1": 1})
    assert states == ["timed out", "no time left"]


def test_sections_name_what_exists(gpubench):
    for section in gpubench("sections").SECTIONS.values():
        assert callable(section.load()), section.name


def test_shares_are_of_the_time_left(gpubench):
    clock = Clock()
    shares = gpubench("schedule").Budget(12.0, clock).share("abcd")
    given = []
    for thing, seconds in shares:
        given.append((thing, seconds))
        clock.now += 4.5
    assert given == [("a", 3.0), ("b", 2.5), ("c", 1.5)] and shares.left_out == ["d"]


# --- processes ------------------------------------------------------------------------------------


def started(gpubench, tmp_path, body: str, limit: float):
    script = tmp_path / "child.py"
    head = "import sys, time, subprocess\nrows = open(sys.argv[4], 'w')\n"
    script.write_text(head + body)
    start = gpubench("process").Starter(script, tmp_path / "out")
    return start(gpubench("schedule").Section("s", 1, 1, ""), limit)


def test_results_of_a_section_that_fails_are_kept(gpubench, tmp_path):
    outcome = started(
        gpubench, tmp_path,
        "print('{\"case\": 1}', file=rows, flush=True)\nraise ValueError('lost')", 60,
    )  # fmt: skip
    assert outcome.state == "failed" and outcome.rows == [{"case": 1}]
    assert "ValueError: lost" in outcome.tail and not outcome.fine


def test_a_section_is_stopped_with_all_that_it_started(gpubench, tmp_path):
    """Its own child too; a line that was not finished is left out."""
    late = f"import time; time.sleep(6); open({str(tmp_path / 'alive')!r}, 'w')"
    outcome = started(
        gpubench, tmp_path,
        "print('{\"case\": 1}\\n{\"cas', end='', file=rows, flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {late!r}])\ntime.sleep(60)", 3,
    )  # fmt: skip
    assert outcome.state == "timed out" and outcome.rows == [{"case": 1}]
    assert 3 <= outcome.seconds < 20
    time.sleep(5)
    assert not (tmp_path / "alive").exists()


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, BENCH / "gpu.py", "--out", tmp_path / "results"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "results").exists()
    assert "gpu: no CUDA device: torch.cuda.is_available() is False" in done.stderr


def test_programs_are_followed_and_stopped(gpubench):
    follow, read = gpubench("steps").follow, []
    code = "import time; print('one', flush=True); time.sleep({})"
    lines, status = follow([sys.executable, "-c", code.format(0)], 60, read.append)
    assert (lines, status, read) == (["one\n"], 0, ["one\n"])
    begin = time.monotonic()
    lines, status = follow([sys.executable, "-c", code.format(90)], 3)
    assert status is None and time.monotonic() - begin < 60


@pytest.mark.parametrize(
    "output, expected",
    [
        (
            "tests/a.py::one PASSED [ 50%]\ntests/a.py::b[c d] FAILED [100%]\n",
            [
                {"case": "tests/a.py::b[c d]", "bad": "failed"},
                {"case": "all", "passed": 1, "failed": 1},
            ],
        ),
        ("no tests ran\n", [{"case": "all", "bad": "exit code 5: no tests ran"}]),
    ],
)
def test_outcomes_of_the_tests(gpubench, monkeypatch, rows, output, expected):
    steps = gpubench("steps")
    script = (
        f"import sys; sys.stdout.write({output!r}); sys.exit({5 if 'no tests' in output else 1})"
    )
    monkeypatch.setattr(steps, "_pytest", lambda: [sys.executable, "-c", script])
    steps.tests(rows.emit, gpubench("schedule").Budget(60), None)
    assert rows.all == expected


def test_memory_errors_are_counted(gpubench, monkeypatch, rows):
    steps = gpubench("steps")
    said = iter([["ERROR SUMMARY: 3 errors\n"], ["RACECHECK SUMMARY: 0 hazards displayed\n"]])
    monkeypatch.setattr(steps, "_found", lambda tool: tool)
    monkeypatch.setattr(steps, "follow", lambda *args, **keywords: (next(said), 0))
    steps.sanitizer(rows.emit, gpubench("schedule").Budget(60), None)
    assert rows.all == [
        {"case": "memcheck", "errors": 3, "bad": "3 errors"},
        {"case": "racecheck", "errors": 0},
    ]


# --- the measurements, interpreted ----------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted_bench(gpubench):
    """The modules that import kernels, as the interpreter has them."""
    with interpreted():
        yield gpubench
        for name in ("providers", "convolutions", "elementwise", "chains", "models", "warm"):
            sys.modules.pop(f"gpubench.{name}", None)


@pytest.fixture
def budget(gpubench):
    return gpubench("schedule").Budget(1e6)


def test_elementwise(interpreted_bench, device, budget, rows):
    module = interpreted_bench("elementwise")
    module.run(rows.emit, budget, device, [(5, 6, True), (5, 6, False)], 2)
    assert not any(row.get("bad") for row in rows.all), rows.all
    kinds = {row["kind"]: row["bytes"] for row in rows.all}
    map_bytes = 2 * 2 * 5 * 36
    assert kinds == {
        "bn_add_relu eval": 3 * map_bytes, "bn_add_relu training": 4 * map_bytes,
        "bn_add_relu backward": 8 * map_bytes, "add_relu": 3 * map_bytes,
        "add_relu backward": 3 * map_bytes, "bn_relu eval": 2 * map_bytes,
        "bn_relu training": 3 * map_bytes, "bn_relu backward": 5 * map_bytes,
    }  # fmt: skip
    for kind in kinds:
        found = [row["provider"] for row in rows.all if row["kind"] == kind]
        assert found == ["eager", "fastres-triton"]


def test_convolutions(interpreted_bench, device, budget, rows, monkeypatch):
    """In fp16, which the interpreter multiplies rightly."""
    module = interpreted_bench("convolutions")
    monkeypatch.setattr(torch, "bfloat16", torch.float16)
    shape = importlib.import_module("cases").Convolution(16, 24, 1, 1, 5)
    other = shape._replace(kernel=3, stride=2, relu=False)
    module.run(rows.emit, budget, device, [shape, other], 2)
    failed = {row["provider"] for row in rows.all if row.get("bad")}
    assert failed <= {"cuDNN fused"}, rows.all  # there is no cuDNN on a CPU
    chain = ("bn_relu_conv", "bn_relu_conv_dgrad", "bn_relu_conv_wgrad")
    for what in ("eval", "training", "dgrad", "wgrad", *chain):
        mine = [row for row in rows.all if row["pass"] == what and row["case"] == shape.name]
        assert {"eager", "fastres-triton", "fastres-triton tuned"} <= {r["provider"] for r in mine}
        assert {row["flops"] for row in mine} == {2 * 2 * 25 * 24 * 16}
    single = [r for r in rows.all if r["pass"] == "eval, one image" and r["case"] == shape.name]
    assert {"eager", "fastres-triton"} < {row["provider"] for row in single}
    assert {row["flops"] for row in single} == {2 * 25 * 24 * 16}
    assert {row["class"] for row in rows.all} == {"1x1 c16", "3x3/2 c16"}


def test_a_wrong_result_is_not_timed(interpreted_bench, device, rows):
    measure = interpreted_bench("measured").measure
    truth = torch.ones(5)
    for factor in (1.0, 1.1, float("nan")):
        measure(
            rows.emit, device, lambda factor=factor: truth * factor, truth=truth, allowed=0.01,
            seconds=1, case=str(factor),
        )  # fmt: skip
    assert ["ms" in row for row in rows.all] == [True, False, False]
    assert rows.all[1]["bad"] == "wrong: relative error 1.0e-01 > 1.0e-02"

    def broken():
        raise RuntimeError("no such kernel\nand more")

    measure(rows.emit, device, broken, truth=truth, allowed=0.01, seconds=1, case="broken")
    assert rows.all[-1] == {"case": "broken", "bad": "RuntimeError: no such kernel"}


class Small(torch.nn.Module):
    """A convolution, batch norm and ReLU, and a classifier of ten."""

    def __init__(self):
        super().__init__()
        import fastres

        self.body = fastres.nn.ConvBNReLU(3, 10, 3, padding=1)

    def forward(self, x):
        return self.body(x).mean((2, 3))


def test_models(interpreted_bench, device, budget, rows):
    module = interpreted_bench("models")
    module.run(rows.emit, budget, device, (2, 1), 8, Small())
    assert not any(row.get("bad") for row in rows.all), rows.all
    cases = {row["case"]: row["images"] for row in rows.all}
    assert cases == {
        "ResNet-50 training step batch 2": 2, "ResNet-50 eval batch 2": 2,
        "ResNet-50 eval batch 1": 1,
    }  # fmt: skip
    trained = {row["provider"] for row in rows.all if "training" in row["case"]}
    assert {"fastres-triton", "fastres-triton, sites apart"} <= trained
    providers = [row["provider"] for row in rows.all if row["images"] == 1]
    assert providers == [
        "eager", "fastres-triton", "fastres-triton, its convolutions",
        "fastres-triton, its convolutions tuned",
    ]  # fmt: skip


def test_chains(interpreted_bench, device, budget, rows):
    """The same gradient either way, and less that is kept: all but the maps between convolutions."""
    interpreted_bench("chains").run(rows.emit, budget, device, [(4, 5)], 2)
    assert not any(row.get("bad") for row in rows.all), rows.all
    kept = {row["provider"]: row["kept_mb"] for row in rows.all}
    for name in ("fastres-triton", "fastres-triton, its convolutions"):
        apart = kept[f"{name}, sites apart"]
        assert apart - kept[name] == pytest.approx(2 * 2 * 4 * 25 * 2 / 1e6)


def test_ceilings(gpubench, device, budget, rows):
    gpubench("ceilings").run(rows.emit, budget, device, 10**6, 64)
    assert rows.all[0]["gbs"] == pytest.approx(2 * 10**6 / 1e-3 / 1e9)
    assert rows.all[1]["tflops"] == pytest.approx(2 * 64**3 / 2e-3 / 1e12)


def test_what_the_sanitizer_runs(interpreted_bench, monkeypatch):
    """Every kernel of the package is among it."""
    small, ran = interpreted_bench("small"), set()
    import triton

    interpreter = importlib.import_module("triton.runtime.interpreter")
    call = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__",
        lambda self, *args, **keywords: (ran.add(self.fn.__name__), call(self, *args, **keywords)),
    )  # fmt: skip
    split = (72, 5, 24, 3, 1, 1)  # on as many multiprocessors as an H200 has
    monkeypatch.setattr(sys.modules["fastres.kernels.configs"], "multiprocessors", lambda _: 132)
    monkeypatch.setattr(small, "CONVOLUTIONS", (*small.CONVOLUTIONS[1:3], split))
    small.main("cpu", (torch.float32,))
    assert triton and ran >= {
        "add_relu_kernel", "add_relu_backward_kernel", "moments_kernel", "finish_moments_kernel",
        "frozen_moments_kernel", "apply_kernel", "backward_sums_kernel", "finish_sums_kernel",
        "backward_apply_kernel", "fprop_kernel", "finish_parts_kernel", "dgrad_kernel", "wgrad_kernel",
    }  # fmt: skip


# --- the report -----------------------------------------------------------------------------------

DEVICE = {
    "name": "NVIDIA T", "slug": "nvidia-t", "capability": "9.0", "multiprocessors": 132,
    "memory_gb": 80.0, "torch": "2", "cuda": "13", "cudnn": 9, "triton": "3", "driver": "5",
}  # fmt: skip


def outcomes(gpubench):
    outcome = gpubench("schedule").Outcome
    convolution = {"pass": "eval", "flops": 4 * 10**12, "bytes": 10**9}
    rival = "fastres-triton, cuDNN's convolution"
    return [
        outcome("ceilings", "done", 3, [{"case": "copy", "ms": 1, "gbs": 2000.0},
                                        {"case": "matrix", "ms": 1, "tflops": 500.0}]),
        outcome("tests", "failed", 9, [{"case": "a::b", "bad": "failed"},
                                       {"case": "all", "passed": 7, "failed": 1}], "the tail"),
        outcome("elementwise", "done", 3, [
            {"case": "64x56x56", "kind": "add_relu", "provider": "eager", "ms": 2.0, "bytes": 2 * 10**9, "map_bytes": 10**8},
            {"case": "64x56x56", "kind": "add_relu", "provider": "fastres-triton", "ms": 1.25, "bytes": 2 * 10**9, "map_bytes": 10**8},
        ]),
        outcome("convolutions", "timed out", 3, [
            {**convolution, "case": case, "class": name, "provider": provider, "ms": ms}
            for case, name, ours, theirs in (
                ("a", "1x1 c64", 10.0, 11.0), ("b", "1x1 c64", 10.0, 10.5),
                ("c", "3x3 c64", 10.0, 11.0), ("d", "3x3 c64", 12.0, 11.0),
            )
            for provider, ms in (("eager", 20.0), ("fastres-triton", ours), (rival, theirs))
        ] + [{**convolution, "case": "e", "class": "1x1 c128", "provider": "fastres-triton", "bad": "x"}]),
    ]  # fmt: skip


def test_report(gpubench, tmp_path):
    report, found = gpubench("report"), outcomes(gpubench)
    report.write(DEVICE, found, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "2000 GB/s (copy), 500 TFLOP/s (bf16 product)" in text
    assert "| 64x56x56 | 2.000 (50 %) | 1.250 (80 %) |" in text
    assert "| a | 20.000 (40 %) | 10.000 (80 %) | 11.000 (73 %) |" in text
    assert "| tests | a::b |  | failed |" in text and "the tail" in text
    assert "`pytest -m gpu`: 7 passed, 1 failed." in text
    assert "least 85 % of the copy bandwidth | 80 to 80 % |" in text
    assert "ahead of eager | at 4 of 4 shapes, 1.67 at the worst |" in text
    assert "cuDNN's convolution alone" not in text.split("## Goals")[1].split("##")[0]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [s["state"] for s in kept["sections"]] == ["done", "failed", "done", "timed out"]
    assert kept["sections"][3]["rows"] == found[3].rows


def test_what_to_put_into_the_table(gpubench, tmp_path):
    """A class in which one shape is slower, or failed, or has no rival's time, is not served."""
    report = gpubench("report")
    report.write(DEVICE, outcomes(gpubench), tmp_path)
    table = runpy.run_path(str(tmp_path / "conv_choice.py"))["SERVED"][(90, "half")]
    assert table["eval"] == {"1x1 c64"} and not table["dgrad"]
    chain = {"bn_relu_conv", "bn_relu_conv_dgrad", "bn_relu_conv_wgrad"}
    assert table.keys() == {"eval", "eval, one image", "training", "dgrad", "wgrad", *chain}


def test_what_auto_should_take(gpubench, tmp_path):
    """A backend that is as fast as PyTorch's at every shape; in training forward and backward count
    together, and Triton's backend may take cuDNN's convolution."""
    tables = gpubench("tables")

    def rows(what, name, case, **ms):
        names = {"cuda": "fastres-cuda", "triton": "fastres-triton", "vendor": tables.VENDORS}
        return [
            {"pass": what, "class": name, "case": case, "provider": names.get(p, p), "ms": t}
            for p, t in ms.items()
        ]

    convolutions = [
        *rows("eval", "1x1 c64", "a", eager=3, vendor=2, cuda=1.0, triton=1.5),
        *rows("eval", "1x1 c64", "b", eager=3, vendor=2, cuda=1.9, triton=1.5),
        *rows("eval", "3x3 c64", "c", eager=3, vendor=2, cuda=1.0, triton=1.5),
        *rows("eval", "3x3 c64", "d", eager=3, vendor=2, cuda=2.1, triton=1.5),
        *rows("eval", "3x3/2 c64", "e", eager=3, vendor=2, cuda=2.5, triton=2.5),
        *rows("eval", "7x7/2 c2", "f", eager=3, vendor=2, triton=2.5),
        *rows("eval, one image", "1x1 c64", "a", eager=3, vendor=2, cuda=2.5, triton=1),
        *rows("training", "1x1 c64", "a", eager=5, vendor=4, cuda=3, triton=3),
        *rows("dgrad", "1x1 c64", "a", eager=2, cuda=3, triton=9),
        *rows("wgrad", "1x1 c64", "a", eager=2, cuda=2.5, triton=1),
        *rows("training", "3x3 c64", "c", eager=5, vendor=4, cuda=1),
        *rows("dgrad", "3x3 c64", "c", eager=2, cuda=1),
    ]
    elementwise = [
        {"kind": kind, "case": "x", "provider": provider, "ms": ms}
        for kind, times in {"add_relu": (2, 1), "bn_relu eval": (2, 1), "bn_relu backward": (1, 2)}.items()
        for provider, ms in zip(("eager", "fastres-cuda"), times, strict=True)
    ]  # fmt: skip
    path = tmp_path / "choice.py"
    path.write_text(tables.choice(DEVICE, elementwise, convolutions))
    assert runpy.run_path(str(path))["FASTEST"] == {(9, 0): {
        "add_relu": "cuda",
        "eval": {"1x1 c64": "cuda", "3x3 c64": "triton", "3x3/2 c64": "triton", "7x7/2 c2": "triton"},
        "eval, one image": {"1x1 c64": "triton"},
        "training": {"1x1 c64": "triton"},
    }}  # fmt: skip


def test_plots(gpubench, tmp_path):
    pytest.importorskip("matplotlib")
    names = gpubench("report").draw(outcomes(gpubench), tmp_path)
    assert names == ["elementwise-add_relu.png", "convolutions-eval.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_bad_result_makes_the_run_bad(gpubench):
    done, failed, *_ = outcomes(gpubench)
    assert done.fine and not failed.fine
    assert not dataclasses.replace(done, rows=[{"bad": "wrong"}]).fine


def test_goals_of_models(gpubench):
    """The best of fastres' own against each rival; what was not measured is not judged."""
    eval_case, train_case = "ResNet-50 eval batch 32", "ResNet-50 training step batch 256"
    models = [
        {"case": case, "provider": provider, "ms": ms}
        for case, provider, ms in (
            (eval_case, "eager", 9.0), (eval_case, "fastres-triton", 6.0),
            (eval_case, "fastres-cuda", 5.0), (eval_case, gpubench("goals").COMPILED, 7.0),
            (train_case, "eager", 30.0), (train_case, "fastres-triton", 25.0),
        )
    ] + [{"case": train_case, "provider": "torch.compile", "bad": "slow"}]  # fmt: skip
    lines = gpubench("goals").reached([], [], models, lambda row: None)
    assert lines == [
        (f"{eval_case}: at least 1.2x {gpubench('goals').COMPILED}", "1.40 (fastres-cuda)"),
        (f"{train_case}: at least 1.5x eager", "1.20 (fastres-triton)"),
    ]
