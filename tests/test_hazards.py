"""Inputs on which the textbook form of the loss misbehaves, each seen to misbehave, and what this package gives."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from benchmarks import textbook
from renyi_kd import InfoSAMLoss, InfoSAMTerms, RelationModule, SAMFeatures, infosam_terms
from renyi_kd.objective import Distillation
from tests.support import gradients, in_training, randn, relation_module, sam_features, to

MEMBERS = {"features": ("image_features",), "tokens": ("mask_tokens",), "both": ("image_features", "mask_tokens")}
DIM = 12


@pytest.fixture
def relation() -> RelationModule:
    return relation_module(DIM)


@pytest.fixture
def teacher() -> SAMFeatures:
    return sam_features(seed=0)


@pytest.fixture
def student() -> SAMFeatures:
    return sam_features(seed=10)


@pytest.fixture(params=MEMBERS)
def members(request):
    return MEMBERS[request.param]


def changed(features: SAMFeatures, members: tuple[str, ...], rows, value: float) -> SAMFeatures:
    """Return a copy with ``value`` in the given rows of the given members."""
    copies = {member: getattr(features, member).clone() for member in members}
    for tensor in copies.values():
        tensor[rows] = value
    return features._replace(**copies)


def step(function, relation, teacher, student, **keywords) -> tuple[InfoSAMTerms, dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms, the student's gradients and the module's."""
    student = in_training(student)
    terms = function(relation, teacher, student, **keywords)
    return terms, *gradients(terms.loss, student, relation)


def largest(gradients: dict[str, Tensor]) -> float:
    return max(gradient.abs().max().item() for gradient in gradients.values())


def all_finite(terms: InfoSAMTerms, *groups: dict[str, Tensor]) -> bool:
    return all(torch.isfinite(t).all() for t in (*terms, *(t for group in groups for t in group.values())))


# Too few samples, or no difference between them.


def test_one_sample_is_refused(relation):
    teacher, student = sam_features(1, seed=0), sam_features(1, seed=10)
    terms, of_student, of_module = step(textbook.infosam_terms, relation, teacher, student)
    assert [abs(v.item()) < 1e-6 for v in terms] == [True] * 3
    assert max(largest(of_student), largest(of_module)) < 1e-6
    with pytest.raises(
        ValueError,
        match=r"at least two samples .*got 1: .*larger batch, several prompts per image, global_batch=.*bank",
    ):
        infosam_terms(relation, teacher, in_training(student))
    with torch.no_grad(), pytest.raises(ValueError, match="the batch must hold at least two samples"):
        InfoSAMLoss(DIM)(teacher, student)


def test_one_image_with_several_prompts_is_a_batch(relation):
    teacher, student = (sam_features(seed=seed, image_index=[0, 0, 0]) for seed in (0, 10))
    assert infosam_terms(relation, teacher, in_training(student)).distillation < -0.01


def test_identical_teacher_samples_give_zero_and_a_diagnostic(teacher, student):
    one = SAMFeatures(teacher.image_features[:1].expand(4, -1, -1, -1), teacher.mask_tokens[:1].expand(4, -1, -1))
    infosam = InfoSAMLoss(DIM)
    student = in_training(student)
    terms = infosam.terms(one, student)
    assert all(abs(value.item()) < 1e-6 for value in terms)
    of_student, of_module = gradients(terms.loss, student, infosam.relation)
    assert max(largest(of_student), largest(of_module)) < 1e-6
    diagnostics = infosam.diagnostics()
    assert diagnostics.teacher_similarity.item() == pytest.approx(1, abs=1e-6)
    assert diagnostics.teacher_entropy.item() == pytest.approx(0, abs=1e-6)
    assert diagnostics.mutual_information.item() == pytest.approx(0, abs=1e-6)
    assert diagnostics.student_similarity < 0.5
    assert diagnostics.student_entropy > 1


# Zeros.


def test_all_of_the_teacher_zero_is_finite(relation, teacher, student, members):
    teacher = changed(teacher, members, slice(None), 0.0)
    terms, _, of_module = step(textbook.infosam_terms, relation, teacher, student)
    assert terms.loss.isnan()
    assert all(gradient.isnan().any() for gradient in of_module.values())
    terms, of_student, of_module = step(infosam_terms, relation, teacher, student)
    assert all_finite(terms, of_student, of_module)
    # Samples without direction are orthogonal to each other, so the joint entropy is log2 4, its largest value.
    infosam = InfoSAMLoss(DIM)
    infosam.relation = relation
    infosam(teacher, in_training(student))
    assert terms.compression.item() == pytest.approx(infosam.diagnostics().teacher_entropy.item() - 2, abs=1e-5)


def test_all_of_the_student_zero_is_finite(relation, teacher, student, members):
    student = changed(student, members, slice(None), 0.0)
    terms, of_student, of_module = step(infosam_terms, relation, teacher, student)
    assert all_finite(terms, of_student, of_module)
    for member in members:
        assert torch.equal(of_student[member], torch.zeros_like(of_student[member]))


@pytest.mark.parametrize("fresh", [False, True])
def test_one_zero_sample_of_the_teacher_keeps_the_compression_negative(relation, teacher, student, members, fresh):
    relation = RelationModule(DIM) if fresh else relation
    ordinary = step(infosam_terms, relation, teacher, student)
    teacher = changed(teacher, members, 1, 0.0)
    assert textbook.infosam_terms(relation, teacher, student).compression > 0.3
    terms, of_student, of_module = step(infosam_terms, relation, teacher, student)
    assert all_finite(terms, of_student, of_module)
    assert -2 <= terms.compression <= 0
    assert largest(of_student) < 10 * largest(ordinary[1])


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("who", ["student", "teacher and student"])
def test_one_zero_sample_of_the_student_has_a_bounded_gradient(relation, teacher, student, members, fresh, who):
    relation = RelationModule(DIM) if fresh else relation
    _, of_student, of_module = step(infosam_terms, relation, teacher, student)
    ordinary = {**of_student, "relation": largest(of_module)}
    if who == "teacher and student":
        teacher = changed(teacher, members, 1, 0.0)
    student = changed(student, members, 1, 0.0)
    _, of_student, _ = step(textbook.infosam_terms, relation, teacher, student)
    assert largest(of_student) > 100 * max(ordinary[member].abs().max().item() for member in of_student)
    terms, of_student, of_module = step(infosam_terms, relation, teacher, student)
    assert all_finite(terms, of_student, of_module)
    assert -2 <= terms.compression <= 0
    for member, gradient in of_student.items():
        assert gradient.abs().max() < 10 * ordinary[member].abs().max()
    for member in members:
        assert torch.equal(of_student[member][1], torch.zeros_like(of_student[member][1]))


def test_one_dead_pixel_has_no_gradient_and_spoils_no_other(relation, teacher, student):
    _, ordinary, _ = step(infosam_terms, relation, teacher, student)
    student.image_features[2, :, 3, 4] = 0.0
    _, of_textbook, _ = step(textbook.infosam_terms, relation, teacher, student)
    assert of_textbook["image_features"].abs().max() > 10 * ordinary["image_features"].abs().max()
    _, of_student, _ = step(infosam_terms, relation, teacher, student)
    gradient = of_student["image_features"]
    assert torch.equal(gradient[2, :, 3, 4], torch.zeros(DIM))
    assert gradient.abs().max() < 2 * ordinary["image_features"].abs().max()


# NaN and inf.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("member", ["image_features", "mask_tokens"])
def test_a_value_that_is_not_finite_is_named_or_makes_the_loss_not_finite(teacher, student, bad, who, member):
    features = {"teacher": teacher, "student": student}
    row = getattr(features[who], member)[2]
    row.view(-1)[7] = bad
    assert not textbook.infosam_terms(relation_module(DIM), **features).loss.isfinite()
    features["student"] = in_training(features["student"])
    message = rf"{{}}: {who}\.{member} must be finite, got NaN or inf in rows \[2\] of 4; skip the step"
    with pytest.raises(ValueError, match=message.format("infosam_terms")):
        infosam_terms(relation_module(DIM), **features, check_finite=True)
    with pytest.raises(ValueError, match=message.format("InfoSAMLoss")):
        InfoSAMLoss(DIM, check_finite=True)(**features)
    assert not infosam_terms(relation_module(DIM), **features).loss.isfinite()
    assert not InfoSAMLoss(DIM)(**features).isfinite()


@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        (form, alpha)
        for form, alpha in product(get_args(Distillation), [0.5, 1.0, 1.01, 2.0, 3.0, math.inf])
        if form != "debiased" or alpha >= 2
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_has_nan_for_loss_and_gradients_at_every_order(teacher, student, bad, form, alpha):
    """Of one overflow in fp16 a spectrum raises; a GradScaler would skip the step."""
    student.image_features[0, 3, 1, 1] = bad
    infosam = InfoSAMLoss(DIM, alpha=alpha, distillation=form)
    trained = in_training(student)
    loss = infosam(teacher, trained)
    assert loss.isnan()
    of_student, of_module = gradients(loss, trained, infosam.relation)
    assert all(gradient.isnan().any() for gradient in of_student.values())
    # The student's features reach no gradient of the module where L_d takes it as a constant.
    reached = form != "jensen_renyi"
    assert all(gradient.isnan().any() == reached for gradient in of_module.values())
    assert infosam.diagnostics().student_entropy.isnan()
    assert infosam.diagnostics().teacher_entropy.isfinite()


def test_every_row_that_is_not_finite_is_named(relation, teacher, student):
    teacher.mask_tokens[[0, 3]] = math.nan
    with pytest.raises(ValueError, match=r"teacher\.mask_tokens must be finite, got NaN or inf in rows \[0, 3\] of 4"):
        infosam_terms(relation, teacher, in_training(student), check_finite=True)


def test_checking_finite_features_changes_nothing(relation, teacher, student):
    checked = infosam_terms(relation, teacher, in_training(student), check_finite=True)
    assert all(
        torch.equal(a, b) for a, b in zip(checked, infosam_terms(relation, teacher, in_training(student)), strict=True)
    )


# Low precision.


def test_fp16_features_times_100_give_the_right_value():
    relation = relation_module(32)
    teacher, student = (
        SAMFeatures(100 * randn(3, 32, 48, 48, seed=seed).mul(3).half(), randn(3, 1, 32, seed=seed + 1).half())
        for seed in (1, 3)
    )
    assert teacher.image_features.isfinite().all()
    assert teacher.image_features[0].double().norm() > torch.finfo(torch.float16).max
    assert textbook.infosam_terms(copy.deepcopy(relation).half(), teacher, student).loss.isnan()
    exact = textbook.infosam_terms(
        copy.deepcopy(relation).double(), to(teacher, torch.float64), to(student, torch.float64)
    )
    terms, of_student, of_module = step(infosam_terms, relation, teacher, student)
    assert all_finite(terms, of_student, of_module)
    for value, expected in zip(terms, exact, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [2.0, 1.0])
def test_autocast_changes_nothing(relation, teacher, student, low, alpha):
    expected, of_student, of_module = step(infosam_terms, relation, teacher, student, alpha=alpha)
    trained = in_training(student)
    with torch.autocast("cpu", low):
        assert abs(textbook.infosam_terms(relation, teacher, student).loss - expected.loss) > 1e-3 or alpha != 2
        terms = infosam_terms(relation, teacher, trained, alpha=alpha)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(terms, expected, strict=True))
    for actual, ordinary in zip(gradients(terms.loss, trained, relation), (of_student, of_module), strict=True):
        assert all(torch.equal(actual[name], ordinary[name]) for name in ordinary)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_of_a_backward_inside(relation, teacher, student, low):
    expected = step(infosam_terms, relation, teacher, student)
    with torch.autocast("cpu", low):
        actual = step(infosam_terms, relation, teacher, student)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert [name for name in b if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_relation_maps_are_the_same_inside_autocast(relation, teacher, low):
    expected = relation(*teacher)
    with torch.autocast("cpu", low):
        assert torch.equal(relation(*teacher), expected)


def test_near_duplicate_samples_keep_their_digits():
    """Spread .01: L_d is 1e-7 bits, below the rounding of fp32."""
    relation = relation_module(DIM)
    features = []
    for seed in (0, 50):
        one, noise = sam_features(1, seed=seed), sam_features(4, seed=seed + 5)
        features.append(
            SAMFeatures(one.image_features + 0.01 * noise.image_features, one.mask_tokens + 0.01 * noise.mask_tokens)
        )
    exact = textbook.infosam_terms(copy.deepcopy(relation).double(), *(to(f, torch.float64) for f in features))
    assert -1e-6 < exact.distillation < -1e-9
    eager = textbook.infosam_terms(relation, *features)
    assert abs(eager.distillation - exact.distillation) > abs(exact.distillation)
    terms, _, _ = step(infosam_terms, relation, *features)
    assert terms.distillation.item() == pytest.approx(exact.distillation.item(), rel=1e-4)
    assert terms.compression.item() == pytest.approx(exact.compression.item(), rel=1e-3)
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=1e-3)


# Teacher and student that do not fit.


def test_another_size_of_the_student_is_an_error_with_both_shapes(relation, teacher):
    other = sam_features(seed=10, size=(4, 7))
    assert textbook.infosam_terms(relation, teacher, other).loss.isfinite()
    with pytest.raises(
        ValueError, match=r"image_features .* one shape, got \(4, 12, 5, 7\) and \(4, 12, 4, 7\); run both"
    ):
        infosam_terms(relation, teacher, in_training(other))


def test_another_batch_of_the_student_is_an_error_with_both_shapes(relation, teacher):
    other = sam_features(3, seed=10)
    with pytest.raises(
        ValueError, match=r"image_features .* one shape, got \(4, 12, 5, 7\) and \(3, 12, 5, 7\); run both"
    ):
        infosam_terms(relation, teacher, in_training(other))
    other = teacher._replace(mask_tokens=teacher.mask_tokens[:3], image_index=torch.arange(3))
    with pytest.raises(ValueError, match=r"mask_tokens .* one shape, got \(4, 1, 12\) and \(3, 1, 12\); run both"):
        infosam_terms(relation, teacher, in_training(other))


def test_a_sharded_batch_is_another_loss(relation):
    teacher, student = sam_features(8, seed=0), sam_features(8, seed=10)

    def distillation(shards: int) -> float:
        return (
            sum(
                infosam_terms(
                    relation,
                    *(
                        in_training(SAMFeatures(f.image_features[part], f.mask_tokens[part]))
                        for f in (teacher, student)
                        for part in [slice(i * 8 // shards, (i + 1) * 8 // shards)]
                    ),
                ).distillation.item()
                for i in range(shards)
            )
            / shards
        )

    whole, halves, quarters = (distillation(shards) for shards in (1, 2, 4))
    assert whole < halves - 0.1 < quarters - 0.2
    with pytest.raises(ValueError, match="at least two samples"):
        distillation(8)


# Rank-deficient Grams at other orders.


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 3.0, math.inf])
def test_rank_deficient_grams_are_finite_at_every_order(relation, teacher, student, alpha):
    twice = [SAMFeatures(*(t[[0, 1, 1, 0, 0, 1]] for t in features[:2])) for features in (teacher, student)]
    terms, of_student, of_module = step(infosam_terms, relation, *twice, alpha=alpha)
    assert all_finite(terms, of_student, of_module)
    assert max(largest(of_student), largest(of_module)) < 10
    once = step(
        infosam_terms, relation, *(SAMFeatures(*(t[:2] for t in f[:2])) for f in (teacher, student)), alpha=alpha
    )
    assert terms.loss.item() == pytest.approx(once[0].loss.item(), abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_powers_of_the_plain_spectrum_are_nan(alpha):
    """Why eigenvalues are clamped: rounding leaves some below zero."""
    x = randn(6, 2, dtype=torch.float64)
    assert torch.linalg.eigvalsh(x @ x.mT / 12).pow(alpha).sum().isnan()
