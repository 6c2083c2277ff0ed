"""``fastres lesion MODEL --checkpoint FILE --data DIR``: accuracy without some of the blocks."""

import argparse
import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import lesion
from ..lesion import Deletion, PathLength
from ..training import TrainingError
from ..training.distributed import ALONE
from ..training.loading import OrderedBatches, Prepared, loader
from .common import UserError, positive
from .evaluate import Trained, add_options, open_trained


class Study(NamedTuple):
    """What was found of one network."""

    name: str
    one_by_one: list[Deletion]
    at_random: list[Deletion]
    paths: list[PathLength]


def add_parser(commands) -> None:
    parser = commands.add_parser("lesion", help="accuracy of a trained network without its blocks")
    add_options(parser)
    parser.add_argument(
        "--plain", nargs=2, metavar=("MODEL", "FILE"),
        help="a plain network and its checkpoint, to be studied beside",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=3, help="draws of k blocks (default 3)")
    parser.add_argument(
        "--counts", type=positive, nargs="+", metavar="K",
        help="blocks to delete at random (default: 1, 2, 4, ... and half of them)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=positive, default=4, help="paths of each length (default 4)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("lesion"), metavar="DIR", help="default: lesion"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        studies = [_study(options.model, open_trained(options), options)]
        if options.plain:
            beside = copy.copy(options)
            beside.model, beside.checkpoint = options.plain[0], Path(options.plain[1])
            studies.append(_study(beside.model, open_trained(beside), options))
        options.out.mkdir(parents=True, exist_ok=True)
    except (TrainingError, ValueError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--out: {options.out}: {error.strerror or error}") from error
    _save(options.out / "deleted.csv", ("model", *Deletion._fields), [
        (study.name, *row) for study in studies for row in (*study.one_by_one, *study.at_random)
    ])  # fmt: skip
    _save(options.out / "paths.csv", ("model", *PathLength._fields), [
        (study.name, *row) for study in studies for row in study.paths
    ])  # fmt: skip
    for study in studies:
        print(_report(study))
    try:
        _draw(studies, options.out / "lesion.png")
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")
    print(f"saved in {options.out}")
    return 0


def _study(name: str, trained: Trained, options: argparse.Namespace) -> Study:
    blocks = lesion.deletable(trained.model)
    half = len(blocks) // 2
    counts = options.counts or sorted({*(2**i for i in range(10) if 2**i < half), half} - {0})

    def score() -> float:
        return trained.score().accuracy

    seed = trained.settings.seed
    return Study(
        name,
        lesion.one_by_one(trained.model, score),
        lesion.at_random(trained.model, score, counts, options.repeats, seed),
        _paths(trained, options.samples, seed),
    )


def _paths(trained: Trained, samples: int, seed: int) -> list[PathLength]:
    """Of one batch of at most 32 images; none for a plain network."""
    if not all(block.has_shortcut for block in lesion.residual_blocks(trained.model)):
        return []
    some = trained.images.images.some(32)
    prepared = Prepared(some, trained.recipe, False, seed)
    batch = next(iter(loader(prepared, OrderedBatches(len(some), 32, ALONE), 0, False)))
    images = trained.settings.place(batch.images)
    labels = batch.labels.to(images.device)
    return lesion.gradient_by_path_length(trained.model, images, labels, samples, seed)


def _save(file: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def _by_count(rows: Sequence[Deletion]) -> dict[int, list[float]]:
    """Scores by the number of deleted blocks."""
    scores: dict[int, list[float]] = {}
    for row in rows:
        scores.setdefault(row.deleted, []).append(row.score)
    return scores


def _report(study: Study) -> str:
    whole, *rest = study.one_by_one
    worst = min(rest, key=lambda row: row.score)
    mean = sum(row.score for row in rest) / len(rest)
    average = f"{100 * mean:.2f} % on average"
    lines = [
        f"{study.name}: {100 * whole.score:.2f} % of images right",
        f"  without one of {len(rest)} blocks: {average}, {100 * worst.score:.2f} % without {worst.blocks}",
    ]
    lines += [
        f"  without {count} at random: {100 * sum(scores) / len(scores):.2f} %"
        for count, scores in sorted(_by_count(study.at_random).items())
    ]
    if study.paths:
        length = sum(row.length * row.share for row in study.paths)
        lines.append(f"  gradient: on average through {length:.1f} branches of {len(rest)}")
    return "\n".join(lines)


def _draw(studies: Sequence[Study], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    one, some, paths = figure.subplots(1, 3)
    for study in studies:
        whole, *rest = study.one_by_one
        one.plot(range(1, len(rest) + 1), [r.score for r in rest], ".-", label=study.name)
        counts = {0: [whole.score]} | _by_count(study.at_random)
        means = [sum(scores) / len(scores) for scores in counts.values()]
        some.plot(list(counts), means, ".-", label=study.name)
        if study.paths:
            lengths = [row.length for row in study.paths]
            paths.plot(lengths, [row.paths for row in study.paths], "--", label="paths")
            paths.plot(lengths, [row.share for row in study.paths], "-", label="gradient")
    one.set(xlabel="the deleted block", ylabel="accuracy", ylim=(0, 1))
    some.set(xlabel="blocks deleted at random", ylabel="accuracy", ylim=(0, 1))
    paths.set(xlabel="length of path (branches)", ylabel="share")
    for axes in (one, some, paths):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=90)
