"""Which lines of the package each test reaches, and how long it takes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.files import whole_file
from benchmarks.mutation.trials import QUIETLY

PACKAGE = "renyi_kd"
# Lines that are beside a line.
NEAR = 6
# Seconds that a test takes before it begins.
COLLECTION = 0.01


class Reach:
    """Tests that pass, with their seconds, and for every file of the package the tests that reach its lines.

    Args:
        seconds: of each test by its id.
        lines: of each file by its path and line, the ids.

    """

    def __init__(self, seconds: dict[str, float], lines: dict[str, dict[int, list[str]]]) -> None:
        self.seconds, self.lines = seconds, lines

    def tests(self, path: str, line: int) -> list[str]:
        """Return the tests that reach a line; of a line that an import runs, those of the file.

        Those come first that reach a line beside it, as that of an error, which few others reach; then the fastest.
        """
        found = self.lines.get(path, {}).get(line)
        if not found:
            return self.of_file(path)
        beside = [self.lines[path].get(each, []) for each in range(line - NEAR, line + NEAR + 1)]
        fewest: dict[str, int] = {}
        for tests in beside:
            fewest.update({test: min(len(tests), fewest.get(test, len(tests))) for test in tests})
        return sorted(self._fastest_first(found), key=lambda test: fewest[test])

    def of_file(self, path: str) -> list[str]:
        """Return the tests that reach any line of a file, the fastest first."""
        return self._fastest_first({test for tests in self.lines.get(path, {}).values() for test in tests})

    def beside(self, tests: Iterable[str]) -> list[str]:
        """Return all tests of the same modules: fixtures that several tests share are reached by one alone."""
        modules = {test.split("::")[0] for test in tests}
        return self._fastest_first(test for test in self.seconds if test.split("::")[0] in modules)

    def merged(self, other: Reach) -> Reach:
        """Return this with the tests of another, which replace those of the same modules."""
        modules = {test.split("::")[0] for test in other.seconds}

        def kept(tests: Iterable[str]) -> list[str]:
            return [test for test in tests if test.split("::")[0] not in modules]

        lines = {path: {line: kept(tests) for line, tests in found.items()} for path, found in self.lines.items()}
        for path, found in other.lines.items():
            for line, tests in found.items():
                lines.setdefault(path, {}).setdefault(line, []).extend(tests)
        return Reach({**{test: self.seconds[test] for test in kept(self.seconds)}, **other.seconds}, lines)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        names = list(self.seconds)
        number = {name: index for index, name in enumerate(names)}
        lines = {
            file: {line: [number[test] for test in tests if test in number] for line, tests in found.items()}
            for file, found in self.lines.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))

    @classmethod
    def read(cls, path: Path) -> Reach:
        """Return what was written; nothing if there is no file."""
        if not path.is_file():
            return cls({}, {})
        found = json.loads(path.read_text())
        names = list(found["seconds"])
        lines = {
            file: {int(line): [names[index] for index in tests] for line, tests in lines.items()}
            for file, lines in found["lines"].items()
        }
        return cls(found["seconds"], lines)

    def within(self, tests: Iterable[str], seconds: float) -> list[str]:
        """Return the first of the tests that take no more than so many seconds together; at least one."""
        found, left = [], seconds
        for test in tests:
            left -= self.seconds[test] + COLLECTION
            if found and left < 0:
                break
            found.append(test)
        return found

    def _fastest_first(self, tests: Iterable[str]) -> list[str]:
        """Return the tests with the fastest case of each function before the second of any."""
        cases: Counter[str] = Counter()
        ranked = []
        for test in sorted({test for test in tests if test in self.seconds}, key=lambda one: (self.seconds[one], one)):
            function = test.split("[")[0]
            ranked.append((cases[function], len(ranked), test))
            cases[function] += 1
        return [test for _, _, test in sorted(ranked)]


def measured(root: Path, arguments: list[str]) -> Reach:
    """Run tests in this process, which has not imported the package, and return what they reach.

    Tests that fail are left out: they would fail with every change.
    """
    import coverage

    watched = coverage.Coverage(data_file=None, source=[str(root / PACKAGE)], config_file=False)
    watcher = _Watcher(watched)
    watched.start()
    try:
        pytest.main([*QUIETLY, *arguments], plugins=[watcher])
    finally:
        watched.stop()
    data = watched.get_data()
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        path = Path(file).relative_to(root).as_posix()
        found = data.contexts_by_lineno(file)
        lines[path] = {line: [test for test in tests if test in watcher.seconds] for line, tests in found.items()}
    return Reach(watcher.seconds, lines)


class _Watcher:
    """Tells the lines of one test from those of another."""

    def __init__(self, watched: Any) -> None:
        self.watched = watched
        self.seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.watched.switch_context(item.nodeid)
        started = time.perf_counter()
        result = yield
        self.watched.switch_context("")
        if item.nodeid not in self._failed:
            self.seconds[item.nodeid] = round(time.perf_counter() - started, 3)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self._failed.add(report.nodeid)
