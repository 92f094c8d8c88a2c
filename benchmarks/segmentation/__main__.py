"""Fine-tune SAMs with and without distillers, and compare.

    python -m benchmarks.segmentation plan --data DATA/kvasir_seg --peft lora --distiller none infosam --minutes 25
    python -m benchmarks.segmentation run --data DATA/kvasir_seg --peft lora --distiller none infosam --seeds 3
    python -m benchmarks.segmentation table
    python -m benchmarks.segmentation relations --data DATA/kvasir_seg
    python -m benchmarks.segmentation shares --data DATA/kvasir_seg --distiller infosam infosam_share
    python -m benchmarks.segmentation evidence

Every finished run is a file of its own in the folder of --out, and is not run again: after a kill the same command goes
on where it was.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.segmentation.evidence import FORMS, report
from benchmarks.segmentation.experiment import experiments
from benchmarks.segmentation.grid import Grid
from benchmarks.segmentation.metrics import METRICS
from benchmarks.segmentation.options import Options
from benchmarks.segmentation.rows import read
from benchmarks.segmentation.table import tables

PROGRAM = "python -m benchmarks.segmentation"
Metric = Literal[METRICS]


@dataclasses.dataclass(frozen=True)
class Shown:
    """Which runs are shown, and what of them.

    Attributes:
        out: folder of the finished runs.
        metrics: those of the paper if left out.
        metric: of the paired differences.
        against: distiller that the others are compared with.

    """

    out: Path = Path("runs/segmentation")
    metrics: tuple[Metric, ...] = ()
    metric: Metric = "iou"
    against: str = "none"


@dataclasses.dataclass(frozen=True)
class Weighed:
    """Which runs are weighed, and what is of the same task.

    Attributes:
        out: folder of the finished runs.
        transfer: names of the folders of --also-test that hold the same task; all others are retention.
        forms: methods whose p-values are corrected for their number.

    """

    out: Path = Path("runs/segmentation")
    transfer: tuple[str, ...] = ()
    forms: tuple[str, ...] = FORMS


def run(options: Options) -> int:
    """Do the runs that are not done yet, the most informative first."""
    return Grid(options).run()


def plan(options: Options) -> int:
    """Say which runs are left, and which of them fit into --minutes."""
    return Grid(options).plan()


def relations(options: Options) -> int:
    """Train one run with and without L_r, and draw its relations early, midway and late."""
    return Grid(options).relations()


def shares(options: Options) -> int:
    """Write how large the gradient of InfoSAM is beside the task's, step by step; every --distiller a form of it."""
    return Grid(options).shares()


def table(shown: Shown) -> int:
    """Print what the finished runs come to."""
    rows = read(shown.out)
    if not rows:
        raise ValueError(f"{shown.out} must hold finished runs, got none; make some with the command run")
    for title, found in tables(rows):
        differences = found.differences(shown.metric, shown.against, detectable=True)
        print(f"{title}\n\n{found.means(shown.metrics)}\n\n{differences}\n")
    return 0


def evidence(weighed: Weighed) -> int:
    """Print what runs with --also-test come to: gates, means at the best rates, differences, curves, and rates."""
    found = list(experiments(read(weighed.out), weighed.transfer))
    if not found:
        raise ValueError(f"{weighed.out} must hold runs with other tests, got none; make some with run --also-test")
    print(report(found, weighed.forms))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 1 if a run could not be done."""
    commands = {command.__name__: command for command in (run, plan, relations, shares, table, evidence)}
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog=PROGRAM, description=__doc__, args=argv, config=(tyro.conf.OmitArgPrefixes,)
        )
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
