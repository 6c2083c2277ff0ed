"""Turns pytest-benchmark's JSON into ``<out>/<device>/``: results.md, plots, the figures in brief.

    python bench/report.py build/bench/raw.json --out bench/results

A ratio is how many times faster than eager PyTorch, in its better memory format, within the same
rounds: the median, and in the plots a line from the 20th to the 80th percentile.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import plots

STATISTICS = ("min", "max", "mean", "median", "iqr", "q1", "q3", "rounds")
# the names behind AMD's family and model numbers, which its cloud processors' names leave out
AMD = {
    23: lambda model: "zen2" if model >= 0x30 else "zen1",
    25: lambda model: "zen4" if model in {*range(0x10, 0x20), *range(0x60, 0xB0)} else "zen3",
    26: lambda model: "zen5",
}

HEADING = """\
{cpu}, {cpu_capability}, {threads} threads. {date}. {versions}.

Ceilings measured in the same run: {fp32_gflops:.0f} GFLOP/s fp32 and {bf16_gflops:.0f} GFLOP/s bf16
(products or convolutions), {copy_gbs:.1f} GB/s (copy).

Figures other than milliseconds are speed-ups over eager PyTorch in its better memory format:
medians over interleaved rounds. The column *eager* times eager against itself: the noise."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--name", default="results", help="of the files, results.md by default")
    parser.add_argument("--out", type=Path, required=True, help="the folder of devices' folders")
    options = parser.parse_args()
    try:
        raw = json.loads(options.json.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"report: {options.json}: {error}")
    results = condense(raw)
    if not results["benchmarks"]:
        sys.exit(f"report: {options.json} holds no measured benchmark of this folder")
    folder = options.out / slug(results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    data = "benchmark" if options.name == "results" else options.name
    (folder / f"{data}.json").write_text(text + "\n")
    images = plots.draw(results, folder)
    page = folder / f"{options.name}.md"
    page.write_text(markdown(results, images))
    print(f"{len(results['benchmarks'])} benchmarks: {page}")
    return 0


def condense(raw: dict) -> dict:
    """The figures without the per-round data, in the order of the run."""
    benchmarks = []
    for entry in raw["benchmarks"]:
        if not {"ratio", "resident_bytes"} & entry["extra_info"].keys():
            continue
        stats = {name: entry["stats"][name] for name in STATISTICS}
        benchmarks.append(_rounded(entry["extra_info"] | {"seconds": stats}))
    return {
        "machine": _rounded(raw["machine_info"]),
        "commit": raw.get("commit_info", {}).get("id"),
        "date": raw["datetime"][:10],
        "benchmarks": benchmarks,
    }


def _rounded(value):
    """Floats to 5 significant digits, all the way down."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def slug(machine: dict) -> str:
    """A folder's name for the processor, the instructions and the threads in use, such as
    ``amd-epyc-zen4-avx512-2c``: virtual machines may hide some of their processor's."""
    name = machine["cpu"]
    numbers = re.search(r"\(family (\d+), model (\d+)\)", name)
    words = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", name).lower()
    if numbers and words.split()[:1] == ["amd"] and int(numbers[1]) in AMD:
        words += " " + AMD[int(numbers[1])](int(numbers[2]))
    return "-".join(
        [
            *re.findall(r"[a-z0-9.]+", words),
            machine["cpu_capability"].lower(),
            f"{machine['threads']}c",
        ]
    )


# --- Markdown ------------------------------------------------------------------------------------


def markdown(results: dict, images: list[str]) -> str:
    timed = [entry for entry in results["benchmarks"] if "ratio" in entry]
    started = [entry for entry in results["benchmarks"] if "resident_bytes" in entry]
    parts = [
        f"# Results: {slug(results['machine'])}",
        heading(results),
        "## Summary",
        summary(timed),
        "## Slower than eager",
        losses(timed),
        *(f"![{image}]({image})" for image in images),
    ]
    for family, cases in by_family(timed).items():
        parts += [f"## {family}", family_table(cases)]
    if started:
        parts += ["## First call and resident memory, batch 1, fp32", start_table(started)]
    return "\n\n".join(parts) + "\n"


def heading(results: dict) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return HEADING.format(
        **machine | machine["ceilings"] | {"versions": versions, "date": results["date"]}
    )


def by_family(benchmarks: list[dict]) -> dict[str, dict[str, dict[str, dict]]]:
    """``{family: {case: {provider: figures}}}``"""
    families: dict = defaultdict(lambda: defaultdict(dict))
    for entry in benchmarks:
        families[entry["family"]][entry["case"]][entry["provider"]] = entry
    return families


def summary(benchmarks: list[dict]) -> str:
    """Per family, mode and dtype: what fastres gains over eager."""
    groups = defaultdict(list)
    for entry in benchmarks:
        if entry["provider"].startswith("fastres"):
            key = (entry["family"], entry["mode"], entry["dtype"], entry["provider"])
            groups[key].append(entry["ratio"]["median"])
    rows = [
        (*key, str(len(found)), f"{statistics.geometric_mean(found):.2f}",
         f"{min(found):.2f}", f"{max(found):.2f}")
        for key, found in groups.items()
    ]  # fmt: skip
    header = ("family", "mode", "dtype", "provider", "cases", "geometric mean", "least", "most")
    return pipe_table(header, rows)


def losses(benchmarks: list[dict]) -> str:
    """Where fastres is slower than eager: the median and the 80th percentile are below 1."""
    rows = [
        (f"{entry['family']} {entry['case']}", entry["provider"], f"{entry['ratio']['median']:.2f}",
         f"{entry['eager_seconds']['median'] * 1e3:.3f}")
        for entry in benchmarks
        if entry["provider"].startswith("fastres")
        and entry["ratio"]["median"] < 1
        and entry["ratio"]["p80"] < 1
    ]  # fmt: skip
    if not rows:
        return "None."
    return pipe_table(("case", "provider", "ratio", "eager ms"), rows)


def family_table(cases: dict[str, dict[str, dict]]) -> str:
    """One row a case; beside the ratios, fastres over each competitor where they ran interleaved,
    and the memory that a training step adds at its peak."""
    providers = list(dict.fromkeys(name for found in cases.values() for name in found))
    against = [
        name for name in providers
        if any("fastres_ratio" in found.get(name, {}) for found in cases.values())
    ]  # fmt: skip
    weighed = [
        name for name in providers
        if any("peak_bytes" in found.get(name, {}) for found in cases.values())
    ]  # fmt: skip
    rows = []
    for case, found in cases.items():
        first = next(iter(found.values()))
        eager = first["eager_seconds"]["median"]
        ratios = [_cell(found.get(name), "ratio") for name in providers]
        faster = [_cell(found.get(name), "fastres_ratio") for name in against]
        peaks = [_mebibytes(first, "eager_peak_bytes")] if weighed else []
        peaks += [_mebibytes(found.get(name), "peak_bytes") for name in weighed]
        rows.append((case, f"{eager * 1e3:.3f}", *ratios, *faster, *peaks))
    header = ["case", "eager ms", *providers, *(f"fastres over {name}" for name in against)]
    header += [f"MiB of {name}" for name in ("eager's step", *weighed)] if weighed else []
    return pipe_table(header, rows)


def start_table(entries: list[dict]) -> str:
    """What a process pays before its second call; see start.py."""
    rows = [
        (entry["case"], entry["provider"], f"{entry['first_call_seconds']:.2f}",
         f"{entry['resident_bytes'] / 2**20:.0f}")
        for entry in entries
    ]  # fmt: skip
    return pipe_table(("model", "provider", "first call, s", "resident MiB"), rows)


def _cell(entry: dict | None, key: str) -> str:
    return f"{entry[key]['median']:.2f}" if entry and key in entry else ""


def _mebibytes(entry: dict | None, key: str) -> str:
    return f"{entry[key] / 2**20:.0f}" if entry and key in entry else ""


def pipe_table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
