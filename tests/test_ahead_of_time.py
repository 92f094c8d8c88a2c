"""Every kernel compiled for GPUs that need not be there: for one in every configuration, for others in the largest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")
TARGETS = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_90", "sm_100")), "gfx942"]
# Of the terms on Grams, of their variants, and of the loss. One target has all tiles from the smallest to the largest,
# the others the largest, in which they differ.
SAMPLES = {"sm_90": ((1, 2, 4, 16, 32, 64, 256), (1, 64), (4, 32, 64))}
LARGE_SAMPLES = ((64, 256), (64,), (4, 64))
FORMS = ("mutual_information", "cauchy_schwarz", "debiased", "jensen_renyi")
KERNELS = {
    "_batch_gram_bwd_kernel",
    "_batch_gram_fwd_kernel",
    "_gram_moment_bwd_kernel",
    "_gram_moment_fwd_kernel",
    "_gram_terms_bwd_kernel",
    "_gram_terms_fwd_kernel",
    "_relation_directions_bwd_kernel",
    "_relation_directions_fwd_kernel",
    "_relation_grams_kernel",
    "_relation_scores_bwd_kernel",
    "_relation_scores_fwd_kernel",
    "_relation_weights_bwd_kernel",
    "_teacher_pass_kernel",
}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_fit(target):
    # In a process that does not interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.ahead_of_time", target],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    terms = [row["constants"] for row in rows if row["kernel"] == "_gram_terms_fwd_kernel"]
    forms = {
        (constants["FORM"], constants["DETACH"], "weight_ptr" not in constants, constants["BLOCK_S"])
        for constants in terms
    }
    samples, varied_samples, losses = SAMPLES.get(target, LARGE_SAMPLES)
    of_terms = {(form, False, False, size) for form, size in product(FORMS, samples)}
    # Pairs have a constant teacher anyway, and weights or none.
    of_terms |= {
        (form, form != "jensen_renyi", form == "jensen_renyi", size) for form, size in product(FORMS, varied_samples)
    }
    of_losses = {("mutual_information", False, False, size) for size in losses} | {("jensen_renyi", False, True, 1)}
    assert forms == of_terms | of_losses
    for row in rows:
        assert row["machine_code_bytes"] > 0, row
        assert row["spilled"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
