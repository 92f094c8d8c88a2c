"""Entropies of samples that lie in several processes: those of one process, memory, bytes, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from renyi_kd import RBF, feature_entropy, feature_mutual_information
from renyi_kd.ops.gram_moment import ring
from renyi_kd.ops.gram_moment.shards import Shards
from tests.support import randn
from tests.support.shards import (
    KERNELS,
    LONG,
    MANY,
    MEMBERS,
    N_PROCESSES,
    SMALL,
    TILE_BYTES,
    WIDE,
    Case,
    layer,
    run_checks,
)
from tests.support.tolerance import assert_close_on_scale


@st.composite
def cases(draw) -> Case:
    n_processes = draw(st.sampled_from(list(MEMBERS)))
    shards = st.lists(st.integers(0, 6), min_size=n_processes, max_size=n_processes)
    counts = draw(shards.filter(lambda counts: sum(counts) >= 2))
    name = draw(st.sampled_from(["feature_entropy", "feature_mutual_information"]))
    n_variables = 2 if name == "feature_mutual_information" else draw(st.integers(1, 4))
    kernels = draw(st.lists(st.sampled_from(list(KERNELS)), min_size=n_variables, max_size=n_variables))
    return Case(name, counts, kernels, draw(st.integers(0, 2**31)))


def drawn() -> list[Case]:
    """Return cases; all at once, as the processes that run them are started once."""
    found = []

    @settings(max_examples=50)
    @given(cases())
    @example(Case("feature_mutual_information", [0, 5], ["rbf", "linear"], seed=0))
    @example(Case("feature_entropy", [4, 0, 3], ["median", "cubic", "linear"], seed=1))
    @example(Case("feature_entropy", [0, 0, 6, 0], ["rbf"], seed=2))
    @example(Case("feature_entropy", [5, 4, 1, 6], ["rbf", "linear", "cubic", "median"], seed=3))
    def collect(case):
        found.append(case)

    collect()
    return found


@pytest.fixture(scope="module")
def drawn_cases() -> list[Case]:
    return drawn()


@pytest.fixture(scope="module")
def found(drawn_cases, tmp_path_factory):
    return run_checks(tmp_path_factory.mktemp("shards"), drawn_cases)


# The same as one process.


def test_value_and_gradients_are_those_of_one_process(drawn_cases, found):
    for index, case in enumerate(drawn_cases):
        members = MEMBERS[len(case.counts)]
        of_members = [found[rank]["cases"][index] for rank in members]
        values, *gradients = zip(*of_members, strict=True)
        expected = case.computed(case.features())
        assert abs(values[0] - expected[0]) <= 1e-12, case
        assert all(torch.equal(value, values[0]) for value in values), case
        scale = max(gradient.abs().max().item() for gradient in expected[1:])
        for shards, whole in zip(gradients, expected[1:], strict=True):
            # An average over processes is the gradient of the value.
            actual = torch.cat(shards) / len(members)
            assert_close_on_scale(actual, whole, name=str(case), rtol=1e-12, scale=max(scale, 1e-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_that_of_one_process(dtype, found):
    values, *gradients = zip(*(process["low_precision"][str(dtype)] for process in found), strict=True)
    expected = SMALL.computed(SMALL.features(dtype))
    assert values[0].dtype == torch.float32
    assert values[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for shards, whole in zip(gradients, expected[1:], strict=True):
        actual = torch.cat(shards)
        assert actual.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps + 2e-6
        assert_close_on_scale(actual.float() / N_PROCESSES, whole.float(), name=str(dtype), rtol=tolerance)


def test_median_is_of_the_same_samples(found):
    expected = feature_entropy(randn(sum(MANY), 2), kernel="rbf")
    for process in found:
        assert process["median_of_many"].item() == pytest.approx(expected.item(), rel=1e-7)


def test_an_average_over_processes_is_the_gradient_of_the_value(found):
    model = layer()
    feature_entropy(model(randn(12, 3, seed=5)), kernel=RBF(1.5)).backward()
    for process in found:
        assert_close_on_scale(process["averaged_parameters"], model.weight.grad, name="weight", rtol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_every_pair_of_two_processes_meets_once(counts):
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    met = torch.zeros(sum(counts), sum(counts))
    work = []
    for rank, start in enumerate(starts):
        shards = Shards("test", None, rank, tuple(counts))
        before = met.sum()
        for hop in range(1, shards.n_hops + 1):
            visitor = (rank - hop) % len(counts)
            own, others = torch.arange(counts[rank]) + start, torch.arange(counts[visitor]) + starts[visitor]
            rows, cols = ring.share(shards, hop)
            met[own[rows][:, None], others[cols]] += 1
        work.append(met.sum() - before)
    whose = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert torch.equal(met + met.T, (whose[:, None] != whose).float())
    if len(set(counts)) == 1:
        # An odd row of two halves is all that one of two processes does more.
        assert max(work) - min(work) <= counts[0]


# Memory and bytes.


def test_no_process_holds_all_rows(found):
    shard = 4 * LONG * WIDE
    for process in found:
        largest, of_forward, of_both = process["memory_and_bytes"]
        assert largest <= max(shard, TILE_BYTES)
        # Two hops; the gradient makes them again, and brings as many gradients.
        assert of_forward == 2 * shard
        assert of_both == 2 * shard + 4 * shard


# Refusals.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("width", r"got .*\[n, 2\].* in process 0 and .*\[n, 3\].* in process 1; use the same function"),
        ("dtype", r"got .*torch.float32.* in process 0 and .*torch.float64.* in process 1; use"),
        ("kernel", r"got .*under Linear\(\).* in process 0 and .*under RBF\(bandwidth=2.0\).* in process 1; use"),
        ("number of variables", r"got .* of (\[n, 2\][^,]*, ){2}impl.* and .* of (\[n, 2\][^,]*, ){3}impl"),
        ("function", r"got feature_entropy of .* in process 0 and feature_mutual_information of .* in process 1; use"),
        ("gradient", r"got .*float32 without gradient.* in process 0 and .*float32 with gradient.* in process 1; use"),
        ("impl", r"got .*impl='auto' in process 0 and .*impl='reference' in process 1; use"),
    ],
)
def test_processes_that_call_otherwise(name, message, found):
    for rank, process in enumerate(found):
        said = process["refusals"][name]
        function = "feature_mutual_information" if (name, rank) == ("function", 1) else "feature_entropy"
        pattern = rf"ValueError: {function}: all processes of the group must call alike, {message}"
        assert re.search(pattern, said), said


def test_a_process_that_refuses_its_features(found):
    own = "feature_entropy: features[0] must be a floating-point tensor, got torch.int64; convert with .float()"
    for rank, process in enumerate(found):
        said = process["refusals"]["one that refuses"]
        if rank == 1:
            assert said == f"TypeError: {own}"
        else:
            assert said == (
                "ValueError: feature_entropy: every process of the group must have features that fit, got none of "
                f"process 1, which raised: {own}"
            )


def test_what_no_process_can_do(found):
    for process in found:
        said = process["refusals"]
        assert said["no sample"].startswith(
            "ValueError: feature_entropy: the processes of the group must have a sample together, got none in 4"
        )
        assert said["triton"].startswith("RuntimeError: renyi_kd: impl='triton' must have what Triton needs, got ")
        assert "request for a second derivative" in process["second_derivative"]


def test_a_process_that_leaves_is_named(found):
    for rank in (1, 3):
        said = found[rank]["a_process_that_leaves"]
        assert said.startswith("RuntimeError: feature_entropy: processes "), said
        assert "2" in said.partition("must take part")[0], said


@pytest.mark.parametrize("group", ["WORLD", -100], ids=["name", "not of this process"])
def test_a_group_must_be_one(group):
    x = torch.eye(2)
    with pytest.raises(TypeError, match=r"feature_entropy: process_group must be a process group that has this"):
        feature_entropy(x, process_group=group)
    with pytest.raises(TypeError, match=r"feature_mutual_information: process_group must be .* or None, got "):
        feature_mutual_information(x, x, process_group=group)
