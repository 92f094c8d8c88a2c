"""Every kernel in every configuration, compiled for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is Linux only")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
KERNELS = {
    "_batch_gram_bwd_kernel",
    "_batch_gram_fwd_kernel",
    "_gram_moment_bwd_kernel",
    "_gram_moment_fwd_kernel",
    "_infosam_terms_bwd_kernel",
    "_infosam_terms_fwd_kernel",
    "_relation_directions_bwd_kernel",
    "_relation_directions_fwd_kernel",
    "_relation_grams_kernel",
    "_relation_scores_bwd_kernel",
    "_relation_scores_fwd_kernel",
    "_relation_weights_bwd_kernel",
    "_teacher_pass_kernel",
}


@pytest.fixture(scope="module")
def compilers():
    """Start the compilers of all targets side by side, each in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {
        target: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.ahead_of_time", target],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for target in TARGETS
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_fit(target, compilers):
    output, errors = compilers[target].communicate(timeout=900)
    assert compilers[target].returncode == 0, errors[-3000:]
    rows = [json.loads(line) for line in output.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    terms = [row["constants"] for row in rows if row["kernel"] == "_infosam_terms_fwd_kernel"]
    choices = Counter((constants["DETACH"], constants["CAUCHY_SCHWARZ"]) for constants in terms)
    assert choices.keys() == set(product((False, True), repeat=2))
    assert len(set(choices.values())) == 1, choices
    for row in rows:
        assert row["machine_code_bytes"] > 0, row
        assert row["spilled"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
