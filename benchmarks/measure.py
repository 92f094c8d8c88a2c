"""Times and peak memory of implementations side by side, and where they were taken."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from filelock import FileLock

from benchmarks.files import whole_file

Run = Callable[[], object]


def environment(device: str = "cpu") -> dict[str, object]:
    """Return the columns that describe the machine, the versions and the state of the repository."""
    on_gpu = device == "cuda"
    commit = _run("git", "rev-parse", "--short=12", "HEAD")
    # Of a copy without its history nobody knows.
    dirty = bool(_run("git", "status", "--porcelain", "--untracked-files=no")) if commit else ""
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        # A copy can be told of which commit it is.
        "commit": commit or os.environ.get("RENYI_KD_COMMIT", ""),
        "dirty": dirty,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _triton_version() -> str:
    """Return the version of Triton, whatever its distribution is called; nothing where there is none."""
    try:
        import triton
    except ModuleNotFoundError:
        return ""
    return str(triton.__version__)


def cpu_name() -> str:
    """Return the processor's name with what tells its generation where the name does not."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    widest = next((isa for isa in ("amx_bf16", "avx512f", "avx2") if isa in text), "")
    return f"{name[1] if name else platform.processor()} {widest}".strip()


def interleaved_ms(runs: dict[str, Run], trials: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the median milliseconds of every turn; in turns, so that a drift of the machine meets all runs alike.

    A turn is a tenth of a second to warm up, as it finds allocator and caches full of what the other run left, and
    three tenths that count; at least one call and three calls. On a GPU its own clock counts, and with it the time
    that it waits for the host where calls are shorter than their launches.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(trials):
        for name, run in runs.items():
            if device == "cuda":
                from triton.testing import do_bench

                samples[name].append(do_bench(run, warmup=100, rep=300, return_mode="median"))
                continue
            _calls_ms(run, seconds=0.1, at_least=1)
            samples[name].append(statistics.median(_calls_ms(run, seconds=0.3, at_least=3)))
    return samples


def _calls_ms(run: Run, seconds: float, at_least: int) -> list[float]:
    times: list[float] = []
    total = 0.0
    while total < 1e3 * seconds or len(times) < at_least:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
        total += times[-1]
    return times


def percentiles(samples: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile by their column."""
    return dict(zip(("ms_p20", "ms_p50", "ms_p80"), np.percentile(samples, (20, 50, 80)), strict=True))


def peak_mib(run: Run, device: str) -> float:
    """Return the most memory that tensors made by a run hold at one time, the results included."""
    if device == "cpu":
        return cpu_peak_mib(run)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(run: Run, device: str) -> int | str:
    """Return how many kernels and copies a run launches on a GPU; empty on a CPU."""
    return "" if device == "cpu" else len(_on_gpu(run))


def kernel_us(run: Run, steps: int = 5) -> dict[str, float]:
    """Return how long each kernel and copy of a run takes on a GPU, in microseconds, by name; the median of the steps.

    One that is launched several times counts with all of them.
    """
    of_steps: dict[str, list[float]] = {}
    for _ in range(steps):
        times: dict[str, float] = {}
        for event in _on_gpu(run):
            times[event.name()] = times.get(event.name(), 0.0) + event.duration_ns() / 1e3
        for name, time_us in times.items():
            of_steps.setdefault(name, []).append(time_us)
    return {name: statistics.median(times) for name, times in of_steps.items()}


def _on_gpu(run: Run) -> list[Any]:
    """Return the profiler's events of a run that happened on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    return [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]


def host_us(run: Run, steps: int, trials: int = 15) -> float:
    """Return the microseconds that a step takes the host; the median of trials.

    Args:
        run: the step.
        steps: of a trial, so few that the GPU's queue takes them all: the host must not wait.
        trials: between which the GPU catches up.

    """
    times = []
    for _ in range(trials):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            run()
        times.append((time.perf_counter() - start) / steps * 1e6)
    return statistics.median(times)


def graph_us(run: Run) -> float:
    """Return the microseconds of a step replayed from a CUDA graph; NaN, and why, where it cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        return 1e3 * float(do_bench_cudagraph(run, rep=50, return_mode="median"))
    except Exception as error:
        print(f"    no graph: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return math.nan


def cpu_peak_mib(run: Run) -> float:
    """Return the most memory that tensors made by a run hold at one time, the results included."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak / 2**20


def read_rows(path: Path) -> pandas.DataFrame:
    """Return the rows of a CSV file as text: a commit may read like a number.

    Raises:
        ValueError: it is no table, or a row has not as many cells as the header.

    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if row]
        (_, header), *rows = lines
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: must be a table in UTF-8 with a header, got {error}; move it elsewhere") from error
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}: must have {len(header)} cells in a row, as in its header, got {len(row)} in line {number}; "
                "complete or remove the row"
            )
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: must name every column once, got {', '.join(header)}; rename one")
    return pandas.DataFrame([row for _, row in rows], columns=header, dtype=str)


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a CSV file, whole or not at all, after those of any other process.

    Rows that are there stay letter by letter. A cell is empty where a row lacks a column of the others.
    """
    new = pandas.DataFrame(rows, dtype=object).map(_written)
    with FileLock(path.with_name(f".{path.name}.lock")):
        old = [read_rows(path)] if path.is_file() else []
        with whole_file(path) as temporary:
            pandas.concat([*old, new]).to_csv(temporary, index=False, lineterminator="\n")


def _written(value: object) -> str:
    """Return a cell; text, as pandas would make floats of whole numbers beside a missing one."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()
