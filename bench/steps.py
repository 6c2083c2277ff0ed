"""Draws the losses of runs of ``fastres train``, step by step.

    python bench/steps.py losses.png 20 runs/resnet20 runs/plain20

20 is the number of steps that a point averages over; the folders' names are the legend's.
"""

import csv
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure


def read(folder: Path) -> dict[str, list[float]]:
    """The losses of each model in ``folder/steps.csv``, in order."""
    with (folder / "steps.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    models = [name for name in rows[0] if name != "iteration"]
    return {model: [float(row[model]) for row in rows] for model in models}


def averages(losses: list[float], width: int) -> list[tuple[int, float]]:
    """(last step, mean loss) of every ``width`` steps; what is left over at the end is left out."""
    ends = range(width, len(losses) + 1, width)
    return [(end, statistics.fmean(losses[end - width : end])) for end in ends]


def main(file: str, width: str, *folders: str) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for folder in map(Path, folders):
        for model, losses in read(folder).items():
            steps, means = zip(*averages(losses, int(width)), strict=True)
            axes.plot(
                steps, means, ".-" if model == "fastres" else ".--", label=f"{folder.name}, {model}"
            )
    axes.set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
