"""How often Triton compiles in a training whose batches vary in size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")
# One for all numbers of samples, but for the teacher's pass: of up to 4, 16 and 64 samples.
EXPECTED = {
    "_relation_directions_fwd_kernel": 1,
    "_teacher_pass_kernel": 3,
    "_relation_scores_fwd_kernel": 1,
    "_relation_grams_kernel": 1,
    "_gram_terms_fwd_kernel": 1,
    "_feature_terms_bwd_kernel": 1,
    "_relation_directions_bwd_kernel": 1,
    "_relation_weights_bwd_kernel": 1,
}


def test_batches_of_any_size_compile_little():
    # In a process that does not interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.compilations", *map(str, range(2, 65))],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    counts: Counter[str] = Counter()
    for row in map(json.loads, result.stdout.splitlines()):
        names = {name: len(keys) for name, keys in row["compiled"].items()}
        print(row["samples"], names)
        counts.update(names)
    assert counts == EXPECTED
    assert counts.total() <= 12
