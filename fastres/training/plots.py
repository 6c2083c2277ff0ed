"""Curves of a run as a PNG."""

import io
from collections.abc import Sequence

from .errors import library

COLOURS = {"fastres": "#c44e52", "eager": "#4c72b0"}


def draw_curves(history: Sequence[dict]) -> bytes:
    """Loss and accuracy of every epoch in ``history``: dashed in training, drawn through in test.
    Training's are averages over the epoch, while the model was changing."""
    library("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name in dict.fromkeys(row["model"] for row in history):
            rows = [row for row in history if row["model"] == name]
            for split, style in (("train", "--"), ("test", "-")):
                axes.plot(
                    [row["epoch"] for row in rows],
                    [row[f"{split}_{quantity}"] for row in rows],
                    style, color=COLOURS[name], marker=".", label=f"{name}, {split}",
                )  # fmt: skip
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
