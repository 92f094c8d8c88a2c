"""Everything that only a GPU can show, in one go of less than eight minutes.

    python -m benchmarks.gpu --out gpu

The kernels' tests on the device (bf16, bitwise repeats and CUDA graphs included), the benchmarks, and some tests once
more under NVIDIA's memory checker, where it is installed. Every step is a process with a time of its own, so that none
takes that of the others; when its time ends it is interrupted, and what it has measured or seen fail by then is kept.
The folder then holds a log per step and the CSV files and picture to commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

from benchmarks.command_line import parsed, sentence_at_fault

PROGRAM = "benchmarks.gpu"
Outcome = Literal["passed", "failed", "out of time", "not installed"]
TESTS = "tests/test_triton.py"
# After an interrupt: pytest then reports the failures so far.
_SECONDS_TO_END = 3
# What reads and writes features of every layout, and the loss as a whole.
CHECKED = "in_every_layout or (loss_is_that_of_the_reference and float32)"


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
        environment: variables of its own.

    """

    name: str
    command: Sequence[str]
    seconds: float
    is_check: bool = False
    environment: Mapping[str, str] = MappingProxyType({})


def steps(out: Path) -> list[Step]:
    """Return all steps, what matters most first."""
    # What other versions of torch and Triton warn of must not keep the tests from being collected.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", TESTS]
    kernels = [sys.executable, "-m", "benchmarks.kernels", "--device", "cuda", "--trials", "2"]
    loss = ["--ops", "infosam_terms", "--batches", "4", "16", "64", "--dtype", "float32", "bfloat16", "--samples"]
    moment = ["--ops", "gram_moment", "--samples", "4096", "16384", "65536", "--batches"]
    pass_and_rows = ["--passes", "forward+backward", "--out", str(out / "kernels_cuda.csv")]
    teachers = [sys.executable, "-m", "benchmarks.teachers", "--device", "cuda", "--amp"]
    # Calls of libraries that ask what a driver has, and are told that it has not, are no errors of ours.
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"]
    # An allocation for every tensor: past the end of one is then past the end of what the checker knows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        # Several processes, as most of the time is the compiler's; not under the checker, which watches one.
        Step("tests", [*pytest, "-n", "8"], 110, is_check=True),
        Step("loss", [*kernels, *loss, *pass_and_rows, "--picture", str(out / "kernels_cuda.png")], 170),
        Step("moment", [*kernels, *moment, *pass_and_rows], 70),
        Step("teachers", [*teachers, "--out", str(out / "teachers_cuda.csv")], 45),
        Step("memory", [*memcheck, *pytest, "-k", CHECKED], 65, is_check=True, environment=uncached),
    ]


def run(step: Step, out: Path) -> Outcome:
    """Run a step; its output goes to its log."""
    if shutil.which(step.command[0]) is None:
        return "not installed"
    with (out / f"{step.name}.log").open("w") as log:
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
    for step in to_run:
        start = time.perf_counter()
        outcome = run(step, out)
        print(
            f"{step.name:<10} {outcome:<14} {time.perf_counter() - start:>5.0f} s  {last_line(out, step)}", flush=True
        )
        good &= outcome in ("passed", "not installed") or (outcome == "out of time" and not step.is_check)
    return good


def last_line(out: Path, step: Step) -> str:
    log = out / f"{step.name}.log"
    lines = log.read_text().split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "")[:100]


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
    if not run_all(to_run, options.out):
        sys.exit(1)


if __name__ == "__main__":
    main()
