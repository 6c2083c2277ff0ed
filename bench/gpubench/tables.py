"""What the measured times say of who should serve what, as the tables that the package reads."""

from collections import defaultdict

CAPABILITIES = {"9": 90, "10": 100}  # whose tiles a device uses, as kernels/configs.architecture
NEVER = float("inf")  # of what was not measured, or was wrong


def grouped(rows: list[dict], key: str) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        if key in row:
            groups[row[key]].append(row)
    return groups


# --- kernels/conv_choice: which passes are Triton's, within its backend ---------------------------

# What a pass of kernels/conv_choice is measured against, and as which pass of this benchmark.
VENDORS = "fastres-triton, cuDNN's convolution"
RIVALS = {
    "eval": VENDORS,
    "eval, one image": VENDORS,
    "training": VENDORS,
    "dgrad": "eager",
    "wgrad": "eager",
    "bn_relu_conv": VENDORS,
    "bn_relu_conv_dgrad": VENDORS,
    "bn_relu_conv_wgrad": VENDORS,
}


def conv_choice(device: dict, rows: list[dict]) -> str:
    """The part of ``conv_choice.SERVED`` for this device: the classes in which Triton's kernel, in
    its shipped tile, was right and not slower at every shape that was measured."""
    architecture = CAPABILITIES.get(device["capability"].split(".")[0], 80)
    lines = [f"# Measured on {device['name']}: for SERVED in kernels/conv_choice.py.", "SERVED = {"]
    lines.append(f'    ({architecture}, "half"): {{')
    for what, rival in RIVALS.items():
        names = ", ".join(
            f'"{name}"' for name in _won([r for r in rows if r.get("pass") == what], rival)
        )
        lines.append(
            f'        "{what}": frozenset({{{names}}}),'
            if names
            else f'        "{what}": frozenset(),'
        )
    return "\n".join([*lines, "    },", "}"]) + "\n"


def _won(rows: list[dict], rival: str) -> list[str]:
    won = {}
    for name, group in grouped(rows, "class").items():
        times = _by_case(group, "case").values()
        won[name] = all(
            case["fastres-triton"] < NEVER and case["fastres-triton"] <= case[rival]
            for case in times
        )
    return sorted(name for name, good in won.items() if good)


# --- fastres/choice: which backend is taken by `auto` ---------------------------------------------

ELEMENTWISE = {"add_relu": ("add_relu",), "bn_relu": ("bn_relu", "bn_add_relu")}
PASSES = {
    "eval": ("eval",),
    "eval, one image": ("eval, one image",),
    "training": ("training", "dgrad", "wgrad"),
}


def choice(device: dict, elementwise: list[dict], convolutions: list[dict]) -> str:
    """The part of ``choice.FASTEST`` for this device: a backend where it was right, and not slower
    than PyTorch's, at every shape that was measured; of several that with the least time in all."""
    table: dict[str, str | dict[str, str]] = {}
    for operator, kinds in ELEMENTWISE.items():
        rows = [r for r in elementwise if r.get("kind", "").startswith(kinds)]
        if best := _fastest(_by_case(rows, "case", "kind").values()):
            table[operator] = best
    for what, passes in PASSES.items():
        rows = [r for r in convolutions if r.get("pass") in passes]
        best_of = {
            name: _fastest(_whole(group, passes)) for name, group in grouped(rows, "class").items()
        }
        table[what] = {name: best for name, best in sorted(best_of.items()) if best}
    capability = ", ".join(device["capability"].split("."))
    lines = [f"# Measured on {device['name']}: for FASTEST in fastres/choice.py.", "FASTEST = {"]
    lines += [f"    ({capability}): {{", *(f"        {k!r}: {v!r}," for k, v in table.items())]
    return "\n".join([*lines, "    },", "}"]).replace("'", '"') + "\n"


def _fastest(cases) -> str | None:
    cases = list(cases)
    total = {
        name: sum(case[f"fastres-{name}"] for case in cases)
        for name in ("cuda", "triton")
        if all(case[f"fastres-{name}"] <= min(case["eager"], case[VENDORS]) for case in cases)
    }
    total = {name: time for name, time in total.items() if 0 < time < NEVER}
    return min(total, key=total.get, default=None)


def _whole(rows: list[dict], passes: tuple[str, ...]) -> list[dict]:
    """Of every case the passes together. Where Triton's own kernel is slower than cuDNN's, Triton's
    backend takes that."""
    whole = []
    for case in grouped(rows, "case").values():
        times = _by_case(case, "pass")
        total = dict.fromkeys(("eager", VENDORS, "fastres-cuda", "fastres-triton"), 0.0)
        for name in passes:
            found = times[name,]
            vendors = found[RIVALS[name]]
            total["eager"] += found["eager"]
            total[VENDORS] += vendors
            total["fastres-cuda"] += found["fastres-cuda"]
            total["fastres-triton"] += min(found["fastres-triton"], vendors)
        whole.append(total)
    return whole


def _by_case(rows: list[dict], *keys: str) -> dict[tuple, dict[str, float]]:
    """Provider to milliseconds, by the values of ``keys``."""
    cases: dict[tuple, dict[str, float]] = defaultdict(lambda: defaultdict(lambda: NEVER))
    for row in rows:
        if "provider" in row:
            cases[tuple(row[key] for key in keys)][row["provider"]] = row.get("ms", NEVER)
    return cases
