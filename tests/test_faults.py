"""Processes that train together, of which one is lost or differs: all others say which one, and why; none waits on."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
import torch
from torch import distributed

from renyi_kd.samples import agreement
from tests.support import faults


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return faults.run_faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("killed", r"got nothing from process 1, which died, hangs .*\(.*peer.*\)"),
        ("hanging", r"got nothing from process 1, which died, hangs .*\(Timed out waiting"),
        ("stopped", r"got nothing from process 1, which died, hangs .*\(Timed out waiting"),
        ("killed in the exchange", r"got no end of it from process(es)? .*1.*, which died or hangs"),
        ("killed with the store", r"got no answer from the store .* most often lives in process 0"),
        ("killed under a share", r"got nothing from process 1, which died, hangs .*\(.*peer.*\)"),
        ("hanging under a share", r"got nothing from process 1, which died, hangs"),
        (
            "refusing under a share",
            r"got nothing from process 1, .*; process 1 raised TypeError: InfoSAMLoss: teacher must be a tap",
        ),
    ],
)
def test_others_are_told_who_is_lost(found, fault, says):
    for rank, of_rank in enumerate(found[fault]):
        if rank == faults.lost_of(fault):
            assert of_rank is None
            continue
        message, seconds = of_rank
        assert message.startswith("RuntimeError: InfoSAMLoss: every process must take part in an exchange")
        assert re.search(says, message), message
        # The wait for those that are late, and what a busy machine takes. A lost connection needs no timeout.
        assert seconds < faults.SHORT + agreement._PATIENCE + 15 < faults.LONG


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        *(
            (name, rf"got {name}: {values[0]} in processes 0 and 2 and {values[1]} in process 1; use")
            for name, values in faults.SETTINGS.items()
        ),
        ("global_batch", "global_batch: True in processes 0 and 2 and False in process 1"),
        ("share", "gradient_share: 0.1 in processes 0 and 2 and 0.3 in process 1"),
        ("shapes", r"maps: \[12, 2, 4\] in processes 0 and 2 and \[12, 2, 5\] in process 1"),
        ("dtypes", r"dtype of maps: torch.float32 in processes 0 and 2 and torch.bfloat16 in process 1"),
        ("weights", r"checksum of the relation module: (\w{16}) in processes 0 and 2 and (?!\1)\w{16} in process 1"),
        ("weights changed in one process", r"checksum .* \w{16} in processes 0 and 2 and \w{16} in process 1; use"),
        ("training apart", r"after a step: ValueError: .*checksum of the relation module: \w{16} in process 0 and"),
        ("in part", "somebody: .* got x: 0 in process 0 and 2 in process 2"),
    ],
)
def test_every_process_is_told_how_they_differ(found, difference, says):
    for rank, of_rank in enumerate(found["differences"]):
        message = of_rank[difference]
        if difference == "in part" and rank == 1:
            assert message == "none"
        else:
            assert message.startswith("ValueError")
            assert re.search(says, message), message


@pytest.mark.parametrize(
    ("refusal", "own"),
    [
        ("refusal", "ValueError: InfoSAMLoss: student.mask_tokens must be finite"),
        ("refusal by type", "TypeError: InfoSAMLoss: teacher must be a tap or SAMFeatures, got str"),
        ("refusal of a function", "ValueError: infosam_terms: alpha must"),
        ("refusal of a compiled loss", "TypeError: InfoSAMLoss: teacher must be a tap or SAMFeatures, got str"),
        ("refusal under a share", "TypeError: InfoSAMLoss: teacher must be a tap or SAMFeatures, got str"),
    ],
)
def test_every_process_is_told_what_one_of_them_refuses(found, refusal, own):
    for rank, of_rank in enumerate(found["differences"]):
        message = of_rank[refusal]
        if rank == faults.LOST:
            assert message.startswith(own)
        else:
            assert re.match(
                rf"ValueError: \w+: every process must have .* got none of process 1, which raised {own}", message
            )


def test_processes_go_on_after_what_all_were_told(found):
    assert [of_rank["nothing"] for of_rank in found["differences"]] == ["none"] * 3


def test_a_process_that_has_begun_nothing_counts_as_zero():
    store = distributed.HashStore()
    # It waits for what nobody has said.
    store.set_timeout(timedelta(seconds=1))
    store.set("renyi_kd/begun/2", "7")
    assert agreement._numbers(store, "begun", [0, 2]) == [0, 7]
    store.set("renyi_kd/begun/0", "5")
    assert agreement._numbers(store, "begun", [0, 2]) == [5, 7]


def test_an_error_of_the_first_step_is_told_in_the_exchange_that_others_wait_in(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(agreement, "_tell", lambda said, *_, exchanges: told.append((said, exchanges)))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="of mine"), agreement.telling_of_errors(torch.device("cpu")):
            raise ValueError("of mine\nin two lines")
    finally:
        distributed.destroy_process_group()
    assert told == [("ValueError: of mine", True)]
