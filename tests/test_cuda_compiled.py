"""What the CUDA compiler made of the kernels, read from the built extension; no GPU is needed."""

import functools
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import emulating
import pytest

import fastres.ops

extension = pytest.importorskip("fastres._C")
pytestmark = pytest.mark.skipif(
    not extension.build_info()["cuda"], reason="built without the CUDA part"
)

ARCHITECTURES = [
    "sm_" + arch.removesuffix("+PTX").replace(".", "")
    for arch in extension.build_info()["cuda_archs"]
]
# kernels that see whole activations, as against those that merge a few statistics
WIDE = ("combine_packs", "bn_relu_moments", "bn_relu_apply", "bn_relu_backward_sums",
        "bn_relu_backward_apply")  # fmt: skip
STORES = ("combine_packs", "bn_relu_apply", "bn_relu_backward_apply")


def cuobjdump(*arguments: str) -> str:
    """The toolkit's, which may lack it, or the one that Triton brings along."""
    places = [emulating.setup().toolkit_home(emulating.nvcc()) / "bin"]
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    tool = next((p / "cuobjdump" for p in places if (p / "cuobjdump").is_file()), None)
    if tool is None:
        pytest.skip("no cuobjdump here")
    command = [tool, *arguments, extension.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def usage(architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack, shared and local memory of every kernel, by its mangled name."""
    text = cuobjdump("-res-usage", "-arch", architecture)
    found = re.findall(r"Function (\S+):\n\s*(.+)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)}
        for name, line in found
    }


@functools.cache
def listing(architecture: str) -> dict[str, list[str]]:
    """Each kernel's instructions with their modifiers, by its mangled name."""
    kernels, found = {}, []
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            found = kernels.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found.append(match[1])
    return kernels


@functools.cache
def instructions(architecture: str) -> dict[str, Counter]:
    """How often each kernel has each of them."""
    return {name: Counter(found) for name, found in listing(architecture).items()}


def most_loads_at_once(names: list[str]) -> int:
    """The longest run of loads of 16 bytes with no store or jump back between them."""
    marks = "".join(
        "L" if name.startswith("LDG") and "128" in name else "S"
        for name in names
        if name.startswith(("LDG", "STG", "BRA"))
    )
    return max(map(len, re.findall("L+", marks)), default=0)


def count(counter: Counter, opcode: str, *modifiers: str) -> int:
    return sum(
        n
        for name, n in counter.items()
        if name.split(".")[0] == opcode and set(modifiers) <= set(name.split("."))
    )


def vectorised(name: str) -> bool:
    """Forms for packs of 16 bytes: of 8, 4 or 2 values."""
    return "combine_packs" in name or re.search(r"Li[842]EL", name) is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture):
    kernels = usage(architecture)
    assert any("bn_relu_backward_apply" in name for name in kernels)
    for name, used in kernels.items():
        if "fastres" not in name:
            continue
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (name, used)
        # with a prologue one block has a multiprocessor to itself there, see portable_blocks()
        alone = architecture in ("sm_90a", "sm_100") and re.search(r"conv_fprop_sm80\w*ELb1E", name)
        assert used["REG"] <= (168 if "_sm90" in name or alone else 128), (name, used)
        assert used["SHARED"] <= 48 << 10, (name, used)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_accesses_and_no_local_memory(architecture):
    seen = Counter()
    for name, counter in instructions(architecture).items():
        if "fastres" not in name:
            continue
        assert count(counter, "LDL") == count(counter, "STL") == 0, name
        stem = next((wide for wide in WIDE if wide in name), None)
        if stem is None or not vectorised(name):
            continue
        seen[stem] += 1
        assert count(counter, "LDG", "128"), name
        if stem in STORES:
            assert count(counter, "STG", "128"), name
    assert set(seen) == set(WIDE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_are_under_way_together(architecture):
    """One load of 16 bytes a thread does not keep a memory busy that answers after a microsecond."""
    for name, names in listing(architecture).items():
        if "bn_relu" in name and any(w in name for w in WIDE) and re.search("Li[842]ELb1", name):
            assert most_loads_at_once(names) >= 4, name


@pytest.mark.skipif("sm_90a" not in ARCHITECTURES, reason="not built for 9.0")
@pytest.mark.parametrize("stem, forms", [
    ("conv_fprop_sm90", 20),  # two types, three widths, two epilogues; two widths masked, prologue
    ("conv_wgrad_sm90", 12),  # two types, three widths, with a prologue and without
    ("conv_split_sm90", 2),  # two types
])  # fmt: skip
def test_the_convolutions_use_hoppers_units(stem, forms):
    found = {k: v for k, v in instructions("sm_90a").items() if stem in k}
    assert len(found) == forms
    for name, counter in found.items():
        assert count(counter, "HGMMA"), name
        assert count(counter, "UTMALDG", "IM2COL"), name
        split = stem == "conv_split_sm90"
        assert count(counter, "USETMAXREG") == (0 if split else 2), name
        # filters are asked for before the kernel before has ended, which it then waits for
        assert bool(count(counter, "UTMAPF")) == split, name
        assert bool(count(counter, "ACQBULK")) == bool(count(counter, "PREEXIT")) == split, name
        assert count(counter, "SYNCS"), name
        assert bool(count(counter, "UTMASTG")) == (stem == "conv_fprop_sm90"), name
        paired = stem == "conv_fprop_sm90" and "Li64E" not in name
        assert bool(count(counter, "UTMALDG", "MULTICAST")) == paired, name


@pytest.mark.skipif("sm_90a" not in ARCHITECTURES, reason="not built for 9.0")
def test_the_epilogue_is_a_few_instructions_a_pair():
    """Values are rounded and written in pairs, and what scales them comes from shared memory: for
    layers of one or two steps the epilogue, not the memory, would be the limit else."""
    kernels = instructions("sm_90a").items()
    for form, epilogue in [("Li256ELNS0_8EpilogueE0", "FMNMX"), ("Li256ELNS0_8EpilogueE1", None)]:
        (counter,) = (c for k, c in kernels if "bfloat16" in k and form in k)
        pairs = 64  # of a thread
        assert count(counter, "F2FP", "PACK_AB") >= pairs
        assert count(counter, "F2F") == 0
        assert count(counter, "LDG") < pairs / 4
        assert count(counter, "SHFL") == 0
        assert epilogue is None or count(counter, epilogue, "NAN") >= 2 * pairs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_portable_convolution_uses_tensor_cores(architecture):
    found = {k: v for k, v in instructions(architecture).items() if "conv_fprop_sm80" in k}
    assert len(found) == 16  # two types, two widths, three epilogues and a prologue
    for name, counter in found.items():
        filters = int(re.search(r"Li(\d+)E", name)[1])
        assert count(counter, "HMMA", "16816", "F32") >= filters // 4, name
        assert count(counter, "LDSM", "4"), name
        assert count(counter, "LDGSTS", "128"), name  # the copies that registers do not see
        assert count(counter, "STG", "128"), name


def test_every_operator_has_a_cuda_kernel():
    # but for the CPU's: the ends of a network, and what writes in place
    of_the_cpu = {"conv_bn_relu_", "conv_bn_relu_pool", "mean_linear"}
    for operator in fastres.ops._SCHEMAS.keys() - of_the_cpu:
        assert fastres.ops.has_kernel(operator, "cuda"), operator


def test_the_extension_names_its_kernels():
    names = extension.build_info()["cuda_kernels"]
    assert {"bn_relu_moments", "bn_relu_apply"} <= set(names)
    assert "conv_fprop_sm80" in names
    for kernel in ("conv_fprop_sm90", "conv_split_sm90", "conv_wgrad_sm90"):
        assert (kernel in names) == ("sm_90a" in ARCHITECTURES)
    info = extension.cuda_info()
    assert info["runtime"] >= 12000 and (info["devices"] or info["error"])
