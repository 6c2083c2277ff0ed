"""The build: what decides on CUDA, what the extension says of itself, one answer on every CPU."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres.ops

ROOT = Path(__file__).resolve().parent.parent
extension = pytest.importorskip("fastres._C")

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(scope="module")
def build():
    """setup.py as a module: it builds nothing unless run as a script."""
    spec = importlib.util.spec_from_file_location("fastres_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_info():
    info = extension.build_info()
    assert info["version"] == "0.1.0"
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["compiler"]
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capabilities"] == (["DEFAULT", "AVX2", "AVX512"] if X86 else ["DEFAULT"])
    assert info["cuda"] == bool(info["cuda_archs"])


def test_operators_are_registered_for_the_cpu():
    # a trained convolution is two operators there, and there are no chains
    elsewhere = {"conv_bn_relu_training", "bn_relu_moments"}
    elsewhere |= {"bn_relu_conv", "bn_relu_conv_backward"}
    for operator in fastres.ops._SCHEMAS.keys() - elsewhere:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{operator}", "CPU")
        assert "csrc/module.cpp" in torch._C._dispatch_dump(f"fastres::{operator}")


@needs_source
@pytest.mark.parametrize(
    ("setting", "toolkit", "expected"),
    [
        (None, True, True),
        (None, False, False),
        ("auto", True, True),
        ("auto", False, False),
        ("0", True, False),
        ("0", False, False),
        ("1", True, True),
    ],
)
def test_toolkit_and_setting_decide_on_cuda(build, setting, toolkit, expected):
    assert build.decide_cuda(setting, Path("/opt/cuda/bin/nvcc") if toolkit else None) is expected


@needs_source
def test_cuda_without_toolkit_fails_loudly(build):
    with pytest.raises(SystemExit, match="no nvcc was found"):
        build.decide_cuda("1", None)
    with pytest.raises(SystemExit, match="expected auto, 0 or 1, got 'yes'"):
        build.decide_cuda("yes", None)


@needs_source
def test_setup_stops_where_cuda_is_asked_for_in_vain(tmp_path):
    # nothing on PATH but the interpreter, and no nvcc where toolkits usually live
    code = (
        "import pathlib, runpy, sys; sys.argv = ['setup.py', 'build_ext'];"
        "is_file = pathlib.Path.is_file;"
        "pathlib.Path.is_file = lambda p: p.name != 'nvcc' and is_file(p);"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    env = {"PATH": str(tmp_path), "FASTRES_CUDA": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "FASTRES_CUDA=1 asks for the CUDA part, but no nvcc was found" in run.stderr


@needs_source
def test_find_nvcc_prefers_cuda_home(build, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == nvcc.resolve()


@needs_source
@pytest.mark.parametrize(
    ("arch_list", "supported", "expected"),
    [
        (None, None, [("8.0", False), ("9.0a", False), ("10.0", True)]),
        (None, {"80", "90", "90a"}, [("8.0", False), ("9.0a", True)]),
        ("8.6", None, [("8.6", False)]),
        ("8.0;9.0+PTX", None, [("8.0", False), ("9.0a", True)]),
        ("8.9 12.0a", None, [("8.9", False), ("12.0a", False)]),
    ],
)
def test_arch_list(build, arch_list, supported, expected):
    assert build.cuda_archs(arch_list, supported) == expected


@needs_source
def test_arch_list_rejects_what_it_cannot_read(build):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST.*got 'Hopper'"):
        build.cuda_archs("8.0;Hopper")


@needs_source
def test_gencode_flags(build):
    assert build.gencode_flags([("8.0", False), ("9.0a", True)]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@needs_source
def test_cuda_sources_are_compiled_again_only_where_something_changed(build, tmp_path, monkeypatch):
    """With a stand-in for nvcc that notes what it was asked to compile."""
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "csrc/cuda").mkdir(parents=True)
    for name in ("one.cu", "two.cu", "both.cuh"):
        (root / "csrc/cuda" / name).write_text("")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/asked\nfor a; do :; done\ntouch "$4"\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "ROOT", root)

    def compiled(archs=(("8.0", False),)) -> list[str]:
        (tmp_path / "asked").write_text("")
        objects = build.compile_cuda(nvcc, list(archs), out)
        assert objects == [str(out / "one.o"), str(out / "two.o")]
        return sorted(Path(line).name for line in (tmp_path / "asked").read_text().split())

    def touch(name: str) -> None:
        later = max(path.stat().st_mtime for path in out.iterdir()) + 10
        os.utime(root / "csrc/cuda" / name, (later, later))
        for stamp in out.glob("*.cmd"):
            if stamp.stem not in name:
                os.utime(stamp, (later - 5, later - 5))

    assert compiled() == ["one.cu", "two.cu"]
    assert compiled() == []
    assert compiled([("9.0a", False)]) == ["one.cu", "two.cu"]
    touch("both.cuh")
    assert compiled([("9.0a", False)]) == ["one.cu", "two.cu"]


# Runs in a process of its own: the instruction set is chosen once. Prints the one in use and saves
# every operator's results on odd sizes, in both formats.
PROBE = """
import json, sys, torch, fastres.ops
from fastres import _C
ops = torch.ops.fastres
results = []

def values(shape):  # integers, for torch.randn itself differs between instruction sets
    return torch.randint(-300, 301, shape) / 128

for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for fmt in (torch.contiguous_format, torch.channels_last):
        for shape in ((2, 67, 5, 7), (3, 3, 11, 13), (2, 131, 1, 1)):
            torch.manual_seed(0)
            x, r, g = (values(shape).to(dtype).contiguous(memory_format=fmt) for _ in range(3))
            w, b = values((shape[1],)), values((shape[1],))
            stats = torch.zeros(shape[1]), torch.ones(shape[1])
            w, b, *stats = (t.double() if dtype == torch.float64 else t for t in (w, b, *stats))
            y, mean, invstd = ops.bn_relu(x, r, *stats, w, b, True, 0.1, 1e-5, True)
            # the mask comes from fixed data: a flip of a value near zero is no error
            grads = ops.bn_relu_backward(g, x, r, w, b, mean, invstd, True, True, [True] * 3)
            s = ops.add_relu(x, r)
            results += [y, mean, invstd, *stats, *grads, s, ops.add_relu_backward(g, s)]
torch.save(results, sys.argv[1])
print(json.dumps(_C.build_info()["cpu_capability"]))
"""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def probe(path: Path, capability: str) -> tuple[str, list[torch.Tensor]]:
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", PROBE, str(path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), torch.load(path)


@pytest.mark.skipif(not X86, reason="one variant only")
def test_every_instruction_set_gives_the_same_numbers(tmp_path):
    best = torch.backends.cpu.get_cpu_capability()
    sets = ["DEFAULT", "AVX2", "AVX512"][: {"AVX512": 3, "AVX2": 2}.get(best, 1)]
    used, baseline = probe(tmp_path / "DEFAULT", "default")
    assert used == "DEFAULT"
    for name in sets[1:]:
        used, results = probe(tmp_path / name, name.lower())
        assert used == name
        for i, (ours, expected) in enumerate(zip(results, baseline, strict=True)):
            tolerance = TOLERANCE[expected.dtype]
            torch.testing.assert_close(
                ours, expected, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"[{i}] {m}"
            )
