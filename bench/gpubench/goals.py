"""What was aimed at on an H200, and what was reached."""

from collections import defaultdict

LARGE = 64e6  # bytes of a tensor: beyond every cache
TRITON = "fastres-triton"
COMPILED = "torch.compile max-autotune, freezing"


def reached(elementwise: list[dict], convolutions: list[dict], models: list[dict], percent) -> list:
    """Lines of (goal, reached); a goal of which nothing was measured has none."""
    lines = []
    large = [
        row for row in elementwise if row.get("provider") == TRITON and row["map_bytes"] > LARGE
    ]
    shares = [share for row in large if (share := percent(row)) is not None]
    if shares:
        goal = "elementwise, tensors over 64 MB: at least 85 % of the copy bandwidth"
        lines.append((goal, f"{min(shares):.0f} to {max(shares):.0f} %"))
    forward = _by_case([row for row in convolutions if row.get("pass") == "eval"])
    for goal, rival, least in (
        ("fprop with its epilogue: at least 0.9x cuDNN's convolution alone", "cuDNN, convolution alone", 0.9),
        ("fprop with its epilogue: ahead of eager", "eager", 1.0),
    ):  # fmt: skip
        if ratios := _ratios(forward, rival, TRITON):
            held = sum(ratio >= least for ratio in ratios)
            lines.append(
                (goal, f"at {held} of {len(ratios)} shapes, {min(ratios):.2f} at the worst")
            )
    for case, found in _by_case(models).items():
        rivals = {COMPILED: 1.2} if "eval" in case else {"torch.compile": 1.25, "eager": 1.5}
        for rival, factor in rivals.items():
            ours = [p for p in found if p.startswith("fastres-")]
            best = max(ours, key=lambda p: _ratio(found, rival, p), default=None)
            if best and (ratio := _ratio(found, rival, best)):
                lines.append((f"{case}: at least {factor}x {rival}", f"{ratio:.2f} ({best})"))
    return lines


def _by_case(rows: list[dict]) -> dict[str, dict[str, float]]:
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if "ms" in row:
            cases[row["case"]][row["provider"]] = row["ms"]
    return cases


def _ratios(cases: dict, rival: str, ours: str) -> list[float]:
    return [ratio for found in cases.values() if (ratio := _ratio(found, rival, ours))]


def _ratio(found: dict, rival: str, ours: str) -> float:
    """How many times as fast as the rival; 0 where one was not measured."""
    return found[rival] / found[ours] if rival in found and ours in found else 0.0
