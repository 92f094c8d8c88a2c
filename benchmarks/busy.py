"""The loss on a quiet CPU and beside one busy process per core, as data loaders are: forward + backward, in turns.

python -m benchmarks.busy --out benchmarks/results/busy_cpu.csv
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.cases import map_cases
from benchmarks.command_line import parsed
from benchmarks.kernels import runs_of

PROGRAM = "benchmarks.busy"
PROVIDERS = ("textbook", "reference")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where.

    Attributes:
        out: CSV file to append the rows to.
        batches: images of each batch.
        layouts: memory formats of the maps.
        threads: of PyTorch.
        trials: turns on a quiet and on a busy CPU.

    """

    out: Path | None = None
    batches: tuple[int, ...] = (4, 16)
    layouts: tuple[str, ...] = ("channels_first", "channels_last")
    threads: int = 2
    trials: int = 5


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep ``n`` other processes computing."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rows_of(batch: int, layout: str, trials: int) -> list[dict[str, object]]:
    """Return the times of both implementations on a quiet and on a busy CPU."""
    case = next(case for case in map_cases(batch, layout, torch.float32, "cpu") if case.op == "infosam_terms")
    every = runs_of(case, "forward+backward")
    runs = {name: every[name] for name in PROVIDERS}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(trials):
        for n in (0, cores()):
            with busy_processes(n):
                for name, samples in measure.interleaved_ms(runs, 1).items():
                    times.setdefault((name, n), []).extend(samples)
    return [
        {"b": batch, "layout": layout, "provider": name, "busy": n, **measure.percentiles(samples), "trials": trials}
        for (name, n), samples in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Time every batch and layout, print the rows, and append them to the file."""
    options = parsed(Options, PROGRAM, __doc__, argv)
    torch.set_num_threads(options.threads)
    environment = measure.environment()
    for batch in options.batches:
        for layout in options.layouts:
            rows = rows_of(batch, layout, options.trials)
            for row in rows:
                print(f"B {batch} {layout} {row['provider']}, {row['busy']} busy processes: {row['ms_p50']:.1f} ms")
            if options.out is not None:
                measure.append_rows(options.out, [{**row, **environment} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
