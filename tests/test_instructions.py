"""The instructions of the kernels that read a map, beside those of the committed rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")

from benchmarks.instructions import PROGRAM, Code, warp_instructions
from benchmarks.measure import read_rows

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks/results/instructions.csv"
SETTING = ["task", "dtype", "layout", "b"]


@pytest.mark.long
def test_no_kernel_takes_more_instructions_than_its_committed_row(tmp_path):
    out = tmp_path / "instructions.csv"
    # In a process that does not interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", PROGRAM, "--batches", "4", "64", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    found, committed = (
        rows.drop_duplicates(SETTING, keep="last").set_index(SETTING) for rows in map(read_rows, (out, ROWS))
    )
    assert len(found) == 2 * 2 * 2 * 6
    ratio = found["warp_instructions"].astype(float) / committed.loc[found.index, "warp_instructions"].astype(float)
    # Other versions of Triton and ptxas differ by less.
    assert ratio.max() < 1.05, json.dumps({str(key): value for key, value in ratio[ratio >= 1.05].items()})
    # But for the mix of 64 samples, whatever their dtype, reading the maps takes longer than the instructions.
    found = found.drop(index=[key for key in found.index if key[0] == "backward of both" and key[3] == "64"])
    assert (found["issue_us"].astype(float) < found["bytes_us"].astype(float)).all()
    assert (found["spilled"].astype(int) == 0).all()


def test_instructions_count_as_often_as_their_loops_turn():
    opcodes = {0: "MOV", 16: "LDG", 32: "FFMA", 48: "BRA", 64: "NOP", 80: "BRA", 96: "EXIT"}
    code = Code(opcodes, [(16, 80), (32, 48)], 32, 0)
    # Once MOV and EXIT; 3 times LDG and the outer branch; 3 times 5 the inner two; nothing for what does nothing.
    assert warp_instructions(code, [3, 5]) == 2 + 3 * 2 + 3 * 5 * 2
    with pytest.raises(ValueError, match="loops must be those of the source"):
        warp_instructions(code, [3, 5, 7])
