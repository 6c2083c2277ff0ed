"""``make gpu``: everything there is to know on a machine with a GPU, in at most nine minutes.

    python bench/gpu.py                          every section
    python bench/gpu.py --sections ceilings,convolutions

Builds, runs the tests marked gpu, measures ceilings and benchmarks, looks for memory errors, and
writes results.md, gpu.json and plots under bench/results/<device>/. Every section runs in a process
of its own with a time limit, and what it has found is kept whatever becomes of it. No network.
"""

import argparse
import sys
from pathlib import Path

from gpubench import process, report, schedule
from gpubench.device import Cuda
from gpubench.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 540


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections: expected some of {', '.join(SECTIONS)}, got {unknown}")
    if reason := Cuda.missing():
        sys.exit(f"gpu: {reason}")
    if options.child:
        with process.Emitter(options.rows) as emit:
            SECTIONS[options.child].load()(emit, schedule.Budget(options.seconds), Cuda())
        return 0
    return supervise([SECTIONS[name] for name in names], options)


def supervise(sections: list[schedule.Section], options) -> int:
    """Run the sections one after the other, and write the report after each."""
    device = Cuda.describe()
    folder = options.out / device["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    start = process.Starter(Path(__file__), ROOT / "build/gpu")

    def finished(outcomes: list[schedule.Outcome]) -> None:
        print(outcomes[-1].line, flush=True)
        report.write(device, outcomes, folder)

    outcomes = schedule.run(sections, options.seconds, start, finished)
    report.draw(outcomes, folder)
    print(f"results: {folder / 'results.md'}")
    return 0 if all(outcome.fine for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
