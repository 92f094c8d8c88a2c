"""A module with a change, and whether tests notice: each trial in a fork of a process that has imported the rest."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import hypothesis
import pytest

# What tests import besides the package: seconds, of which no trial should pay any.
IMPORTED = (
    *("torch", "torch._dynamo", "transformers", "peft", "triton"),
    *("scipy", "hypothesis", "matplotlib", "safetensors"),
)
# To pytest, without plugins that other packages bring.
QUIETLY = ("-q", "--color=no", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin")
PASSED = pytest.ExitCode.OK


class Outcome(NamedTuple):
    """What came of a trial: "killed", with the test or module that failed, "survived" or "timed out"; and the time."""

    said: str
    test: str
    seconds: float


def prepare() -> None:
    """Import what is not changed, once for all trials."""
    # As the tests have it, and before Triton is imported.
    os.environ.update(
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    from benchmarks.torchvision_compat import ensure_importable

    ensure_importable()
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # What is here stays, and no fork looks through it for garbage.
    gc.collect()
    gc.freeze()


def change(path: Path, source: str) -> None:
    """Write a module anew, and forget what was compiled of it: two changes within a second may look alike by size."""
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


@contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """Yield a copy of all files of a repository, in which a module can be changed."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    with TemporaryDirectory() as folder:
        # Tests read the folder's path back with its links followed.
        copy = Path(folder).resolve() / root.name
        for name in names.stdout.split("\0"):
            if name and (root / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, copy / name)
        yield copy


def in_fork(root: Path, work: Callable[[], int], seconds: float) -> tuple[int | None, str]:
    """Run a function in a fork whose working directory and first place to import from is ``root``.

    Returns:
        the status that it returned, None after so many seconds, and what it printed.

    """
    said = root.parent / "said.txt"
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            # A group of its own, with which the processes that tests start can be ended.
            os.setsid()
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(root)
            sys.path.insert(0, str(root))
            os.environ["PYTHONPATH"] = str(root)
            for name in [name for name in sys.modules if name.split(".")[0] in ("benchmarks", "tests")]:
                del sys.modules[name]
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    status: int | None = None
    while time.monotonic() < end:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.02)
    # Also what a test that failed left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    return status, said.read_text(errors="replace") if said.is_file() else ""


def trial(root: Path, tests: Sequence[str], seconds: float) -> Outcome:
    """Run tests until one fails.

    Functions that are not there are left out. Of one whose cases have other names, by the change or since it was known
    what tests reach, all are run.

    Raises:
        RuntimeError: none is there.

    """
    first = root.parent / "failed.json"
    first.unlink(missing_ok=True)
    started = time.monotonic()

    def work() -> int:
        functions = dict.fromkeys(map(_function, tests))
        return int(pytest.main([*QUIETLY, "-x", "-m", "", "--tb=no", *functions], plugins=[_Trial(tests, first)]))

    status, said = in_fork(root, work, seconds)
    took = round(time.monotonic() - started, 2)
    if status is None:
        return Outcome("timed out", "", took)
    if status == PASSED:
        return Outcome("survived", "", took)
    failed = json.loads(first.read_text()) if first.is_file() else ""
    # Where the package cannot be imported any more nothing is looked for.
    missing = set(re.findall(rf"^ERROR: not found: {re.escape(str(root))}/(.*)$", said, re.MULTILINE))
    if not failed and (missing or status == pytest.ExitCode.NO_TESTS_COLLECTED):
        present = [test for test in tests if _function(test) not in missing]
        if not present or len(present) == len(tests):
            raise RuntimeError(f"trial: the tests must be found, got none of {', '.join(tests[:3])}: {said[-500:]}")
        return trial(root, present, seconds)
    return Outcome("killed", failed, took)


def _function(test: str) -> str:
    """Return a test without its case."""
    return test.partition("[")[0]


class _Trial:
    """Runs tests in their order, and keeps the name of the first that fails."""

    def __init__(self, tests: Sequence[str], path: Path) -> None:
        self.place = {test: place for place, test in enumerate(tests)}
        self.path = path

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {_function(item.nodeid) for item in items if item.nodeid in self.place}
        items[:] = [item for item in items if item.nodeid in self.place or _function(item.nodeid) not in known]
        items.sort(key=lambda item: self.place.get(item.nodeid, 0))

    def pytest_configure(self) -> None:
        # Any example that fails will do: to look for the smallest takes long.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("trial", hypothesis.settings.default, phases=phases)
        hypothesis.settings.load_profile("trial")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._keep(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._keep(report)

    def _keep(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(json.dumps(report.nodeid))
