"""Plots of the benchmarks' results: bars of ratios for each family, and the roofline."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "fastres-cpu": "#1b6ca8",
    "fastres-cpu-channels_last": "#6baed6",
    "compile": "#bdbdbd",
    "compile-freezing": "#8c8c8c",
    "onnxruntime": "#e6a03c",
    "openvino": "#b5651d",
}
OTHER_COLOR = "#7a5195"
CEILING = {"float32": "fp32_gflops", "bfloat16": "bf16_gflops"}


def draw(results: dict, folder: Path) -> list[str]:
    """Write the plots into ``folder``; returns their names."""
    families: dict[str, list[dict]] = {}
    for entry in results["benchmarks"]:
        if "ratio" not in entry:
            continue
        families.setdefault(entry["family"], []).append(entry)
    names = [bars(family, entries, folder) for family, entries in families.items()]
    names += roofline(results, folder)
    return [name for name in names if name]


def bars(family: str, entries: list[dict], folder: Path) -> str:
    """Speed-up over eager of every provider, case by case; a thin line spans p20 to p80."""
    shown = [entry for entry in entries if entry["provider"] != "eager"]
    if not shown:
        return ""
    cases = list(dict.fromkeys(entry["case"] for entry in shown))
    providers = sorted(
        {entry["provider"] for entry in shown}, key=lambda name: list(COLORS).index(name)
        if name in COLORS else len(COLORS),
    )  # fmt: skip
    thickness = 0.8 / len(providers)
    height = 1.2 + len(cases) * max(0.16 * len(providers), 0.3)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    for index, provider in enumerate(providers):
        found = {entry["case"]: entry["ratio"] for entry in shown if entry["provider"] == provider}
        positions = [cases.index(case) + (index + 0.5) * thickness - 0.4 for case in found]
        ratios = list(found.values())
        medians = [ratio["median"] for ratio in ratios]
        axes.barh(
            positions, medians, thickness * 0.92, label=provider,
            color=COLORS.get(provider, OTHER_COLOR),
        )  # fmt: skip
        axes.hlines(
            positions, [r["p20"] for r in ratios], [r["p80"] for r in ratios],
            color="black", linewidth=0.6,
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("times faster than eager PyTorch")
    axes.set_title(family)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _save(figure, folder, f"{family}.png")


def roofline(results: dict, folder: Path) -> list[str]:
    """Convolutions against the arithmetic ceilings, one panel a dtype, and the element-wise
    operators against the bandwidth of a copy. Bytes are those that must move at least, so maps
    that stay in a cache may lie above the line."""
    ceilings = results["machine"]["ceilings"]
    entries = [entry for entry in results["benchmarks"] if entry.get("bytes")]
    names = []
    arithmetic = [entry for entry in entries if entry["flops"]]
    if arithmetic:
        dtypes = [name for name in CEILING if any(e["dtype"] == name for e in arithmetic)]
        figure, panels = plt.subplots(
            1, len(dtypes), figsize=(5.2 * len(dtypes), 4.4), layout="constrained", squeeze=False
        )
        for axes, dtype in zip(panels[0], dtypes, strict=True):
            _arithmetic_panel(axes, [e for e in arithmetic if e["dtype"] == dtype], dtype, ceilings)
        panels[0][0].set_ylabel("GFLOP/s")
        names.append(_save(figure, folder, "roofline.png"))
    elementwise = [entry for entry in entries if not entry["flops"]]
    if elementwise:
        figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
        _bandwidth_panel(axes, elementwise, ceilings["copy_gbs"])
        names.append(_save(figure, folder, "bandwidth.png"))
    return names


def _arithmetic_panel(axes, entries: list[dict], dtype: str, ceilings: dict) -> None:
    peak, copy = ceilings[CEILING[dtype]], ceilings["copy_gbs"]
    _scatter(axes, entries, lambda e: e["flops"] / e["bytes"], lambda e: e["flops"] / 1e9)
    left, right = axes.get_xlim()
    corner = min(max(peak / copy, left), right)
    axes.plot(
        [left, corner, right], [copy * left, min(peak, copy * corner), peak], color="black",
        linewidth=1, label=f"ceiling: {peak:.0f} GFLOP/s, {copy:.0f} GB/s",
    )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_xlabel("flop per byte")
    axes.set_title(f"convolutions, {dtype}")
    axes.legend(fontsize=7, frameon=False)


def _bandwidth_panel(axes, entries: list[dict], copy: float) -> None:
    _scatter(axes, entries, lambda e: e["bytes"] / 1e6, lambda e: e["bytes"] / 1e9)
    axes.axhline(copy, color="black", linewidth=1, label=f"copy: {copy:.0f} GB/s")
    axes.set_xlabel("MB that must move")
    axes.set_ylabel("GB/s")
    axes.set_title("batch norm, addition, ReLU")
    axes.legend(fontsize=7, frameon=False)


def _scatter(axes, entries: list[dict], x, work) -> None:
    for provider in dict.fromkeys(entry["provider"] for entry in entries):
        found = [entry for entry in entries if entry["provider"] == provider]
        axes.scatter(
            [x(entry) for entry in found],
            [work(entry) / entry["seconds"]["median"] for entry in found],
            s=14, label=provider, color="#d62728" if provider == "eager" else
            COLORS.get(provider, OTHER_COLOR),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")


def _save(figure, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=110)
    plt.close(figure)
    return name
