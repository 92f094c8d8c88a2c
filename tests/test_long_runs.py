"""Long runs: memory, objects and time per step stay flat, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.support.long_run import Run, run
from tests.support.started import ROOT

N_STEPS, WARM_UP = 100_000, 5


def check_flat(found: Run, warm_up: int) -> None:
    """Assert that nothing but the weights changed from the end of a warm-up on, and that nothing is left."""
    objects = found.objects[warm_up:]
    assert max(objects) - min(objects) <= 2, objects
    assert set(found.threads) == {found.before["threads"]}, found.threads
    # The folder that is counted is open itself, before as after.
    assert set(found.files) == {found.before["files"]}, found.files
    assert found.after == found.before
    attached, left = found.hooks
    assert attached > 0
    assert left == 0
    first, last = found.losses
    assert last < first


def test_nothing_piles_up_over_steps_of_every_kind():
    check_flat(run(160, 40), 1)


@pytest.mark.long
def test_memory_and_time_are_flat_over_100_000_steps(tmp_path):
    file = tmp_path / "measured.json"
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.long_run", str(file), str(N_STEPS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    found = Run(**json.loads(Path(file).read_text()))
    assert len(found.resident) == N_STEPS // 1000
    check_flat(found, WARM_UP)
    resident = found.resident[WARM_UP:]
    assert max(resident) <= 1.01 * min(resident), resident
    seconds = found.seconds[WARM_UP:]
    tenth = len(seconds) // 10
    # Generous, as another process may have shared the core for one of them; objects and memory tell the rest.
    assert median(seconds[-tenth:]) <= 1.5 * median(seconds[:tenth]), seconds
