"""The loss of samples in several processes is that of one: in shards of any size, by channels of the teacher's maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from renyi_kd import InfoSAMLoss, infosam_terms
from renyi_kd.objective import Distillation
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.share_control import FIRST_WEIGHT
from tests.support import in_training, relation_module, sam_features, shared_batch
from tests.support.shared_batch import DIM, GROUPS, Case, together
from tests.support.tolerance import assert_close_on_scale

in_processes = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks of one")
COMBINATIONS = [(form, wrapper) for form in get_args(Distillation) for wrapper in (None, "ddp", "fsdp2")]


def drawn_shards(n_processes: int, n: int) -> list[list[list[int]]]:
    """Return some shards as hypothesis draws them, always the same: prompts of each image of each process."""
    shard = st.lists(st.integers(0, 2), max_size=3)
    found = []

    @settings(max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.lists(shard, min_size=n_processes, max_size=n_processes).filter(lambda drawn: sum(map(sum, drawn)) >= 2))
    def draw(drawn: list[list[int]]) -> None:
        found.append(drawn)

    draw()
    return found


def drawn_cases(n_each: int) -> list[Case]:
    """Return some cases of every number of processes, form and wrapper, each with shards of its own."""
    cases = []
    for n in GROUPS:
        for number, drawn in enumerate(drawn_shards(n, n_each * len(COMBINATIONS))):
            form, wrapper = COMBINATIONS[number % len(COMBINATIONS)]
            cases.append(Case(drawn, form, wrapper, 1 + number % 2, number % 3 == 0))
    return cases


CASES = drawn_cases(1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return shared_batch.found_by_processes(tmp_path_factory.mktemp("shards"), CASES)


def of_group(found: Sequence[dict[int, Any]], n: int) -> list[Any]:
    """Return what the processes of a group found."""
    return [found[rank][n] for rank in GROUPS[n]]


def steps_of(found: Sequence[dict[int, Any]], cases: Sequence[Case], number: int) -> list[dict[str, Any]]:
    """Return what each process found of a case."""
    n = cases[number].n_processes
    place = sum(case.n_processes == n for case in cases[:number])
    return [of_rank["steps"][place] for of_rank in of_group(found, n)]


def whole_batch(case: Case) -> shared_batch.Inputs:
    return together([shared_batch.inputs_of(case, rank) for rank in range(case.n_processes)])


def assert_step_of_one_process(case: Case, of_ranks: Sequence[dict[str, torch.Tensor]]) -> None:
    """Assert that loss and gradients are those of one process with the whole batch, in fp64 to 1e-12."""
    expected = shared_batch.step_of(case, whole_batch(case))
    for of_rank in of_ranks:
        # Bit for bit, or processes would drift apart.
        assert torch.equal(of_rank["loss"], of_ranks[0]["loss"])
        assert of_rank.keys() == expected.keys()
    torch.testing.assert_close(of_ranks[0]["loss"], expected.pop("loss"), rtol=1e-12, atol=1e-12)
    of_features = ("image_features", "mask_tokens")
    for name, value in expected.items():
        parts = [of_rank[name] for of_rank in of_ranks]
        if case.wrapper is not None:
            for part in parts:
                assert_close_on_scale(part, value, name=name, rtol=1e-12)
            continue
        # Each has the gradient of its own part, times as many as will be averaged.
        mean = torch.cat(parts) / len(parts) if name in of_features else sum(parts) / len(parts)
        assert_close_on_scale(mean, value, name=name, rtol=1e-12)


@in_processes
@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda number: "{1}-{2}-{0}".format(CASES[number].n_processes, *CASES[number][1:3])
)
def test_shards_are_one_batch(found, number):
    assert_step_of_one_process(CASES[number], [of_rank["step"] for of_rank in steps_of(found, CASES, number)])


@in_processes
@pytest.mark.long
def test_many_more_shards_are_one_batch(tmp_path):
    cases = drawn_cases(3)
    found = shared_batch.found_by_processes(tmp_path, cases)
    for number, case in enumerate(cases):
        assert_step_of_one_process(case, [of_rank["step"] for of_rank in steps_of(found, cases, number)])


def test_some_processes_have_no_samples_or_no_images():
    drawn = [shard for case in CASES for shard in case.shards]
    assert any(not shard for shard in drawn)
    assert any(shard and not any(shard) for shard in drawn)


@in_processes
def test_counted_bytes_are_those_of_the_formula(found):
    counted = 0
    for number, case in enumerate(CASES):
        for rank, of_rank in enumerate(steps_of(found, CASES, number)):
            if case.wrapper is None:
                assert of_rank["counted"] == shared_batch.formula(case, rank)
                counted += of_rank["counted"].received
    assert counted > 0


@in_processes
@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("n_channels", [3, 7])
@pytest.mark.parametrize("dtype", shared_batch.DTYPES)
def test_processes_share_the_channels(found, n, n_channels, dtype):
    n_images = shared_batch.N_IMAGES[n]
    whole = torch.cat([shared_batch.maps_of(rank, n_images[rank], n_channels, dtype) for rank in range(n)])
    of_ranks = [of_rank["exchanged"][n_channels, dtype] for of_rank in of_group(found, n)]
    channels, grams = zip(*of_ranks, strict=True)
    assert all(part.dtype == dtype for part in channels)
    assert torch.equal(torch.cat(channels, 1), whole)
    # None has more than one channel more than another.
    assert {part.shape[1] for part in channels} <= {n_channels // n, n_channels // n + 1}
    for gram in grams:
        assert gram.dtype == torch.float64
        assert torch.equal(gram, grams[0])
        assert torch.equal(gram, gram.mT)
        assert_close_on_scale(gram, batch_gram(whole), name="Gram", rtol=1e-12 if dtype == torch.float64 else 1e-6)


@in_processes
@pytest.mark.parametrize("n", GROUPS)
def test_processes_that_have_too_few_samples_together_all_say_so(found, n):
    message = "ValueError: infosam_terms: the processes must have at least {} samples (image, prompt) together, got {};"
    for of_rank in of_group(found, n):
        none, one = of_rank["too few"]
        assert none.startswith(message.format(1, 0))
        assert one.startswith(message.format(2, 1))


@in_processes
@pytest.mark.parametrize("n", GROUPS)
def test_banks_and_weights_beside_a_process_without_samples(found, n):
    case = shared_batch.few_shards(n)
    inputs = whole_batch(case)
    features = in_training(shared_batch.features_of(shared_batch.student_of(case), inputs))
    banked, weighed = shared_batch.loss_of(case, bank_size=3), shared_batch.loss_of(case._replace(form="jensen_renyi"))
    expected = {
        "banked": [banked(inputs.teacher, features).item() for _ in range(2)],
        "weighed": weighed(
            inputs.teacher, features, sample_weight=torch.cat([shared_batch.weight_of(case, rank) for rank in range(n)])
        ).item(),
    }
    for of_rank in of_group(found, n):
        assert of_rank["beside others"]["banked"] == pytest.approx(expected["banked"], rel=1e-12)
        assert of_rank["beside others"]["weighed"] == pytest.approx(expected["weighed"], rel=1e-12)


@in_processes
@pytest.mark.parametrize("n", GROUPS)
def test_a_share_is_that_of_the_group(found, n):
    weights = {of_rank["followed"] for of_rank in of_group(found, n)}
    assert len(weights) == 1
    assert weights != {FIRST_WEIGHT}


@in_processes
@pytest.mark.parametrize("n", GROUPS)
def test_a_loss_with_a_group(found, n):
    for of_rank in of_group(found, n):
        says = of_rank["with a group"]
        assert f"bank_size=0, process_group={GROUPS[n]}" in says["repr"]
        assert "process_group" not in says["repr without"]
        assert says["copied"]
        assert says["pickled without"]
        assert "InfoSAMLoss: process_group must be None in what is pickled, got a group" in says["pickled"]
        assert "InfoSAMLoss: process_group must go with global_batch=True or gradient_share=" in says["alone"]
        assert "infosam_terms: process_group must go with global_batch=True, got it" in says["alone as a function"]


@in_processes
def test_a_process_outside_of_the_group_is_told(found):
    for n, ranks in GROUPS.items():
        for rank in set(range(shared_batch.N_PROCESSES)) - set(ranks):
            assert "InfoSAMLoss: process_group must hold the process that calls, got a group of" in found[rank][n]


def test_what_is_no_group():
    features = sam_features(seed=0), in_training(sam_features(seed=1))
    message = "{}: process_group must be a torch.distributed.ProcessGroup, got str; torch.distributed.new_group"
    with pytest.raises(TypeError, match=message.format("InfoSAMLoss")):
        InfoSAMLoss(DIM, global_batch=True, process_group="gloo")
    with pytest.raises(TypeError, match=message.format("infosam_terms")):
        infosam_terms(relation_module(), *features, global_batch=True, process_group="gloo")


def test_one_process_needs_samples():
    empty = sam_features(seed=0)
    empty = empty._replace(image_features=empty.image_features[:0], mask_tokens=empty.mask_tokens[:0])
    with pytest.raises(ValueError, match=r"image_features must have shape \[b, d, h, w\] without zeros"):
        infosam_terms(relation_module(), empty, in_training(empty), global_batch=True)
    with pytest.raises(ValueError, match=r"image_features must have shape \[b, d, h, w\] without zeros"):
        InfoSAMLoss(12, global_batch=True)(empty, in_training(empty))
