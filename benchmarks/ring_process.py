"""One of the processes that :mod:`benchmarks.many_samples` measures; prints what it found as a line of JSON.

python -m benchmarks.ring_process --folder FOLDER --rank 0 --processes 2 --samples 8192 --features 64
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, distributed

from benchmarks.command_line import parsed
from renyi_kd import feature_entropy

PROGRAM = "benchmarks.ring_process"
# Of a process, so that what is loaded late is there before the memory is read.
WARM_UP = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """What a process computes.

    Attributes:
        folder: where the processes find one another.
        rank: of this one.
        processes: how many there are.
        samples: of all together.
        features: of each sample.
        repeats: of which the fastest counts, and the one that took most memory.

    """

    folder: Path
    rank: int
    processes: int
    samples: int
    features: int
    repeats: int = 1


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(Options, PROGRAM, __doc__, argv)
    torch.set_num_threads(1)
    store = f"file://{options.folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=options.rank, world_size=options.processes)
    passes(rows(options, WARM_UP * options.processes))
    x = rows(options, options.samples)
    found: dict[str, dict[str, float]] = {}
    for _ in range(options.repeats):
        for name, numbers in passes(x).items():
            best = found.setdefault(name, numbers)
            best.update({key: (max if key == "peak_mib" else min)(best[key], numbers[key]) for key in numbers})
    print(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def rows(options: Options, n_samples: int) -> Tensor:
    """Return this process's part of the samples, as even as can be."""
    first, last = (n_samples * rank // options.processes for rank in (options.rank, options.rank + 1))
    generator = torch.Generator().manual_seed(options.rank)
    return torch.randn(last - first, options.features, generator=generator).requires_grad_()


def passes(x: Tensor) -> dict[str, dict[str, float]]:
    """Return what a forward and what forward and backward take: CPU seconds, memory above the features, bytes."""
    # One process alone has no exchange.
    group = distributed.group.WORLD if distributed.get_world_size() > 1 else None

    def forward() -> None:
        with torch.no_grad():
            feature_entropy(x, process_group=group)

    def both() -> None:
        torch.autograd.grad(feature_entropy(x, process_group=group), x)

    return {"forward": measured(forward), "forward+backward": measured(both)}


def measured(run: Callable[[], None]) -> dict[str, float]:
    """Return the CPU seconds of a run, what the process's memory rose by, and the bytes of rows that arrived."""
    arrived = 0
    start = distributed.batch_isend_irecv

    def counted(operations: list[distributed.P2POp]) -> list[distributed.Work]:
        nonlocal arrived
        arrived += sum(each.tensor.nbytes for each in operations if each.op is distributed.irecv)
        return start(operations)

    distributed.barrier()
    # What is free but kept would hide what a run takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began, began_wall = resident_kib("VmRSS"), time.process_time(), time.perf_counter()
    with mock.patch.object(distributed, "batch_isend_irecv", counted):
        run()
    return {
        "cpu_s": time.process_time() - began,
        "wall_s": time.perf_counter() - began_wall,
        "peak_mib": (resident_kib("VmHWM") - before) / 2**10,
        "received_mib": arrived / 2**20,
    }


def resident_kib(field: str) -> int:
    """Return what of the process is in memory, ``VmRSS``, or was at most since the last reset, ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
