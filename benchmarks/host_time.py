"""What a step of the loss costs the host: forward and backward, with kernels that launch and do nothing.

    python -m benchmarks.host_time --out benchmarks/results/host_time.csv

Triton compiles for a GPU and launches for real, over a libcuda that returns at once (``stub_libcuda.c``; takes gcc).
Tensors are small and on the CPU, so that the textbook's operations cost little more than calling them. A time is the
least of all steps, so that other processes matter little. It is no time of a GPU, and only ratios of one run mean
something: on a GPU every launch costs more, and the textbook has more of them.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure, stub_driver, textbook
from benchmarks.command_line import parsed, sentence_at_fault
from renyi_kd import RelationModule, SAMFeatures, infosam_terms

PROGRAM = "benchmarks.host_time"
DIM, HEIGHT, WIDTH = 16, 4, 4
PROVIDERS = ("textbook", "textbook compiled", "triton", "triton compiled")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        out: CSV file to append the rows to.
        batches: images of each batch.
        providers: only these; "textbook" is what the others are compared with.
        turns: of every provider, one after the other.
        steps: of a turn.

    """

    out: Path | None = None
    batches: tuple[int, ...] = (4,)
    providers: tuple[str, ...] = PROVIDERS
    turns: int = 40
    steps: int = 50


def runs(batch: int, providers: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Return a step by every provider, of the same features."""
    torch.manual_seed(0)
    relation = RelationModule(DIM)
    teacher, student = (
        SAMFeatures(torch.randn(batch, DIM, HEIGHT, WIDTH), torch.randn(batch, 1, DIM)) for _ in range(2)
    )
    student = SAMFeatures(*(value.requires_grad_() for value in student[:2]))
    leaves, upstream = [*student[:2], *relation.parameters()], torch.ones(())

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return function(relation, teacher, student).loss

    def step(function: Callable[[], Tensor]) -> None:
        torch.autograd.grad(function(), leaves, upstream)

    functions: dict[str, Callable[[], Tensor]] = {
        "textbook": partial(loss, textbook.infosam_terms),
        "triton": partial(loss, partial(infosam_terms, impl="triton")),
    }
    functions |= {f"{name} compiled": torch.compile(function) for name, function in functions.items()}
    return {name: partial(step, functions[name]) for name in providers}


def least_us(steps: dict[str, Callable[[], object]], turns: int, n_steps: int) -> dict[str, float]:
    """Return the least time of a step by each provider, in microseconds; in turns, as machines drift."""
    least = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        # Compiles, and fills caches.
        for _ in range(10):
            step()
    for _ in range(turns):
        for name, step in steps.items():
            for _ in range(n_steps):
                start = time.perf_counter_ns()
                step()
                least[name] = min(least[name], (time.perf_counter_ns() - start) / 1e3)
    return least


def measure_here(options: Options) -> None:
    """Measure in this process, which finds the stub."""
    # Of PyTorch and Triton about themselves.
    warnings.simplefilter("ignore")
    stub_driver.use_stub()
    torch.set_num_threads(1)
    environment = measure.environment()
    for batch in options.batches:
        least = least_us(runs(batch, options.providers), options.turns, options.steps)
        rows = []
        for name, us in least.items():
            ratios = {f"of_{other.replace(' ', '_')}": us / least[other] for other in PROVIDERS[:2] if other in least}
            sizes = {"b": batch, "d": DIM, "h": HEIGHT, "w": WIDTH}
            rows.append({
                "op": "infosam_terms", "provider": name, "pass": "forward+backward", **sizes,
                "timed": "host, over a stub of libcuda", "host_us": us, **ratios, **environment,
            })  # fmt: skip
            said = ", ".join(f"{ratio:.2f} {column.replace('_', ' ')}" for column, ratio in ratios.items())
            print(f"B {batch}, {name}: {us:.0f} us on the host, {said}", flush=True)
        if options.out is not None:
            measure.append_rows(options.out, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, in a process that finds the stub."""
    options = parsed(Options, PROGRAM, __doc__, argv)
    if "textbook" not in options.providers or not set(options.providers) <= set(PROVIDERS):
        raise SystemExit(f"--providers must be some of {PROVIDERS}, 'textbook' among them, got {options.providers}")
    if stub_driver.is_over_stub():
        measure_here(options)
        return 0
    with sentence_at_fault(PROGRAM):
        return stub_driver.command_over_stub("-m", PROGRAM, *(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
