"""One step of the loss on a GPU, taken apart: what the host takes, what the kernels take, and what a graph of it takes.

    python -m benchmarks.gpu_steps --out gpu

The largest batch comes first, as it shows bandwidth. Of every kernel there is the time, and the bytes a second, of all
its arguments once each, beside those of a large copy. A step whose loss is not the reference's is not timed.
``--sweep`` times the kernels with half and twice of each constant of a launch, until its seconds are over. Eight
processes compile for it first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import renyi_kd.ops
from benchmarks import measure
from benchmarks.cases import Case, map_cases
from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.kernels import LAYOUTS, runs_of

PROGRAM = "benchmarks.gpu_steps"
Dtype = Literal["float32", "bfloat16", "float16"]
# Launches that a GPU's queue takes before the host has to wait for it.
_QUEUE = 800
# Of processes that compile for a sweep, and the seconds that it waits for them.
_COMPILERS, _SECONDS_TO_COMPILE = 8, 12.0
# Of the sweep: the size that shows bandwidth, and the one that shows latency.
SWEPT: tuple[tuple[int, Dtype], ...] = ((64, "bfloat16"), (4, "float32"))


@dataclasses.dataclass(frozen=True)
class Options:
    """What is taken apart.

    Attributes:
        out: folder to append the rows to, as steps_cuda.csv, step_kernels_cuda.csv and sweep_cuda.csv.
        batches: images of each batch.
        dtype: of the features.
        layouts: memory formats of the maps.
        providers: implementations.
        sweep: times half and twice of every constant in place of the steps.
        compile_part: of a sweep, compiles each eighth try from this one on, and times nothing.
        seconds: that a sweep takes at most.
        once: runs one step of every size and times nothing, for a profiler that watches.
        threads: of the CPU.

    """

    out: Path | None = None
    batches: tuple[int, ...] = (64, 4, 16)
    dtype: tuple[Dtype, ...] = ("float32", "bfloat16")
    layouts: tuple[Literal["channels_first", "channels_last"], ...] = ("channels_first", "channels_last")
    providers: tuple[Literal["triton", "textbook", "reference"], ...] = ("triton", "textbook")
    sweep: bool = False
    compile_part: int | None = None
    seconds: float = 20.0
    once: bool = False
    threads: int = 16


def loss_case(batch: int, layout: str, dtype: str, device: str = "cuda") -> Case:
    """Return the whole loss at a size."""
    found = map_cases(batch, layout, getattr(torch, dtype), device)
    return next(case for case in found if case.op == "infosam_terms")


def is_right(run: measure.Run, reference: measure.Run, dtype: str) -> bool:
    """Return whether loss and gradients are the reference's, up to rounding."""
    allowed = 1e-4 if dtype == "float32" else 0.05
    pairs = [(a.double(), e.double()) for a, e in zip(values(run), values(reference), strict=True)]
    # Of parameters on the scale of all: that of one can be zero up to rounding.
    scale = max(e.abs().max().item() for _, e in pairs[3:]) if len(pairs) > 3 else 0.0
    errors = [
        (a - e).abs().max().item() / max(e.abs().max().item(), scale if index > 2 else 1e-30)
        for index, (a, e) in enumerate(pairs)
    ]
    return all(error <= allowed for error in errors)


def values(run: measure.Run) -> tuple[Tensor, ...]:
    value: Any = run()
    return value if isinstance(value, tuple) else (value,)


@contextlib.contextmanager
def bytes_of_launches() -> Iterator[Counter[str]]:
    """Count, by kernel, the bytes of all tensors that it is launched with through Triton, each tensor once a launch."""
    from triton.runtime import JITFunction

    counted: Counter[str] = Counter()
    run = JITFunction.run

    def counting(self: Any, *args: Any, **keywords: Any) -> Any:
        counted[self.__name__] += bytes_of((args, keywords))
        return run(self, *args, **keywords)

    with mock.patch.object(JITFunction, "run", counting):
        yield counted


def bytes_of(value: object) -> int:
    """Return the bytes of the tensors in arguments; of one that is expanded those that it has."""
    if isinstance(value, Tensor):
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, tuple | list) else 0


def copy_gb_s() -> float:
    """Return the gigabytes a second of a copy of 1 GiB, read and written."""
    from triton.testing import do_bench

    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / 1e6 / do_bench(lambda: y.copy_(x), warmup=50, rep=200, return_mode="median")


def times_of(run: measure.Run) -> tuple[dict[str, float], dict[str, float]]:
    """Return the times of a step in microseconds, and those of its kernels."""
    for _ in range(3):
        run()
    kernels = measure.kernel_us(run)
    n_launches = int(measure.launches(run, "cuda"))
    return {
        "host_us": measure.host_us(run, max(1, _QUEUE // max(1, n_launches))),
        "kernels_us": sum(kernels.values()),
        "graph_us": measure.graph_us(run),
        "step_us": 1e3 * measure.interleaved_ms({"step": run}, 1, "cuda")["step"][0],
        "launches": n_launches,
    }, kernels


def kernel_rows(kernels: dict[str, float], n_bytes: Counter[str], copy: float) -> list[dict[str, object]]:
    """Return a row for every kernel, the longest first; bandwidth of those whose arguments are known."""
    rows: list[dict[str, object]] = []
    for name, us in sorted(kernels.items(), key=lambda item: -item[1]):
        gb_s = n_bytes[name] / us / 1e3 if n_bytes[name] and us else math.nan
        rows.append({"kernel": name, "us": us, "mb": n_bytes[name] / 1e6, "gb_s": gb_s, "of_copy": gb_s / copy})
    return rows


def take_apart(options: Options) -> None:
    environment, copy = measure.environment("cuda"), copy_gb_s()
    print(f"a copy of 1 GiB: {copy:.0f} GB/s", flush=True)
    for batch in options.batches:
        for dtype in options.dtype:
            for layout in options.layouts:
                runs = runs_of(loss_case(batch, layout, dtype), "forward+backward")
                sizes = {"b": batch, "layout": layout, "dtype": dtype}
                for provider in options.providers:
                    print(f"B {batch}, {LAYOUTS[layout]}, {dtype}, {provider}", flush=True)
                    with bytes_of_launches() as n_bytes:
                        # The first step of a size goes through Triton, whatever is kept for those that follow.
                        runs[provider]()
                    # The textbook is the yardstick, whatever half precision costs it.
                    if provider != "textbook" and not is_right(runs[provider], runs["reference"], dtype):
                        print("    is not the reference's and is not timed", flush=True)
                        continue
                    times, kernels = times_of(runs[provider])
                    rows = kernel_rows(kernels, n_bytes, copy)
                    print("    " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()))
                    for row in rows[:12] if provider == "triton" else []:
                        print("    {kernel:<40} {us:8.1f} us {gb_s:7.0f} GB/s {of_copy:5.2f} of a copy".format(**row))
                    sys.stdout.flush()
                    if options.out is not None:
                        about = {**sizes, "provider": provider}
                        measure.append_rows(options.out / "steps_cuda.csv", [{**about, **times, **environment}])
                        new = [{**about, **row, "copy_gb_s": copy, **environment} for row in rows]
                        measure.append_rows(options.out / "step_kernels_cuda.csv", new)


def run_once(options: Options) -> None:
    """Run a warm step of every size."""
    for batch in options.batches:
        for dtype in options.dtype:
            for layout in options.layouts:
                run = runs_of(loss_case(batch, layout, dtype), "forward+backward")["triton"]
                run()
                torch.cuda.synchronize()


class Constant(NamedTuple):
    """A number of a launch that no GPU has chosen yet."""

    module: ModuleType
    name: str

    @property
    def value(self) -> int:
        """What it is now."""
        return int(getattr(self.module, self.name))

    def __str__(self) -> str:
        return f"{self.module.__name__.removeprefix('renyi_kd.ops.')}.{self.name}"


def constants() -> list[Constant]:
    """Return the powers of two that modules of kernels define for their launches."""
    found = []
    for place in pkgutil.walk_packages(renyi_kd.ops.__path__, "renyi_kd.ops."):
        module = importlib.import_module(place.name)
        source = inspect.getsource(module)
        for name, value in vars(module).items():
            is_power = type(value) is int and value >= 2 and value & (value - 1) == 0
            # Its own, not imported; limits are no choices.
            is_own = re.search(rf"^[A-Z_, ]*\b{name}\b[A-Z_, ]* = ", source, re.MULTILINE)
            if name.isupper() and is_power and is_own and "MAX" not in name and "triton" in source:
                found.append(Constant(module, name))
    return found


def forget_plans() -> None:
    """Drop what the package keeps of launches: it was made with other constants."""
    for name, module in list(sys.modules.items()):
        if name.startswith("renyi_kd."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def tries() -> list[tuple[Constant, int]]:
    """Return every constant with half of it, then every one with twice of it."""
    found = constants()
    return [(constant, int(factor * constant.value)) for factor in (0.5, 2) for constant in found]


def sweep(
    to_try: Sequence[tuple[Constant, int]],
    step_us: Callable[[], dict[str, float]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, object]]:
    """Return the times of a step as it is, and with each constant in turn at another value, as the seconds allow.

    Args:
        to_try: the constants and their values.
        step_us: the times of a step, by size.
        seconds: after which no further value is tried.
        clock: tells the seconds.

    """
    start = clock()
    rows: list[dict[str, object]] = [{"constant": "as they are", "value": "", **step_us()}]
    for constant, value in to_try:
        if clock() - start > seconds:
            print(f"    no time for {constant} = {value}", flush=True)
            continue
        with mock.patch.object(constant.module, constant.name, value):
            forget_plans()
            try:
                rows.append({"constant": str(constant), "value": value, **step_us()})
            except Exception as error:
                # Too many registers or too much memory is an answer too.
                said = next(iter(str(error).splitlines()), "")
                print(f"    {constant} = {value}: {type(error).__name__}: {said}", flush=True)
    forget_plans()
    return rows


def compile_in_processes(seconds: float) -> None:
    """Let processes compile what the sweep times, as far as the seconds reach; Triton keeps it on the disk."""
    command = [sys.executable, "-m", PROGRAM, "--sweep", "--threads", "1", "--compile-part"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([*command, str(part)], **silent) for part in range(_COMPILERS)]
    end = time.perf_counter() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.perf_counter()))
        process.kill()
        process.wait()


def sweep_here(options: Options) -> None:
    if options.compile_part is None:
        compile_in_processes(_SECONDS_TO_COMPILE)
    steps = {
        f"b{batch}_{dtype}_us": runs_of(loss_case(batch, "channels_first", dtype), "forward+backward")["triton"]
        for batch, dtype in SWEPT
    }

    def step_us() -> dict[str, float]:
        for run in steps.values():
            run()
        return {name: sum(measure.kernel_us(run).values()) for name, run in steps.items()}

    def compile_step() -> dict[str, float]:
        for run in steps.values():
            run()
        return {}

    if options.compile_part is not None:
        sweep(tries()[options.compile_part :: _COMPILERS], compile_step, math.inf)
        return
    rows = sweep(tries(), step_us, options.seconds)
    for row in rows:
        times = ", ".join(f"{name} {row[name]:.1f}" for name in steps)
        print(f"    {row['constant']!s:<40} {row['value']!s:>6}: {times}", flush=True)
    if options.out is not None:
        environment = measure.environment("cuda")
        measure.append_rows(options.out / "sweep_cuda.csv", [{**row, **environment} for row in rows])


def main(argv: Sequence[str] | None = None) -> None:
    with sentence_at_fault(PROGRAM):
        options = parsed(Options, PROGRAM, __doc__, argv)
        if not torch.cuda.is_available():
            raise RuntimeError("a GPU must be there, got none that PyTorch sees; benchmarks.kernels measures a CPU")
        torch.set_num_threads(options.threads)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
        if options.sweep:
            sweep_here(options)
        elif options.once:
            run_once(options)
        else:
            take_apart(options)


if __name__ == "__main__":
    main()
