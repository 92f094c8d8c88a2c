"""Every kernel compiled for GPUs that need not be there: for one in every configuration, for others in the largest.

A change of a kernel needs the long test too: pytest -m "slow or long" tests/test_ahead_of_time.py
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")

import renyi_kd.ops
from renyi_kd.objective import Distillation

ROOT = Path(__file__).parent.parent
# The targets that one process compiles for: the one whose code is counted and one of another maker, or all.
FEW = ["sm_90", "gfx942"]
GROUPS = [["sm_90"], ["sm_80", "sm_86", "sm_89"], ["sm_75", "sm_100", "sm_120"], ["gfx942", "gfx1100"]]
# For these every kernel is compiled, for the others those that may not fit there.
WHOLE = {"sm_80", "sm_90", "gfx942"}


def run(*words: str) -> list[dict[str, Any]]:
    """Return the rows of the program, run in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.ahead_of_time", *words]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def kernels() -> set[str]:
    """Return the names of all kernels that the package has."""
    names = set()
    for module in pkgutil.walk_packages(renyi_kd.ops.__path__, "renyi_kd.ops."):
        # The interpreter's functions are of another class than the compiler's.
        values = vars(importlib.import_module(module.name)).values()
        names |= {value.__name__ for value in values if hasattr(value, "arg_names") and hasattr(value, "fn")}
    return {name for name in names if name.endswith("_kernel")}


@pytest.mark.slow
def test_large_tiles_compile_and_fit():
    rows = run("--targets", *FEW, "--large")
    check(FEW, rows)
    assert {row["kernel"] for row in rows if row["target"] == "sm_90"} == kernels()


@pytest.mark.long
@pytest.mark.parametrize("targets", GROUPS, ids=" ".join)
def test_kernels_compile_and_fit(targets):
    rows = run("--targets", *targets)
    check(targets, rows)
    for target in set(targets) & WHOLE:
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels()
    if "sm_90" in targets:
        constants = {value for row in rows for value in row["constants"].values() if isinstance(value, str)}
        assert constants >= set(get_args(Distillation))


def check(targets: list[str], rows: list[dict[str, Any]]) -> None:
    """Raise unless there is code for every target, which fits into its registers and its shared memory."""
    assert {row["target"] for row in rows} == set(targets)
    for row in rows:
        assert row["machine_code_bytes"] > 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["spilled"] == 0, row


def test_a_planted_spill_is_found():
    rows = run("--targets", "sm_75", "gfx942", "--planted")
    assert [row["target"] for row in rows] == ["sm_75", "gfx942"]
    for row in rows:
        assert row["spilled"] > 0, row
