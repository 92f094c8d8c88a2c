"""What a step of the loss costs the host, beside the textbook's in one run; nothing of it is time of a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host_time, measure

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")
ROOT = Path(__file__).parent.parent
COLUMNS = list(measure.read_rows(ROOT / "benchmarks/results/host_time.csv").columns)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub is built by gcc")
def test_a_step_costs_the_host_half_of_the_textbook(tmp_path):
    """With an operator for the loss and Triton's own launches it was over .8; at rest it is some .25."""
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.host_time", "--out", str(out), "--turns", "10", "--steps", "30"]
    subprocess.run([*command, "--providers", "textbook", "triton"], cwd=ROOT, check=True, capture_output=True)
    rows = measure.read_rows(out).set_index("provider")
    assert set(rows.reset_index()) == set(COLUMNS) - {"of_textbook_compiled"}
    assert set(rows["timed"]) == {"host, over a stub of libcuda"}
    assert float(rows.loc["textbook", "of_textbook"]) == 1
    assert 0 < float(rows.loc["triton", "of_textbook"]) < 0.5


def test_the_textbook_is_always_beside():
    with pytest.raises(SystemExit, match="'textbook' among them"):
        host_time.main(["--providers", "triton"])
