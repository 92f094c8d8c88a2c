"""The weight that follows the share: what it reaches, what moves it, what it refuses, and that it survives."""

from __future__ import annotations

import copy
import io
import math
import pickle
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import Tensor

from renyi_kd import InfoSAMLoss, SAMFeatures, tap
from renyi_kd.objective import Distillation
from renyi_kd.samples.processes import n_processes
from tests.support import in_training, randn, sam_features
from tests.support.models import hf_batch, hf_sam

DIM = 12
FIRST_WEIGHT = 2.0**-10
SLOPES = SAMFeatures(randn(4, DIM, 5, 7, seed=30), randn(4, 1, DIM, seed=31))


def task_of(student: SAMFeatures, scale: float = 1.0) -> Tensor:
    """Return a task loss whose gradient is known: ``scale`` times the slopes, of norm 1 each."""
    pairs = zip(student[:2], SLOPES[:2], strict=True)
    return scale * sum((value * slope / slope.norm()).sum() for value, slope in pairs)


def share_of(infosam: InfoSAMLoss) -> float:
    """Return the larger of the shares of the last step."""
    state = infosam.diagnostics()
    return max(state.image_features_share.item(), state.mask_tokens_share.item())


def steps(infosam: InfoSAMLoss, n: int, *, scale: float = 1.0, first: int = 0, rate: float = 0.0) -> list[float]:
    """Train for some steps, each on features of its own, and return the share of each."""
    shares = []
    for seed in range(first, first + n):
        student = in_training(sam_features(seed=100 + seed))
        loss = infosam(sam_features(seed=1000 + seed), student)
        (loss + task_of(student, scale)).backward()
        shares.append(share_of(infosam))
    return shares


@pytest.mark.parametrize("form", get_args(Distillation))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("target", [0.03, 1.0])
def test_share_is_what_was_asked_for_whatever_the_scale_of_the_task(form, scale, target):
    infosam = InfoSAMLoss(DIM, distillation=form, gradient_share=target)
    shares = steps(infosam, 60, scale=scale)
    # Its own gradient differs from batch to batch; in the mean it is what was asked for.
    assert sum(shares[30:]) / 30 == pytest.approx(target, rel=0.1)
    assert max(shares[1:]) < 5 * target


def test_share_is_exact_where_both_gradients_stay():
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    teacher, student = sam_features(seed=0), in_training(sam_features(seed=10))
    weights = []
    for _ in range(20):
        terms = infosam.terms(teacher, student)
        (terms.loss + task_of(student)).backward()
        weights.append(infosam.scalars()["weight"])
        ratio = terms.loss / (terms.compression + 0.5 * terms.distillation)
        assert ratio.item() == pytest.approx(weights[-1], rel=1e-5)
    assert share_of(infosam) == pytest.approx(0.1, rel=1e-4)
    assert weights[:3] == [FIRST_WEIGHT, 2 * FIRST_WEIGHT, 4 * FIRST_WEIGHT]
    assert weights[-1] == pytest.approx(weights[-2], rel=1e-5)


@pytest.mark.parametrize("form", ["cauchy_schwarz", "debiased", "jensen_renyi"])
def test_a_student_that_begins_as_the_teacher_is_not_thrown_away(form):
    """Its gradient is rounding in the first step, and thousands of times as large in the second."""
    infosam, teacher = InfoSAMLoss(DIM, distillation=form, gradient_share=0.1), sam_features(seed=0)
    moved = sam_features(seed=10)
    shares = []
    for step in range(20):
        part = 1e-7 if step == 0 else min(0.5, 0.1 * step)
        student = in_training(
            SAMFeatures(*((1 - part) * a + part * b for a, b in zip(teacher[:2], moved[:2], strict=True)))
        )
        (infosam(teacher, student) + task_of(student)).backward()
        shares.append(share_of(infosam))
    assert max(shares) < 0.3
    assert shares[-1] == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_in_half_precision_measures_in_single(dtype):
    plain, half = (InfoSAMLoss(DIM, gradient_share=0.1) for _ in range(2))
    half.to(dtype)
    assert steps(half, 6, scale=1e-3) == pytest.approx(steps(plain, 6, scale=1e-3), rel=0.05)
    before = half.share_control.mean.clone()
    assert torch.equal(half.half().share_control.mean, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_under_which_a_loss_is_made_changes_nothing(dtype):
    """As loaders of models set one; the relation module alone has it."""
    torch.set_default_dtype(dtype)
    try:
        infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    infosam.relation = InfoSAMLoss(DIM).relation
    # So many that the weight is no longer twice that of the step before, which every dtype holds.
    assert steps(infosam, 20) == steps(InfoSAMLoss(DIM, gradient_share=0.1), 20)
    assert steps(through_a_file(infosam), 5, first=20) == steps(infosam, 5, first=20)


def test_first_step_has_next_to_no_effect():
    plain, controlled = InfoSAMLoss(DIM), InfoSAMLoss(DIM, gradient_share=0.1)
    teacher, student = sam_features(seed=0), in_training(sam_features(seed=10))
    assert controlled(teacher, student).item() == pytest.approx(FIRST_WEIGHT * plain(teacher, student).item(), rel=1e-5)
    assert plain.gradient_share is None
    assert controlled.gradient_share == 0.1


def test_terms_keep_the_ratio_of_their_weights():
    infosam = InfoSAMLoss(DIM, lambda_r=0.3, lambda_d=1.7, gradient_share=0.1)
    steps(infosam, 3)
    terms = infosam.terms(sam_features(seed=0), in_training(sam_features(seed=10)))
    weight = infosam.scalars()["weight"]
    expected = weight * (0.3 * terms.compression + 1.7 * terms.distillation)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_factor_before_the_loss_has_no_effect():
    shares = []
    for factor in (1.0, 100.0):
        infosam = InfoSAMLoss(DIM, gradient_share=0.1)
        teacher, student = sam_features(seed=0), in_training(sam_features(seed=10))
        for _ in range(20):
            (factor * infosam(teacher, student) + task_of(student)).backward()
        shares.append(share_of(infosam))
    assert shares == pytest.approx([0.1, 0.1], rel=1e-4)


@pytest.mark.parametrize("what", ["nan in the loss", "overflow", "no task", "no loss", "no backward", "no gradient"])
def test_a_step_that_tells_nothing_moves_nothing(what):
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    steps(infosam, 4)
    infosam(sam_features(seed=0), in_training(sam_features(seed=10)))
    before = infosam.scalars()["weight"]
    student = in_training(sam_features(seed=10))
    if what == "no gradient":
        with torch.no_grad():
            infosam(sam_features(seed=0), student)
    else:
        loss = infosam(sam_features(seed=0), student)
        if what == "nan in the loss":
            (math.nan * loss + task_of(student)).backward()
        elif what == "overflow":
            (loss + task_of(student, math.inf)).backward()
        elif what == "no task":
            loss.backward()
        elif what == "no loss":
            (0 * loss + task_of(student)).backward()
    infosam(sam_features(seed=0), in_training(sam_features(seed=10)))
    assert infosam.scalars()["weight"] == before


def test_losses_of_one_step_count_together():
    """Two losses before one backward, as with images from outside of the task."""
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    for seed in range(20):
        students = [in_training(sam_features(seed=100 * n + seed)) for n in range(2)]
        losses = [infosam(sam_features(seed=1000 + n), student) for n, student in enumerate(students)]
        weights = losses[0].item(), losses[1].item()
        (sum(losses) + sum(task_of(student) for student in students)).backward()
    assert all(math.isfinite(weight) for weight in weights)
    assert share_of(infosam) == pytest.approx(0.1, rel=0.5)


def test_no_task_in_the_graph_is_refused_after_three_steps():
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    for _ in range(3):
        infosam(sam_features(seed=0), in_training(sam_features(seed=10))).backward()
    with pytest.raises(RuntimeError, match="InfoSAMLoss: gradient_share must have a task loss to be a share of, got 3"):
        infosam(sam_features(seed=0), in_training(sam_features(seed=10)))


def test_what_the_loss_sends_through_the_decoder_is_no_task():
    student, infosam = tap(hf_sam()), InfoSAMLoss(16, gradient_share=0.1)

    def step(seed: int, task: float) -> None:
        masks = student(hf_batch(3, seed=seed)).pred_masks
        loss = infosam(sam_features(3, seed=seed, dim=16, size=(4, 4)), student)
        weights.append(infosam.scalars()["weight"])
        (loss + (task * masks.square().mean() if task else 0)).backward()

    weights: list[float] = []
    for _ in range(3):
        step(0, 0.0)
    with pytest.raises(RuntimeError, match="InfoSAMLoss: gradient_share must have a task loss to be a share of, got 3"):
        step(0, 0.0)
    student.clear()
    infosam, weights = InfoSAMLoss(16, gradient_share=0.1), []
    for seed, task in enumerate((1.0, 1.0, 0.0, 0.0, 0.0, 1.0)):
        step(seed, task)
    assert weights[1] != weights[2] == weights[3] == weights[4] == weights[5]


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 10.1, math.inf, math.nan, "0.1", True])
def test_gradient_share_must_be_a_share(value):
    with pytest.raises(ValueError, match=r"InfoSAMLoss: gradient_share must lie in \(0, 10\], got"):
        InfoSAMLoss(DIM, gradient_share=value)


def test_compiled_loss_is_refused():
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    compiled = torch.compile(infosam, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="gradient_share must be measured outside of torch.compile"):
        compiled(sam_features(seed=0), in_training(sam_features(seed=10)))


# What the compiler says of leaves that cross a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("what", ["loss", "step"])
def test_share_is_measured_where_a_compiler_breaks_the_graph(what):
    weights = []
    for compiled in (False, True):
        infosam = InfoSAMLoss(DIM, gradient_share=0.1)
        loss = torch.compile(infosam, backend="eager") if compiled and what == "loss" else infosam

        def step(teacher: SAMFeatures, student: SAMFeatures, loss=loss) -> Tensor:
            return loss(teacher, student) + task_of(student)

        step = torch.compile(step, backend="eager") if compiled and what == "step" else step
        for seed in range(3):
            step(sam_features(seed=1000 + seed), in_training(sam_features(seed=100 + seed))).backward()
            weights.append(infosam.scalars()["weight"])
    assert weights[:3] == pytest.approx(weights[3:], rel=1e-5)
    assert weights[1] != FIRST_WEIGHT


# What survives.


def through_a_file(infosam: InfoSAMLoss) -> InfoSAMLoss:
    file = io.BytesIO()
    torch.save(infosam.state_dict(), file)
    file.seek(0)
    resumed = InfoSAMLoss(DIM, gradient_share=0.1)
    resumed.load_state_dict(torch.load(file))
    return resumed


@pytest.mark.parametrize("again", [through_a_file, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_resumed_run_goes_on_bit_for_bit(again):
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    steps(infosam, 5)
    resumed = again(infosam)
    assert steps(resumed, 5, first=5) == steps(infosam, 5, first=5)


def test_the_state_dict_is_as_before_without_a_share():
    names = InfoSAMLoss(DIM).state_dict().keys()
    assert all(name.startswith("relation.") for name in names)
    assert InfoSAMLoss(DIM, gradient_share=0.1).state_dict().keys() - names == {
        f"share_control.{name}" for name in ("_extra_state", "mean", "n_steps", "weight")
    }


def test_repr_names_the_share():
    assert "gradient_share=0.25" in repr(InfoSAMLoss(DIM, gradient_share=0.25))
    assert "gradient_share" not in repr(InfoSAMLoss(DIM))


def test_of_two_processes_each_hears_of_the_others_errors(monkeypatch):
    infosam = InfoSAMLoss(DIM, gradient_share=0.1)
    assert isinstance(infosam._telling_of_errors(), nullcontext)
    monkeypatch.setattr("renyi_kd.loss.n_processes", lambda _group: 2)
    assert not isinstance(infosam._telling_of_errors(), nullcontext)
    with torch.no_grad():
        assert isinstance(infosam._telling_of_errors(), nullcontext)


def test_steps_without_any_gradient_say_nothing_of_a_missing_task():
    control = InfoSAMLoss(DIM, gradient_share=0.1).share_control
    for _ in range(100):
        control._check_task(torch.zeros(2, 2))
    own_alone = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for _ in range(2):
        control._check_task(own_alone)
    with pytest.raises(RuntimeError, match="gradient_share must have a task loss to be a share of, got 3 steps"):
        control._check_task(own_alone)


def test_a_program_alone_is_one_process():
    assert n_processes(None) == 1


def test_the_first_steps_count_alike():
    infosam, shares = InfoSAMLoss(DIM, gradient_share=0.1), []
    for step in range(6):
        steps(infosam, 1, first=step)
        # That of a step counts from the next one on.
        if shares:
            assert infosam.share_control.mean.item() == pytest.approx(sum(shares) / len(shares), rel=1e-4)
        shares.append(share_of(infosam) / infosam.scalars()["weight"])
