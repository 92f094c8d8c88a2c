"""Fine-tune SAMs with and without distillers, and compare.

    python -m benchmarks.segmentation plan --data DATA/kvasir_seg --peft lora --distiller none infosam --minutes 25
    python -m benchmarks.segmentation run --data DATA/kvasir_seg --peft lora --distiller none infosam --seeds 3
    python -m benchmarks.segmentation table
    python -m benchmarks.segmentation relations --data DATA/kvasir_seg

Every finished run is a file of its own in the folder of --out, and is not run again: after a kill the same command goes
on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.segmentation import table as tables_of
from benchmarks.segmentation.grid import Grid, add_options
from benchmarks.segmentation.metrics import METRICS
from benchmarks.segmentation.rows import read


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 1 if a run could not be done."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, said in (
        ("run", "do the runs that are not done yet, the most informative first"),
        ("plan", "say which runs are left, and which of them fit into --minutes"),
        ("relations", "train one run with and without L_r, and draw its relations early, midway and late"),
    ):
        add_options(commands.add_parser(name, help=said))
    table = commands.add_parser("table", help="print what the finished runs come to")
    table.add_argument("--out", type=Path, default=Path("runs/segmentation"), help="folder of the finished runs")
    table.add_argument("--metrics", nargs="+", choices=METRICS, default=(), help="those of the paper if left out")
    table.add_argument("--metric", choices=METRICS, default="iou", help="of the paired differences")
    table.add_argument("--against", default="none", help="distiller that the others are compared with")
    args = parser.parse_args(argv)
    try:
        if args.command == "table":
            return print_tables(args)
        grid = Grid(args)
        return {"run": grid.run, "plan": grid.plan, "relations": grid.relations}[args.command]()
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2


def print_tables(args: argparse.Namespace) -> int:
    """Print all tables of a folder."""
    rows = read(args.out)
    if not rows:
        raise ValueError(f"{args.out} must hold finished runs, got none; make some with the command run")
    for title, table in tables_of.tables(rows):
        print(f"{title}\n\n{table.means(args.metrics)}\n\n{table.differences(args.metric, args.against)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
