"""Times and peak memory of implementations side by side, and where they were taken."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

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
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit,
        # Of a copy without its history nobody knows.
        "dirty": bool(_run("git", "status", "--porcelain", "--untracked-files=no")) if commit else "",
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
    if device == "cpu":
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(
        event.device_type() == torch.autograd.DeviceType.CUDA for event in profile.profiler.kineto_results.events()
    )


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
    """Return the rows of a CSV file as text: a commit may read like a number."""
    return pandas.read_csv(path, dtype=str, keep_default_na=False)


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
