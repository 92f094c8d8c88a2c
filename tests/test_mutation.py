"""Changes of modules, and what tests say of them, on a repository of one module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SMALL = '''"""A module."""

from __future__ import annotations

LIMIT: int | None = 3


def above(x: int) -> bool:
    return x > LIMIT


def unused(x: int) -> int:
    y = x + 1
    return {"x": x, **{"y": y}}["y"]
'''
TESTS = """
from renyi_kd.small import above


def test_far():
    assert above(9)
    assert not above(0)


def test_near():
    assert not above(3)


def test_broken():
    assert above(0)
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    (folder / "renyi_kd").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "renyi_kd/__init__.py").touch()
    (folder / "renyi_kd/small.py").write_text(SMALL)
    (folder / "tests/test_small.py").write_text(TESTS)
    return folder


def run(folder: Path, *lines: str) -> str:
    """Run lines of Python with the small repository in the place of this one."""
    begin = [
        "import sys",
        "from pathlib import Path",
        "root = Path(sys.argv[1])",
        # Nothing of the repository is imported before a fork, and so nothing of this one.
        "sys.modules.pop('renyi_kd', None)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*begin, *lines]), str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_trial_says_what_tests_say(small):
    said = run(
        small,
        "from benchmarks.mutation.trials import change, trial",
        "module = root / 'renyi_kd/small.py'",
        "before = module.read_text()",
        "tests = ['tests/test_small.py::test_far', 'tests/test_small.py::test_near']",
        "print(trial(root, tests, 60)[:2])",
        # Of the same size, within a second of what was compiled.
        "change(module, before.replace('x > L', 'x < L'))",
        "print(trial(root, tests, 60)[:2])",
        "change(module, before.replace('x > L', 'x >=L'))",
        "print(trial(root, tests, 60)[:2])",
        "change(module, before.replace('x > LIMIT', '1 / 0'))",
        "print(trial(root, tests[:1], 60)[:2])",
        "change(module, before + 'import nothing')",
        "print(trial(root, tests, 60)[0])",
        "(root / 'conftest.py').write_text('import renyi_kd.small')",
        "print(trial(root, tests, 60)[:2])",
        "(root / 'conftest.py').unlink()",
        "change(module, before.replace('    return x >', '    while True: pass\\n    return x >'))",
        "print(trial(root, tests, 2)[:2])",
        "change(module, before.replace('x > L', 'x >=L'))",
        "print(trial(root, [tests[0], 'tests/test_small.py::test_old', tests[1] + '[of old]'], 60)[:2])",
        "change(module, before)",
        "print(trial(root, tests, 60)[:2])",
        "try:",
        "    trial(root, ['tests/test_small.py::test_nothing'], 60)",
        "except RuntimeError as error:",
        "    print(str(error)[:50])",
    )
    far, near = (f"tests/test_small.py::test_{name}" for name in ("far", "near"))
    assert said.splitlines() == [
        "('survived', '')",
        f"('killed', '{far}')",
        f"('killed', '{near}')",
        f"('killed', '{far}')",
        "killed",
        "('killed', '')",
        "('timed out', '')",
        f"('killed', '{near}')",
        "('survived', '')",
        "trial: the tests must be found, got none of tests/",
    ]


def test_what_a_trial_leaves_running_is_ended(small):
    (small / "tests/test_small.py").write_text(
        "import subprocess\n\n\ndef test_starts():\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    open('child', 'w').write(str(child.pid))\n"
        "    assert False\n"
    )
    run(
        small,
        "import os, time",
        "from benchmarks.mutation.trials import trial",
        "assert trial(root, ['tests'], 60).said == 'killed'",
        "child = int((root / 'child').read_text())",
        "state = lambda: Path(f'/proc/{child}/stat')",
        "end = time.monotonic() + 30",
        # Gone, or dead and not waited for.
        "while state().exists() and state().read_text().split()[2] != 'Z':",
        "    assert time.monotonic() < end",
        "    time.sleep(.02)",
    )


def test_changes_leave_alone_what_is_not_evaluated():
    pytest.importorskip("cosmic_ray", reason="of the extra mutation")
    from benchmarks.mutation.mutants import mutants

    count, found = mutants(SMALL)
    # One is the unpacking of a mapping, taken for a power.
    assert count == len(found) + 1
    assert ("LIMIT: int | None = 3", "LIMIT: int | None = 4") in {(one.before, one.after) for one in found}
    after = {one.after for one in found}
    assert {"return x >= LIMIT", "return x <= LIMIT", "y = x - 1"} <= after
    # Neither annotations nor the number of places depend on what is drawn.
    assert not any("&" in each for each in after)
    for seed in range(3):
        total, drawn = mutants(SMALL, 2, seed)
        assert (total, len(drawn)) == (count, 2)
        assert {one.name for one in drawn} <= {one.name for one in found}
        assert mutants(SMALL, 2, seed)[1] == drawn
    for one in found:
        assert SMALL.splitlines()[one.line - 1].strip() in one.before
        assert one.source != SMALL


def test_the_commands_find_what_no_test_notices(small, tmp_path):
    pytest.importorskip("cosmic_ray", reason="of the extra mutation")
    pytest.importorskip("coverage", reason="of the extra mutation")
    if shutil.which("git") is None:
        pytest.skip("the files of a repository are those that git knows")
    subprocess.run(["git", "init", "-q", str(small)], check=True)
    out = tmp_path / "out"
    program = [
        "import benchmarks.mutation.__main__ as mutation",
        "mutation.ROOT, mutation.prepare = root, lambda: None",
        "mutation.EQUIVALENT = root / 'equivalent.csv'",
        f"out = ['--out', {str(out)!r}]",
    ]
    module = "renyi_kd/small.py"
    program += [
        "assert mutation.main(['reach', 'tests/test_small.py', *out]) == 0",
        f"assert mutation.main(['run', {module!r}, '--mutants', '0', *out]) == 0",
    ]
    said = run(small, *program)
    # One fails whatever is changed.
    assert "1 failed, 2 passed" in said
    assert "2 tests pass, in " in said
    state = json.loads((out / "renyi_kd.small.py.json").read_text())
    outcomes = {one["after"]: (one["outcome"], one["test"].split("::")[-1]) for one in state["tried"].values()}
    assert outcomes["return x >= LIMIT"] == ("killed", "test_near")
    assert outcomes["return x <= LIMIT"][0] == "killed"
    assert outcomes["y = x - 1"] == ("survived", "")
    assert state["mutants"] == len(state["tried"]) + 1
    # What survived is tried again, as a test may have been added; what was killed or explained is not.
    (small / "equivalent.csv").write_text(f"module,before,after,why\n{module},y = x + 1,y = x - 1,Unused.\n")
    with (small / "tests/test_small.py").open("a") as file:
        file.write("\n\ndef test_unused():\n    from renyi_kd.small import unused\n\n    assert unused(1) in (0, 2)\n")
    said = run(small, *program, "mutation.main(['table', '--csv', str(root / 'rows.csv'), *out])")
    survived = [outcome for outcome, _ in outcomes.values()].count("survived")
    assert sum(line.startswith(f"{module} ") for line in said.splitlines()) == survived - 1
    # The one that is explained is counted apart, and is not shown.
    assert "->  y = x - 1" not in said
    header, row = (small / "rows.csv").read_text().splitlines()
    counts = dict(zip(header.split(","), row.split(","), strict=True))
    assert (counts["module"], counts["equivalent"]) == (module, "1")
    assert int(counts["killed"]) + int(counts["survived"]) + 1 == int(counts["tried"]) == len(state["tried"])
    assert counts["survived"] == str(sum("  ->  " in line for line in said.splitlines()))


def test_a_command_without_what_it_needs_says_so(capsys, tmp_path, monkeypatch):
    import benchmarks.mutation.__main__ as mutation

    assert mutation.main(["table", "--out", str(tmp_path)]) == 2
    assert "must hold what came of mutants, got nothing; run python -m benchmarks.mutation run MODULE" in (
        capsys.readouterr().err
    )
    assert mutation.main(["run", "renyi_kd/gram.py", "--out", str(tmp_path)]) == 2
    assert "must hold what tests reach, got nothing; run python -m benchmarks.mutation reach" in capsys.readouterr().err
