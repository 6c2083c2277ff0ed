"""Builds ``fastres._C``: the CPU kernels once per instruction set, the CUDA part when wanted.

Environment: ``FASTRES_CUDA=auto|0|1`` (auto: when a CUDA toolkit is found; 1: fail without one),
``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS`` (default 2).
"""

import functools
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
# Instruction sets as ATen names and builds them.
X86_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
# The same once more, with the products of bfloat16.
X86_FLAGS["AVX512_BF16"] = [*X86_FLAGS["AVX512"], "-mavx512bf16", "-DCPU_CAPABILITY_AVX512"]
# GCC 12 sees uninitialised values in its own AVX-512 header (GCC bug 105593).
for isa in ("AVX512", "AVX512_BF16"):
    X86_FLAGS[isa] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0")


class BuildError(SystemExit):
    """Ends the build with one sentence that says what is missing and how to mend it."""

    def __init__(self, message: str):
        super().__init__(f"fastres: {message}")


def import_torch():
    """The installed torch, also from an isolated build, which hides the site-packages it runs on."""
    try:
        import torch
    except ImportError:
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        paths += [site.getusersitepackages()] if site.ENABLE_USER_SITE is not False else []
        sys.path += [path for path in paths if path not in sys.path]
        try:
            import torch
        except ImportError as error:
            raise BuildError(
                f"torch>=2.11 must be installed before fastres, which is compiled against it ({error}). "
                "Install it (https://pytorch.org/get-started/locally), then run this again."
            ) from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        raise BuildError(
            f"torch>=2.11 is needed, found {torch.__version__} in {torch.__path__[0]}."
        )
    return torch


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


# --- CUDA: nvcc is called directly, for torch's CUDAExtension refuses when torch is CPU-only -------


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found]
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def decide_cuda(setting: str | None, nvcc: Path | None) -> bool:
    """Whether to build the CUDA part: FASTRES_CUDA and the toolkit decide, never a GPU."""
    setting = setting or "auto"
    if setting not in ("auto", "0", "1"):
        raise BuildError(f"FASTRES_CUDA: expected auto, 0 or 1, got {setting!r}.")
    if setting == "1" and nvcc is None:
        raise BuildError(
            "FASTRES_CUDA=1 asks for the CUDA part, but no nvcc was found in CUDA_HOME, on PATH or "
            "in /usr/local/cuda. Install the CUDA toolkit or point CUDA_HOME at it."
        )
    return setting != "0" and nvcc is not None


def cuda_archs(arch_list: str | None, supported: set[str] | None = None) -> list[tuple[str, bool]]:
    """``[(architecture, with PTX)]`` from TORCH_CUDA_ARCH_LIST, or the default list.

    9.0 becomes 9.0a, whose wgmma and tensor-map instructions the kernels are written for. Of the
    default list only what the toolkit knows (`supported`, as in ``"90"``) is taken, the newest also
    as PTX so that later GPUs are served.
    """
    if arch_list:
        entries = arch_list.replace(";", " ").split()
    else:
        known = [
            a for a in DEFAULT_CUDA_ARCHS if supported is None or a.replace(".", "") in supported
        ]
        entries = known[:-1] + [f"{a}+PTX" for a in known[-1:]]
    archs = []
    for entry in entries:
        match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {entry!r}."
            )
        arch = "9.0a" if match[1] == "9.0" else match[1]
        archs.append((arch, match[2] is not None))
    return archs


def gencode_flags(archs: list[tuple[str, bool]]) -> list[str]:
    flags = []
    for arch, ptx in archs:
        number = arch.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def toolkit_archs(nvcc: Path) -> set[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"compute_(\w+)", listed.stdout))


def compile_cuda(nvcc: Path, archs, out: Path) -> list[str]:
    """Objects of every csrc/cuda/*.cu, MAX_JOBS at a time; only what changed is compiled again."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc/cuda").glob("*.*h"))
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
    if any(arch == "9.0a" for arch, _ in archs):
        flags.append("-DFASTRES_SM90")  # the kernels that nothing else can run
    flags += gencode_flags(archs)
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, int(os.environ.get("MAX_JOBS", "2")))) as jobs:
        compile_one = functools.partial(_compile_cuda_source, nvcc, flags, newest, out)
        return list(jobs.map(compile_one, sources))


def _compile_cuda_source(nvcc: Path, flags, newest_header: float, out: Path, source: Path) -> str:
    target = out / f"{source.stem}.o"
    command = shlex.join([str(nvcc), "-c", str(source), "-o", str(target), *flags])
    stamp = target.with_suffix(".cmd")  # written last, when the object is whole
    newest = max(newest_header, source.stat().st_mtime)
    fresh = target.exists() and stamp.exists() and stamp.stat().st_mtime > newest
    if not fresh or stamp.read_text() != command:
        print(command, flush=True)
        stamp.unlink(missing_ok=True)
        subprocess.run(shlex.split(command), check=True)
        stamp.write_text(command)
    return str(target)


def toolkit_home(nvcc: Path) -> Path:
    """By nvcc's own account (nvcc may be a wrapper)."""
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=True)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else nvcc.parent.parent


def cudart_directory(nvcc: Path) -> str:
    """Where libcudart_static.a lies."""
    home = toolkit_home(nvcc)
    places = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    for place in places:
        if (place / "libcudart_static.a").is_file():
            return str(place)
    raise BuildError(
        f"{nvcc} has no libcudart_static.a in {', '.join(map(str, places))}. "
        "Complete the CUDA toolkit, or set FASTRES_CUDA=0."
    )


# --- the extension --------------------------------------------------------------------------------


def is_built_for(isa: str, kernel: str) -> bool:
    """Without vectors oneDNN computes every convolution; of bfloat16 there are direct products."""
    if isa == "AVX512_BF16":
        return kernel in (
            "conv_direct_kernel.cpp",
            "conv_grouped_kernel.cpp",
            "conv_wgrad_direct_kernel.cpp",
        )
    return isa != "DEFAULT" or not kernel.startswith("conv_")


def make_build_ext(torch):
    """BuildExtension that compiles csrc/cpu/*_kernel.cpp once per instruction set."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            isas = X86_FLAGS if is_x86() else {"DEFAULT": []}
            files = sorted((ROOT / "csrc/cpu").glob("*_kernel.cpp"))
            for isa, flags in isas.items():
                print(f"fastres: CPU kernels for {isa}", flush=True)
                served = [file for file in files if is_built_for(isa, file.name)]
                ext.extra_objects += self.compiler.compile(
                    [str(file.relative_to(ROOT)) for file in served],
                    output_dir=str(Path(self.build_temp) / isa),
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args
                    + [f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}", *flags],
                    depends=ext.depends,
                )
            if ext.nvcc is not None:
                print("fastres: the CUDA part", flush=True)
                out = Path(self.build_temp) / "cuda"
                ext.extra_objects += compile_cuda(ext.nvcc, ext.archs, out)
                ext.extra_objects += self.compiler.compile(
                    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cpp")),
                    output_dir=str(out),
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args
                    + [f"-isystem{toolkit_home(ext.nvcc) / 'include'}"],
                    depends=ext.depends,
                )
            version = self.distribution.get_version()
            ext.define_macros.append(("FASTRES_VERSION", f'"{version}"'))
            print("fastres: everything else", flush=True)
            super().build_extension(ext)

    return Build


def make_extension(torch) -> Extension:
    from torch.utils.cpp_extension import CppExtension, include_paths

    nvcc = find_nvcc()
    nvcc = nvcc if decide_cuda(os.environ.get("FASTRES_CUDA"), nvcc) else None
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    sources = sorted(str(p.relative_to(ROOT)) for p in sources if not p.stem.endswith("_kernel"))
    archs = cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), toolkit_archs(nvcc)) if nvcc else []
    macros = [("FASTRES_CUDA_ARCHS", '"' + " ".join(a + "+PTX" * ptx for a, ptx in archs) + '"')]
    macros += [("FASTRES_X86", None)] if is_x86() else []
    macros += [("FASTRES_CUDA", None)] if nvcc else []
    system = [*include_paths(), sysconfig.get_path("include")]
    ext = CppExtension(
        "fastres._C",
        sources,
        define_macros=macros,
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")),
        extra_compile_args=CXX_FLAGS + [f"-isystem{path}" for path in system],
        extra_link_args=["-fopenmp", "-Wl,--as-needed"],
    )
    # Listed as system headers above, so that our warnings are about our own code.
    ext.include_dirs = []
    ext.nvcc, ext.archs = nvcc, archs
    if nvcc:
        ext.library_dirs.append(cudart_directory(nvcc))
        ext.libraries += ["cudart_static", "rt", "pthread", "dl"]
    return ext


def main():
    os.environ.setdefault("MAX_JOBS", "2")
    os.chdir(ROOT)
    torch = import_torch()
    setup(ext_modules=[make_extension(torch)], cmdclass={"build_ext": make_build_ext(torch)})


if __name__ == "__main__":
    main()
