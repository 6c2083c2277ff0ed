"""What the sections found, as JSON, Markdown, plots, and as the package's tables."""

import json
from collections import defaultdict
from pathlib import Path

from . import goals, tables
from .schedule import Outcome
from .tables import grouped


def write(device: dict, outcomes: list[Outcome], folder: Path) -> None:
    """Everything but the plots, anew after every section."""
    found = {
        "device": device,
        "sections": [
            {"name": o.name, "state": o.state, "seconds": round(o.seconds, 1), "rows": o.rows}
            for o in outcomes
        ],
    }
    (folder / "gpu.json").write_text(json.dumps(rounded(found), indent=1) + "\n")
    (folder / "results.md").write_text(markdown(device, outcomes))
    if rows := _rows(outcomes, "convolutions"):
        (folder / "conv_choice.py").write_text(tables.conv_choice(device, rows))
        fastest = tables.choice(device, _rows(outcomes, "elementwise"), rows)
        (folder / "choice.py").write_text(fastest)


def rounded(value):
    """Floats to 5 significant digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def ceilings(outcomes: list[Outcome]) -> dict[str, float]:
    """``gbs`` and ``tflops``, those that were measured."""
    rows = {row["case"]: row for row in _rows(outcomes, "ceilings")}
    found = {}
    for case, unit in (("copy", "gbs"), ("matrix", "tflops")):
        if case in rows and unit in rows[case]:
            found[unit] = rows[case][unit]
    return found


def percent(row: dict, limits: dict[str, float]) -> float | None:
    """Of the roofline: the time that the work or the bytes take at the measured ceilings, over the
    time that was taken. Maps that stay in a cache may lie above 100."""
    if "ms" not in row or "bytes" not in row or "gbs" not in limits:
        return None
    least = row["bytes"] / limits["gbs"] / 1e6
    if "flops" in row:
        if "tflops" not in limits:
            return None
        least = max(least, row["flops"] / limits["tflops"] / 1e9)
    return 100 * least / row["ms"]


# --- Markdown -------------------------------------------------------------------------------------


def markdown(device: dict, outcomes: list[Outcome]) -> str:
    limits = ceilings(outcomes)
    versions = ", ".join(f"{k} {device[k]}" for k in ("torch", "cuda", "cudnn", "triton", "driver"))
    parts = [
        f"# {device['name']}",
        (
            f"Capability {device['capability']}, {device['multiprocessors']} multiprocessors, "
            f"{device['memory_gb']} GB; {versions}."
        ),
        "Ceilings measured in the same run: "
        + (", ".join(_ceiling(unit, value) for unit, value in limits.items()) or "none") + ".",
        "## Sections", _table(("section", "state", "seconds", "results"), [
            (o.name, o.state, f"{o.seconds:.0f}", str(len(o.rows))) for o in outcomes
        ]),
    ]  # fmt: skip
    if bad := [(o.name, row) for o in outcomes for row in o.rows if row.get("bad")]:
        parts += ["## Failed", _table(("section", "case", "provider", "what"), [
            (name, row.get("case", ""), row.get("provider", ""), _cell(row["bad"]))
            for name, row in bad
        ])]  # fmt: skip
    for outcome in outcomes:
        if outcome.state != "done" and outcome.tail:
            parts += [f"## Output of {outcome.name}, its end", f"```\n{outcome.tail[-1500:]}\n```"]
    if lines := goals.reached(
        *(_rows(outcomes, name) for name in ("elementwise", "convolutions")),
        _rows(outcomes, "models") + _rows(outcomes, "torch_compile"),
        lambda row: percent(row, limits),
    ):  # fmt: skip
        parts += ["## Goals", _table(("goal", "reached"), lines)]
    if rows := _rows(outcomes, "tests"):
        counts = next((row for row in rows if row.get("case") == "all"), {})
        said = ", ".join(f"{v} {k}" for k, v in counts.items() if isinstance(v, int))
        parts += ["## Tests", f"`pytest -m gpu`: {said or 'no outcome'}."]
    for name, group, title in (
        ("elementwise", "kind", "milliseconds, and % of the copy bandwidth"),
        ("convolutions", "pass", "milliseconds, and % of the roofline"),
    ):
        for key, rows in grouped(_rows(outcomes, name), group).items():
            parts += [f"## {name}: {key}", title.capitalize() + ".", by_provider(rows, limits)]
    if rows := _rows(outcomes, "chains"):
        text = "Milliseconds for forward and backward, and what is kept between them."
        parts += ["## Blocks in training", text, by_provider(rows, limits, _block)]
    if rows := _rows(outcomes, "models") + _rows(outcomes, "torch_compile"):
        parts += ["## Models", "Images a second.", by_provider(rows, limits, _throughput)]
    if rows := _rows(outcomes, "sanitizer"):
        parts += ["## compute-sanitizer", _table(("check", "errors"), [
            (row["case"], str(row.get("errors", row.get("note", row.get("bad"))))) for row in rows
        ])]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _ceiling(unit: str, value: float) -> str:
    return f"{value:.0f} GB/s (copy)" if unit == "gbs" else f"{value:.0f} TFLOP/s (bf16 product)"


def by_provider(rows: list[dict], limits: dict, show=None) -> str:
    """A line a case, a column a provider."""
    show = show or _milliseconds
    providers = list(dict.fromkeys(row["provider"] for row in rows if "provider" in row))
    cases: dict[str, dict] = defaultdict(dict)
    for row in rows:
        cases[row["case"]][row.get("provider", "")] = row
    lines = [
        (case, *(show(found[p], limits) if p in found else "" for p in providers))
        for case, found in cases.items()
    ]
    return _table(("case", *providers), lines)


def _milliseconds(row: dict, limits: dict) -> str:
    if "ms" not in row:
        return "failed"
    share = percent(row, limits)
    return f"{row['ms']:.3f}" + ("" if share is None else f" ({share:.0f} %)")


def _block(row: dict, limits: dict) -> str:
    return f"{row['ms']:.3f} ({row['kept_mb']:.0f} MB)" if "ms" in row else "failed"


def _throughput(row: dict, limits: dict) -> str:
    return f"{row['images'] / row['ms'] * 1e3:.0f}" if "ms" in row else "failed"


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _rows(outcomes: list[Outcome], name: str) -> list[dict]:
    return [row for outcome in outcomes if outcome.name == name for row in outcome.rows]


# --- plots ----------------------------------------------------------------------------------------


def draw(outcomes: list[Outcome], folder: Path) -> list[str]:
    """A plot of every group of cases, where matplotlib is installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    names = []
    for section, group in (("elementwise", "kind"), ("convolutions", "pass")):
        for key, rows in grouped(_rows(outcomes, section), group).items():
            rows = [row for row in rows if "ms" in row]
            if rows:
                name = f"{section}-{key.replace(' ', '-')}.png"
                _bars(plt, rows, f"{section}: {key}", folder / name)
                names.append(name)
    return names


def _bars(plt, rows: list[dict], title: str, path: Path) -> None:
    """Times as fast as eager."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    eager = {row["case"]: row["ms"] for row in rows if row["provider"] == "eager"}
    providers = [p for p in dict.fromkeys(row["provider"] for row in rows) if p != "eager"]
    figure, axes = plt.subplots(
        figsize=(8, 1.2 + 0.16 * len(cases) * max(len(providers), 1)), layout="constrained"
    )
    thick = 0.8 / max(len(providers), 1)
    for index, provider in enumerate(providers):
        bars = {
            cases.index(row["case"]) + (index + 0.5) * thick - 0.4: eager[row["case"]] / row["ms"]
            for row in rows
            if row["provider"] == provider and row["case"] in eager
        }
        axes.barh(list(bars), list(bars.values()), thick * 0.9, label=provider)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as eager PyTorch")
    axes.set_title(title)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)
