"""A run that was killed goes on from its checkpoint, bit for bit as one that was not."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.utils._pytree import tree_leaves

from renyi_kd import InfoSAMLoss
from renyi_kd.samples.bank import _moved
from tests.support import in_training, resume, sam_features

DIM = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    resume.run_all(folder)
    return folder


def assert_equal(actual: object, expected: object) -> None:
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("form", resume.FORMS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(folder, form):
    whole, killed = (torch.load(folder / f"{form} {how}.pt") for how in ("whole", "killed"))
    assert len(whole["history"]) == resume.N_STEPS
    assert_equal(killed["history"], whole["history"])
    for name in ("both", "average", "optimizer"):
        assert_equal(killed[name], whole[name])
    # Each time it was in the midst of its steps.
    steps = list(map(int, (folder / f"{form} steps.txt").read_text().split()))
    assert len(steps) == len(resume.KILLS)
    assert 0 < steps[0] < steps[1] < resume.N_STEPS


@pytest.mark.parametrize("wrapper", resume.WRAPPERS)
@pytest.mark.parametrize("rank", range(resume.N_PROCESSES))
def test_several_processes_resume_each_from_its_own_checkpoint(folder, wrapper, rank):
    whole, resumed = torch.load(folder / f"{wrapper} {rank}.pt")
    assert_equal(resumed, whole)


def step(infosam: InfoSAMLoss, seed: int) -> torch.Tensor:
    student = in_training(sam_features(2, seed=seed + 1000))
    loss = infosam(sam_features(2, seed=seed), student)
    (loss + student.image_features.square().mean() + student.mask_tokens.square().mean()).backward()
    return loss.detach()


def after_steps(**settings) -> InfoSAMLoss:
    infosam = InfoSAMLoss(DIM, **{"bank_size": 4, **settings})
    for seed in (0, 10, 20):
        step(infosam, seed)
    return infosam


def through_a_file(state: dict, device: str = "cpu") -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location=device)


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_a_bank_of_another_size_takes_the_last_samples(size):
    infosam = after_steps()
    resumed = InfoSAMLoss(DIM, bank_size=size)
    resumed.load_state_dict(through_a_file(infosam.state_dict()))
    expected = copy.deepcopy(infosam)
    expected.bank.size = size
    expected.load_state_dict(infosam.state_dict())
    assert len(resumed.bank.get_extra_state()[2]) == min(size, 4)
    assert torch.equal(step(resumed, 30), step(expected, 30))
    assert torch.equal(step(resumed, 40), step(expected, 40))


def test_what_comes_after_does_not_change_a_state_dict():
    infosam = after_steps()
    state = infosam.state_dict()
    resumed = InfoSAMLoss(DIM, bank_size=4)
    resumed.load_state_dict(state)
    before = copy.deepcopy(state["bank._extra_state"])
    for seed in (30, 40, 50):
        step(resumed, seed)
        step(infosam, seed)
    assert_equal(state["bank._extra_state"], before)


def test_strict_loading_takes_a_state_dict_without_a_bank_and_keeps_nothing():
    infosam = after_steps()
    state = InfoSAMLoss(DIM, bank_size=0).state_dict()
    infosam.load_state_dict(state)
    fresh = InfoSAMLoss(DIM, bank_size=4)
    assert torch.equal(step(infosam, 30), step(fresh, 30))
    assert "bank._extra_state" not in state


def test_a_loss_without_a_bank_refuses_one():
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bank._extra_state"'):
        InfoSAMLoss(DIM).load_state_dict(after_steps().state_dict())
    InfoSAMLoss(DIM).load_state_dict(after_steps().state_dict(), strict=False)


def test_a_state_dict_before_the_first_step():
    resumed = after_steps()
    resumed.load_state_dict(through_a_file(InfoSAMLoss(DIM, bank_size=4).state_dict()))
    assert torch.equal(step(resumed, 30), step(InfoSAMLoss(DIM, bank_size=4), 30))


def test_samples_that_were_read_to_another_device_come_to_that_of_the_step():
    resumed = InfoSAMLoss(DIM, bank_size=4)
    resumed.load_state_dict(after_steps().state_dict())
    # As if they had been read to the one other device that every machine has.
    resumed.bank._past = _moved(resumed.bank._past, torch.device("meta"))
    # Nothing can be read of that device: that it is tried is all that can be seen.
    with pytest.raises(NotImplementedError, match="meta tensor"):
        step(resumed, 30)


def test_steps_without_a_task_after_a_resume_are_as_without_one():
    infosam = after_steps(gradient_share=0.1)
    resumed = InfoSAMLoss(DIM, bank_size=4, gradient_share=0.1)
    resumed.load_state_dict(infosam.state_dict())
    for seed in (30, 40, 50, 60, 70):
        losses = [
            each(sam_features(2, seed=seed), in_training(sam_features(2, seed=seed + 1))) for each in (infosam, resumed)
        ]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_the_checkpoint_of_a_distributed_program_holds_the_bank(tmp_path):
    """Its reader has to know what there will be, and a bank begins empty."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    infosam, resumed = after_steps(), InfoSAMLoss(DIM, bank_size=4)
    checkpoint.save(get_model_state_dict(infosam), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(resumed)
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(resumed, state)
    assert torch.equal(step(resumed, 30), step(infosam, 30))
