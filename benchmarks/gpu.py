"""Everything that only a GPU can show, in one go of less than eight minutes.

    python -m benchmarks.gpu --out gpu

First the largest batch, which shows bandwidth: the times of host, kernels and graph apart, and the loss beside the
textbook. Then the kernels' tests on the device (bf16, bitwise repeats and CUDA graphs included), the smaller batches,
and other constants of the launches. NVIDIA's profiler and checker, where installed, watch a few steps and tests.

Every step is a process with a time of its own, so that none takes that of the others; when its time ends it is
interrupted, and what it has measured or seen fail by then is kept. Tests that fail are counted and end nothing: in the
first run on a GPU some may, by tolerance alone. The folder then holds a log per step, the CSV files and the picture to
commit, and clocks.csv: clocks, power and temperature before the first step and after each.
In a copy without its history, the variable RENYI_KD_COMMIT says of which commit it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from benchmarks import kernels, measure
from benchmarks.command_line import parsed, sentence_at_fault

PROGRAM = "benchmarks.gpu"
Outcome = Literal["passed", "failed", "out of time", "not installed"]
TESTS = "tests/test_triton.py"
# After an interrupt: pytest then reports the failures so far.
_SECONDS_TO_END = 3
# What reads and writes features of every layout, and the loss as a whole.
CHECKED = "in_every_layout or (loss_is_that_of_the_reference and float32)"
# What is read of the GPU, never set; the reasons for lower clocks are bits of a number.
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        out: folder of logs, rows and picture.
        only: names of the steps to run; all if left out.

    """

    out: Path
    only: tuple[str, ...] = ()


class Step(NamedTuple):
    """One process.

    Attributes:
        name: also that of its log.
        command: program and arguments.
        seconds: after which it is stopped.
        is_check: whether the whole has failed if this did not come to its end.
        is_tests: whether failures are those of tests, which are counted and do not fail the whole.
        environment: variables of its own.

    """

    name: str
    command: Sequence[str]
    seconds: float
    is_check: bool = False
    is_tests: bool = False
    environment: Mapping[str, str] = MappingProxyType({})


def steps(out: Path) -> list[Step]:
    """Return all steps, what matters most first."""
    python = [sys.executable, "-m"]
    # What other versions of torch and Triton warn of must not keep the tests from being collected.
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", TESTS]
    apart = [*python, "benchmarks.gpu_steps", "--out", str(out)]
    rows = ["--passes", "forward+backward", "--out", str(out / "kernels_cuda.csv")]
    of_kernels = [*python, "benchmarks.kernels", "--device", "cuda", "--threads", "16", "--trials", "2", *rows]
    loss = [*of_kernels, "--ops", "infosam_terms", "--samples", "--batches"]
    # Compiling the textbook takes seconds a size: once a layout, at the size that shows bandwidth and at the smallest.
    others = ["--providers", "textbook", "reference", "triton"]
    moment = [*of_kernels, "--ops", "gram_moment", "--batches", "--samples", "4096", "16384", "65536"]
    teachers = [*python, "benchmarks.teachers", "--device", "cuda", "--amp", "--out", str(out / "teachers_cuda.csv")]
    once = [*python, "benchmarks.gpu_steps", "--once", "--layouts", "channels_first", "--batches"]
    sections = ["--section", "SpeedOfLight", "--section", "WarpStateStats"]
    # Of every size its first step. Names of ours begin with an underscore, those of PyTorch's kernels do not.
    watched = ["-k", "regex:^_.*_kernel", "-c", "48"]
    profiler = ["ncu", "--clock-control", "none", *sections, *watched]
    # Calls of libraries that ask what a driver has, and are told that it has not, are no errors of ours.
    checker = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool"]
    # An allocation for every tensor: past the end of one is then past the end of what the checker knows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("steps", apart, 75),
        Step("loss_64", [*loss, "64"], 45),
        # Several processes, as most of the time is the compiler's; not under the checker, which watches one.
        Step("tests", [*pytest, "-n", "8"], 80, is_check=True, is_tests=True),
        Step("loss_4", [*loss, "4"], 30),
        Step("sweep", [*apart, "--sweep", "--seconds", "20"], 40),
        Step("loss_half", [*loss, "64", "4", "16", "--dtype", "bfloat16", *others], 30),
        Step("moment", moment, 25),
        Step("teachers", teachers, 30),
        Step("profiler", [*profiler, *once, "64", "4"], 25),
        Step("memory", [*checker, "memcheck", *pytest, "-k", CHECKED], 35, is_check=True, environment=uncached),
        Step("unwritten", [*checker, "initcheck", *once, "4"], 20, environment=uncached),
    ]


def run(step: Step, out: Path) -> Outcome:
    """Run a step; its output goes to its log."""
    if shutil.which(step.command[0]) is None:
        return "not installed"
    with log_of(out, step).open("w") as log:
        # A session of its own: what a step has started ends with it.
        process = subprocess.Popen(
            step.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
            start_new_session=True,
        )
        try:
            return "passed" if process.wait(step.seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process with all that it started; it has some seconds to say what it has seen."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(to_run: Sequence[Step], out: Path) -> bool:
    """Run every step, say how it went, and return whether nothing failed."""
    out.mkdir(parents=True, exist_ok=True)
    good = True
    note_clocks(out, "at the start")
    for step in to_run:
        start = time.perf_counter()
        outcome = run(step, out)
        note_clocks(out, f"after {step.name}")
        print(
            f"{step.name:<10} {outcome:<14} {time.perf_counter() - start:>5.0f} s  {last_line(out, step)}", flush=True
        )
        n_failed = failed_tests(log_of(out, step)) if step.is_tests else 0
        if outcome == "failed" and n_failed:
            print(f"{'':<10} {n_failed} tests failed: see {log_of(out, step)}; those of a tolerance may be no fault")
        else:
            good &= outcome in ("passed", "not installed") or (outcome == "out of time" and not step.is_check)
    return good


def log_of(out: Path, step: Step) -> Path:
    """Return the file of a step's output."""
    return out / f"{step.name}.log"


def last_line(out: Path, step: Step) -> str:
    log = log_of(out, step)
    lines = log.read_text().split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "")[:100]


def failed_tests(log: Path) -> int:
    """Return how many tests failed by pytest's last line; 0 where that says no number, or of errors."""
    lines = [line for line in log.read_text().splitlines() if line.strip()] if log.is_file() else []
    said = re.search(r"\b(\d+) failed\b", lines[-1]) if lines else None
    return int(said[1]) if said and not re.search(r"\d+ errors?\b", lines[-1]) else 0


def note_clocks(out: Path, when: str) -> None:
    """Append what the GPU's clocks, power and temperature are; nothing where nobody can ask."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rows: list[dict[str, object]] = [
        {"when": when, "gpu": gpu, **row, "utc": utc} for gpu, row in enumerate(clocks(said))
    ]
    if rows:
        measure.append_rows(out / "clocks.csv", rows)


def clocks(said: str) -> list[dict[str, str]]:
    """Return a row for each GPU of what nvidia-smi printed; empty where it cannot tell."""
    rows = []
    for line in said.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(CLOCKS):
            known = ["" if value.startswith("[") else value for value in values]
            rows.append(dict(zip(CLOCKS, known, strict=True)))
    return rows


def draw(out: Path) -> None:
    """Draw all rows of the operations, if there are any."""
    table = out / "kernels_cuda.csv"
    if table.is_file():
        rows: list[dict[str, Any]] = measure.read_rows(table).to_dict("records")
        kernels.draw([{**row, "speed_up": float(row["speed_up"] or "nan")} for row in rows], out / "kernels_cuda.png")


def chosen(options: Options) -> list[Step]:
    """Return the steps to run.

    Raises:
        ValueError: there is no step of a name.
        RuntimeError: there is no GPU.

    """
    found = steps(options.out)
    unknown = set(options.only) - {step.name for step in found}
    if unknown:
        raise ValueError(f"--only must name steps of {[step.name for step in found]}, got {sorted(unknown)}; drop them")
    if not torch.cuda.is_available():
        raise RuntimeError("a GPU must be there, got none that PyTorch sees; without one, pytest runs the interpreter")
    return [step for step in found if not options.only or step.name in options.only]


def main(argv: Sequence[str] | None = None) -> None:
    with sentence_at_fault(PROGRAM):
        options = parsed(Options, PROGRAM, __doc__, argv)
        to_run = chosen(options)
    good = run_all(to_run, options.out)
    draw(options.out)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
