"""The convolution kernels, compiled ahead of time in every shipped tile for every architecture: what
the compiler makes of them. ``python tests/test_triton_conv_aot.py`` rewrites the committed table.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
aot = importlib.import_module("aot")
configs = importlib.import_module("fastres.kernels.configs")
launch = importlib.import_module("interpreting").launchers()
segments = importlib.import_module("fastres.kernels.segments")

TABLE = Path(__file__).parents[1] / "bench/results/triton-aot.md"
# Bytes of shared memory a program may use, and a multiprocessor has; registers it has; threads.
SHARED = {
    80: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # 99: also 8.6, 8.9 and 12.x, by these tiles
SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_RESERVED = 1024  # a program
REGISTERS = 65536
WARPS = 64
MATRIX = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}


class Case(NamedTuple):
    """One kernel in the form that a kind of problem needs most of."""

    name: str
    kind: str
    call: Callable  # of a tile
    load_bits: int = 128
    store_bits: int = 128


def empty(*size, dtype) -> torch.Tensor:
    tensor = torch.empty(size, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if len(size) == 4 else tensor


def parted(*operands, tile, **keywords):
    launch.fprop(*operands, tile=tile._replace(parts=4), **keywords)


def cases(dtype=torch.bfloat16, allow_tf32=False) -> Iterator[Case]:
    """At ResNet-50's shapes with 256 channels, batch 256, and its stem."""
    activation, vector = (functools.partial(empty, dtype=d) for d in (dtype, torch.float32))
    x = activation(256, 256, 14, 14)
    affine = launch.Affine(*(vector(256) for _ in range(3)))
    eval_epilogue = {
        "norm": launch.Norm(*(vector(256) for _ in range(4)), 1e-5),
        "residual": x,
        "relu": True,
    }
    behind = {"residual": x, "behind": launch.Behind(x, affine)}
    tf32 = {"allow_tf32": allow_tf32}
    for size, padding in ((3, (1, 1)), (1, (0, 0))):
        w = activation(256, 256, size, size)
        window = {"padding": padding, **tf32}

        def case(name, kind, launcher, *operands, w=w, window=window, size=size, **keywords):
            return Case(
                f"{name} {size}x{size}", kind,
                lambda tile: launcher(*operands, **window, **keywords, tile=tile),
            )  # fmt: skip

        yield case("dgrad", "plain", launch.dgrad, x, w, x.shape)
        yield case(
            "fprop prologue", "prologue", launch.fprop, x, w, prologue=affine, statistics=True
        )
        for name, form in (("eval", eval_epilogue), ("statistics", {"statistics": True})):
            yield case(f"fprop descriptors {name}", "descriptors", launch.fprop, x, w, **form)
        if size == 1:  # differs in its addresses, and those four load both operands both ways
            continue
        yield case("dgrad descriptors", "descriptors", launch.dgrad, x, w, x.shape)
        yield case("dgrad descriptors masked", "descriptors", launch.dgrad, x, w, x.shape, **behind)
        yield case("fprop eval", "plain", launch.fprop, x, w, **eval_epilogue)
        yield case("fprop statistics", "statistics", launch.fprop, x, w, statistics=True)
        for name, form in (("", {}), (" prologue", {"prologue": affine})):
            yield case(f"fprop parts{name}", "parts", parted, x, w, **form)
        yield case("dgrad masked", "masked", launch.dgrad, x, w, x.shape, **behind)
        yield case("wgrad prologue", "wgrad", launch.wgrad, x, x, w.shape, prologue=affine)
    strided = {"stride": (2, 2), "padding": (1, 1)}
    yield Case(
        "fprop descriptors 3x3/2", "descriptors",
        lambda tile: launch.fprop(
            x, activation(256, 256, 3, 3), **strided, statistics=True, tile=tile
        ),
    )  # fmt: skip
    image, w, map_ = (
        activation(256, 3, 224, 224),
        activation(64, 3, 7, 7),
        activation(256, 64, 112, 112),
    )
    stem = {"stride": (2, 2), "padding": (3, 3), **tf32}
    yield Case(  # an RGB pixel, padded, is 8 bytes
        "fprop stem", "flat",
        lambda tile: launch.fprop(image, w, **stem, statistics=True, tile=tile),
        load_bits=64,
    )  # fmt: skip
    yield Case(
        "wgrad stem", "wgrad",
        lambda tile: launch.wgrad(map_, image, w.shape, **stem, tile=tile),
        store_bits=64,
    )  # fmt: skip


def compiled(case: Case, tile, architecture: int):
    with aot.recorded() as launches:
        case.call(tile)
    return aot.compile_launch(launches[0], architecture)


def matrix() -> Iterator[tuple[int, Case, configs.Tile]]:
    """Every architecture, kernel and shipped tile; 1x1 and strides with the first tile."""
    for architecture in aot.ARCHITECTURES:
        for case in cases():
            tiles = configs.TILES[architecture][case.kind]
            for tile in tiles[:1] if case.name.endswith(("1x1", "3x3/2")) else tiles:
                yield architecture, case, tile


@functools.cache
def row(architecture: int, name: str, tile) -> tuple[str, object]:
    case = next(case for case in cases() if case.name == name)
    binary = compiled(case, tile, architecture)
    programs = min(
        REGISTERS // (-(-binary.registers // 8) * 8 * 32 * binary.warps),
        SHARED_TOTAL[architecture] // (binary.shared + SHARED_RESERVED),
        WARPS // binary.warps,
    )
    shape = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    line = (
        f"| sm_{architecture} | {name} | {shape} | {tile.num_warps} | {tile.num_stages} "
        f"| {binary.registers} | {binary.spills} | {binary.shared / 1024:.0f} | {programs} "
        f"| {programs * binary.warps / WARPS:.0%} |"
    )
    return line, binary


def matrix_instructions(binary) -> dict[str, int]:
    return {name: binary.count(name) for name in ("HMMA", "HGMMA", "UTCHMMA")}


def accesses(binary, opcodes, least: int) -> list[int]:
    """Of at least so many bits."""
    widths = [bits for bits in (64, 128) if bits >= least]
    return [binary.count(f"{opcode}.{bits}") for opcode in opcodes for bits in widths]


@pytest.mark.parametrize(
    "architecture, case, tile", matrix(),
    ids=lambda p: p.name if isinstance(p, Case) else str(p) if isinstance(p, int) else
    "x".join(str(n) for n in p[:6]),
)  # fmt: skip
def test_binary(architecture, case, tile):
    _, binary = row(architecture, case.name, tile)
    assert binary.spills == 0 and binary.stack == 0
    assert binary.shared <= SHARED[architecture]
    # Hopper's and Blackwell's instructions take 64 rows at least
    expected = MATRIX[architecture] if tile.BLOCK_M >= 64 else ("HMMA",)
    found = matrix_instructions(binary)
    assert all(found[name] for name in expected), found
    assert any(accesses(binary, ("STG",), case.store_bits))
    if case.kind == "descriptors":  # both operands come by TMA, nothing through registers
        assert not binary.count("LDGSTS")
        # and as many steps ahead as there are stages: their copies stand before the loop
        assert binary.count("UTMALDG") >= 2 * tile.num_stages
        products = [line for line in binary.sass if line.startswith("HGMMA")]
        assert all(line.split(", ")[1].startswith("gdesc") for line in products)
    else:
        assert any(accesses(binary, ("LDG", "LDGSTS"), case.load_bits))


def test_table():
    """Committed figures are those of the Triton they name; another one compiles otherwise."""
    text = TABLE.read_text()
    if f"Triton {triton.__version__}," not in text:
        pytest.skip(f"the table is of another Triton than {triton.__version__}")
    assert text == table(), f"python tests/{Path(__file__).name} rewrites {TABLE.name}"


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("channels, size", [(64, 56), (128, 28), (512, 7)])
def test_boxes(architecture, channels, size):
    """A kernel is compiled for its boxes, which other maps than the table's have."""
    x, w = (
        empty(*of, dtype=torch.bfloat16)
        for of in ((256, channels, size, size), (channels, channels, 3, 3))
    )
    tiles = configs.TILES[architecture]["descriptors"]
    tile = next(tile for tile in tiles if tile.BLOCK_N <= channels)
    call = functools.partial(launch.fprop, x, w, padding=(1, 1), statistics=True)
    binary = compiled(Case("", "descriptors", lambda tile: call(tile=tile)), tile, architecture)
    assert binary.spills == 0 and binary.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_fp16(architecture):
    case = next(case for case in cases(torch.float16) if case.kind == "prologue")
    binary = compiled(case, configs.TILES[architecture]["prologue"][0], architecture)
    assert binary.spills == 0 and binary.count("STG.128")
    assert all(matrix_instructions(binary)[name] for name in MATRIX[architecture])


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_groups_and_strides(architecture, monkeypatch):
    """ResNeXt's 32 groups of 4, and every parity class of a strided dgrad, in the tiles chosen."""
    monkeypatch.setattr(configs, "architecture", lambda device: architecture)
    activation = functools.partial(empty, dtype=torch.bfloat16)
    x, w = activation(256, 128, 56, 56), activation(128, 4, 3, 3)
    window = {"padding": (1, 1), "groups": 32}
    with aot.recorded() as launches:
        launch.fprop(x, w, **window)
        launch.dgrad(x, w, x.shape, **window)
        launch.wgrad(x, x, w.shape, **window)
        dy = activation(256, 128, 28, 28)
        for size, padding in ((3, (1, 1)), (1, (0, 0))):
            filters = activation(128, 128, size, size)
            launch.dgrad(dy, filters, x.shape, stride=(2, 2), padding=padding)
    assert len(launches) == 3 + 4 + 4
    for made in launches:
        binary = aot.compile_launch(made, architecture)
        loads = binary.count("LDG.128") + binary.count("LDGSTS.128")
        assert binary.spills == 0 and binary.count("STG.128")
        # three classes of a 1x1 with stride 2 only write zeros
        assert bool(loads) == (made.keywords["R"] > 0)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_a_single_image(architecture, monkeypatch):
    """ResNet-50's last stages in the shipped choice: small tiles, and a depth in parts, whose sums
    are loaded 16 bytes a thread and all at once."""
    monkeypatch.setattr(configs, "architecture", lambda device: architecture)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    activation = functools.partial(empty, dtype=torch.bfloat16)
    norm = [empty(512, dtype=torch.float32) for _ in range(4)]
    names = []
    for size, channels, taps in ((7, 512, 3), (7, 2048, 1), (14, 512, 1)):
        x, w, y = (
            activation(*of)
            for of in (
                (1, channels, size, size), (512, channels, taps, taps), (1, 512, size, size),
            )
        )  # fmt: skip
        with aot.recorded() as launches:
            launch.fprop(
                x, w, padding=(taps // 2, taps // 2), norm=launch.Norm(*norm, 1e-5), residual=y,
                relu=True,
            )  # fmt: skip
        for made in launches:
            names.append(made.kernel.fn.__name__)
            binary = aot.compile_launch(made, architecture)
            assert binary.spills == 0 and binary.stack == 0
            if names[-1] == "finish_parts_kernel":
                moves = [
                    line.split()[0] for line in binary.sass if line[:3] in ("LDG", "FAD", "BRA")
                ]
                together = ["LDG.E.128"] * made.keywords["TOGETHER"]
                assert any(moves[i : i + len(together)] == together for i in range(len(moves)))
                continue
            assert binary.count("LDG.128") + binary.count("LDGSTS.128")
            assert binary.count("STG.128") and any(matrix_instructions(binary).values())
    assert names[:2] == ["fprop_kernel", "finish_parts_kernel"] and len(names) >= 4


@pytest.mark.parametrize("allow_tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("kind", ["plain", "prologue", "masked", "wgrad"])
def test_fp32(kind, allow_tf32):
    case = next(case for case in cases(torch.float32, allow_tf32) if case.kind == kind)
    binary = compiled(case, configs.FP32_TILES["tf32" if allow_tf32 else "ieee"][0], 80)
    assert binary.spills == 0 and binary.shared <= SHARED[80]
    assert bool(binary.count("HMMA")) == allow_tf32


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_merging(architecture):
    """What a large map's statistics and a small weight's splits go through."""
    wide = empty(6272, 4096, dtype=torch.float32)
    with aot.recorded() as launches:
        segments.merge_moments(segments.Moments.empty(wide, 6272, 64), lambda kernel: kernel)
        segments.merge_sums(wide, 1, torch.bfloat16, lambda kernel: kernel)
    assert len(launches) == 2
    for made in launches:
        binary = aot.compile_launch(made, architecture)
        assert binary.spills == 0 and binary.count("LDG.128")


def table() -> str:
    lines = [row(architecture, case.name, tile)[0] for architecture, case, tile in matrix()]
    head = f"""# The convolution kernels as compiled

bf16, 256 channels (the stem: 3 to 64), Triton {triton.__version__}, no GPU involved. Registers a
thread, KB of shared memory a program; how many programs fit a multiprocessor by registers, shared
memory and warps, and the share of its warps they are.

| | kernel | tile | warps | stages | registers | spills | shared | programs | occupancy |
|---|---|---|---|---|---|---|---|---|---|
"""
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(table())
