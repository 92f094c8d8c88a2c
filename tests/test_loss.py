"""The loss on features: against the textbook form, its bounds, its derivatives, the module around it, refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from functools import partial
from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import textbook
from renyi_kd import (
    InfoSAMLoss,
    Objective,
    RelationModule,
    SAMFeatures,
    gram_matrix,
    infosam_terms,
    joint_entropy,
    mutual_information,
    renyi_entropy,
    tap,
)
from renyi_kd.objective import Distillation
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.dispatch import resolve
from renyi_kd.ops.gram_terms import gram_terms
from renyi_kd.ops.relation_scores import relation_scores
from tests.support import gradients, in_training, randn, relation_module, sam_features, to
from tests.support.tolerance import assert_close_on_scale, assert_within_budget

DIM = 12
INDEX = {
    "none": None,
    "repeated": [0, 0, 1, 1, 2, 2],
    "unsorted": [2, 0, 1, 0, 2],
    "one image": [0, 0, 0],
    "own": [0, 1, 2],
}
WEIGHTS = [{}, {"lambda_r": 0.3, "lambda_d": -1.7}, {"lambda_r": 0.0}, {"lambda_d": 0.0}]
DISTILLATIONS = list(get_args(Distillation))


def pair(**keywords) -> tuple[SAMFeatures, SAMFeatures]:
    """Return features of a teacher, and of a student that resembles it a little."""
    teacher, student = sam_features(seed=0, **keywords), sam_features(seed=10, **keywords)
    return teacher, student._replace(
        image_features=student.image_features + 0.5 * teacher.image_features,
        mask_tokens=student.mask_tokens + 0.5 * teacher.mask_tokens,
    )


def results(function, relation, teacher, student, **keywords) -> dict[str, Tensor]:
    """Return terms and gradients by name, those of the module as one vector."""
    student = in_training(student)
    terms = function(relation, teacher, student, **keywords)
    of_student, of_module = gradients(terms.loss, student, relation)
    module = torch.cat([gradient.flatten() for gradient in of_module.values()])
    return {**{name: value.detach() for name, value in terms._asdict().items()}, **of_student, "module": module}


def forms_at(*orders: float) -> list[tuple[str, float]]:
    """Return every form at each of the orders that it has."""
    return [(form, alpha) for form, alpha in product(DISTILLATIONS, orders) if form != "debiased" or alpha >= 2]


def distillation_by_hand(teacher: Tensor, student: Tensor, distillation: str, alpha: float = 2.0) -> Tensor:
    """Return L_d of relation maps ``[s, k]``."""
    if distillation == "jensen_renyi":
        pairs = zip(teacher.detach(), student, strict=True)
        return torch.stack([renyi_entropy(gram_matrix(torch.stack(pair)), 2) for pair in pairs]).mean()
    grams = gram_matrix(teacher), gram_matrix(student)
    if distillation == "mutual_information":
        return -mutual_information(*grams, alpha)
    if distillation == "debiased":
        own = [joint_entropy(gram, gram, alpha=alpha) for gram in grams]
        return joint_entropy(*grams, alpha=alpha) - sum(own) / 2
    return -2 * torch.cosine_similarity(*(gram.flatten() for gram in grams), 0).log2()


def student_maps_by_hand(relation: RelationModule, student: SAMFeatures, distillation: str) -> Tensor:
    """Return the student's relation maps ``[s, k]``, made by a module that is a constant where the form takes it so."""
    if distillation == "jensen_renyi":
        relation = copy.deepcopy(relation).requires_grad_(False)
    return relation(*student).flatten(1)


def in_double(relation: RelationModule) -> RelationModule:
    return copy.deepcopy(relation).double()


# Against the textbook form.


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_value_and_gradients_are_the_textbooks(index, n_tokens, weights):
    relation, (teacher, student) = relation_module(), pair(n_tokens=n_tokens, image_index=index)
    double = [to(features, torch.float64) for features in (teacher, student)]
    exact = results(textbook.infosam_terms, in_double(relation), *double, **weights)
    eager = results(textbook.infosam_terms, relation, teacher, student, **weights)
    single = results(infosam_terms, relation, teacher, student, **weights)
    same = results(infosam_terms, in_double(relation), *double, **weights)
    for name in exact:
        if name in ("image_features", "mask_tokens") and weights.get("lambda_d") == 0:
            assert torch.equal(single[name], torch.zeros_like(single[name])), "L_r does not depend on the student"
            continue
        assert single[name].dtype == torch.float32
        # A value is a sum of logarithms near 1: its rounding is that of the terms.
        slack = 8.0 if name in ("loss", "compression", "distillation") else 2.0
        assert_within_budget(single[name], eager[name], exact[name], name=name, slack=slack)
        assert same[name].dtype == torch.float64
        assert_close_on_scale(same[name], exact[name], name=name, rtol=1e-10)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_format_does_not_matter(layout):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair(dtype=torch.float64)
    exact = results(textbook.infosam_terms, relation, teacher, student)
    teacher, student = (
        f._replace(image_features=f.image_features.to(memory_format=layout)) for f in (teacher, student)
    )
    for name, value in results(infosam_terms, relation, teacher, student).items():
        assert_close_on_scale(value, exact[name], name=name, rtol=1e-10)


@pytest.mark.parametrize("token", ["first", "all", 0, 1, 2])
def test_choice_of_token(token):
    teacher, student = pair(n_tokens=3)
    infosam = InfoSAMLoss(DIM, token=token)
    chosen = slice(None) if token == "all" else slice(0, 1) if token == "first" else slice(token, token + 1)
    expected = textbook.infosam_terms(
        infosam.relation, *(f._replace(mask_tokens=f.mask_tokens[:, chosen]) for f in (teacher, student))
    )
    trained = in_training(student)
    terms = infosam.terms(teacher, trained)
    for value, target in zip(terms, expected, strict=True):
        assert value.item() == pytest.approx(target.item(), rel=1e-4)
    terms.loss.backward()
    used = trained.mask_tokens.grad.abs().sum((0, 2)) > 0
    assert used.tolist() == [i in range(3)[chosen] for i in range(3)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("form", DISTILLATIONS)
def test_loss_weighs_its_terms(weights, form):
    teacher, student = pair()
    weights = {**weights, "distillation": form}
    infosam = InfoSAMLoss(DIM, **weights)
    loss, compression, distillation = infosam.terms(teacher, in_training(student))
    expected = weights.get("lambda_r", 1.0) * compression + weights.get("lambda_d", 0.5) * distillation
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert compression.item() != pytest.approx(distillation.item(), abs=0.1)
    assert torch.equal(infosam(teacher, in_training(student)), loss)
    of_function = infosam_terms(infosam.relation, teacher, in_training(student), **weights)
    assert torch.equal(of_function.loss, loss)


@pytest.mark.parametrize("index", [None, [2, 0, 1, 0, 2]], ids=["none", "unsorted"])
@pytest.mark.parametrize(("form", "alpha"), forms_at(0.5, 1.0, 1.01, 2.0, 3.0, math.inf))
def test_terms_are_those_of_the_grams(alpha, index, form):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair(dtype=torch.float64, image_index=index)
    trained = in_training(student)
    terms = infosam_terms(relation, teacher, trained, alpha=alpha, distillation=form)
    again = in_training(student)
    teacher_maps = relation(*teacher).flatten(1)
    of_teacher = gram_matrix(teacher_maps)
    images = teacher.image_features if index is None else teacher.image_features[index]
    inputs = gram_matrix(images.flatten(1)), gram_matrix(teacher.mask_tokens.flatten(1))
    compression = renyi_entropy(of_teacher, alpha) - joint_entropy(*inputs, of_teacher, alpha=alpha)
    distillation = distillation_by_hand(teacher_maps, student_maps_by_hand(relation, again, form), form, alpha)
    assert terms.compression.item() == pytest.approx(compression.item(), rel=1e-9)
    assert terms.distillation.item() == pytest.approx(distillation.item(), rel=1e-9)
    by_hand = gradients(compression + 0.5 * distillation, again, relation)
    for actual, expected in zip(gradients(terms.loss, trained, relation), by_hand, strict=True):
        for name in expected:
            assert_close_on_scale(actual[name], expected[name], name=name, rtol=1e-8)
    assert InfoSAMLoss(DIM, alpha=alpha, distillation=form).alpha == alpha


def test_alpha_of_the_module_is_used():
    teacher, student = pair()
    infosam = InfoSAMLoss(DIM, alpha=1.0)
    assert torch.equal(
        infosam(teacher, in_training(student)),
        infosam_terms(infosam.relation, teacher, in_training(student), alpha=1.0).loss,
    )
    assert infosam_terms(infosam.relation, teacher, in_training(student)).loss != infosam(teacher, in_training(student))


@pytest.mark.parametrize("name", DISTILLATIONS[1:])
def test_distillation_of_the_module_is_used(name):
    teacher, student = pair()
    infosam = InfoSAMLoss(DIM, distillation=name)
    of_module = infosam.terms(teacher, in_training(student))
    of_function, papers = (
        infosam_terms(infosam.relation, teacher, in_training(student), distillation=form)
        for form in (name, "mutual_information")
    )
    assert all(map(torch.equal, of_module, of_function))
    assert of_module.compression.item() == pytest.approx(papers.compression.item(), abs=1e-6)
    assert of_module.distillation > 0 > papers.distillation
    assert torch.equal(papers.loss, infosam_terms(infosam.relation, teacher, in_training(student)).loss)


# The relation module.


@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_relation_maps_are_the_textbooks(index, n_tokens):
    relation = relation_module(dtype=torch.float64)
    features = sam_features(seed=0, n_tokens=n_tokens, image_index=index, dtype=torch.float64)
    maps = relation(*features)
    assert maps.shape == (len(features.mask_tokens), n_tokens, 5, 7)
    assert_close_on_scale(maps.flatten(1), textbook.relation_maps(relation, features), name="maps", rtol=1e-12)
    norms = maps.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_relation_maps_keep_height_and_width_apart():
    relation, features = relation_module(), sam_features(1, seed=0, size=(2, 3))
    whole = relation.scores(*features[:2]).view(2, 3)
    for row in range(2):
        for column in range(3):
            pixel = features.image_features[:, :, row : row + 1, column : column + 1]
            torch.testing.assert_close(relation.scores(pixel, features.mask_tokens).squeeze(), whole[row, column])
    torch.testing.assert_close(relation(*features)[0, 0], whole / whole.norm())


def test_relation_of_scores_that_are_all_zero_stays_zero():
    relation = RelationModule(4)
    with torch.no_grad():
        for layer in (relation.query_proj, relation.key_proj):
            layer.bias.zero_()
    maps = relation(torch.zeros(2, 4, 3, 3, requires_grad=True), randn(2, 1, 4))
    assert torch.equal(maps, torch.zeros(2, 1, 3, 3))
    maps.sum().backward()


@pytest.mark.parametrize(
    ("features", "tokens", "module", "result"),
    [
        (torch.float16, torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float16, torch.float16, torch.float64),
    ],
    ids=str,
)
def test_dtype_of_maps(features, tokens, module, result):
    relation = relation_module(4).to(module)
    assert relation(randn(2, 4, 3, 3, dtype=features), randn(2, 1, 4, seed=1, dtype=tokens)).dtype == result


# Bounds and where the minimum is.


@given(
    seed=st.integers(0, 10_000),
    index=st.lists(st.integers(0, 2), min_size=2, max_size=6) | st.none(),
    n_tokens=st.integers(1, 2),
    alike=st.integers(0, 3),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    form=st.sampled_from(DISTILLATIONS),
)
def test_terms_stay_within_their_bounds(seed, index, n_tokens, alike, scale, form):
    teacher, student = (
        sam_features(4, seed=s, dim=4, size=(2, 3), n_tokens=n_tokens, image_index=index, dtype=torch.float64)
        for s in (seed, seed + 20_000)
    )
    for features in (teacher, student):
        features.mask_tokens[: alike + 1] = features.mask_tokens[0].clone()
        features.image_features[: alike + 1] = features.image_features[0].clone() * scale
    infosam = InfoSAMLoss(4, token="all", distillation=form).double()
    with torch.no_grad():
        terms = infosam.terms(teacher, student)
    diagnostics = infosam.diagnostics()
    n_bits = math.log2(len(student.mask_tokens))
    assert -n_bits - 1e-9 <= terms.compression <= 1e-9
    if form == "mutual_information":
        assert terms.distillation >= -min(diagnostics.teacher_entropy, diagnostics.student_entropy) - 1e-9
    else:
        most = {"cauchy_schwarz": 43 + 2 * n_bits, "debiased": n_bits / 2, "jensen_renyi": 1.0}[form]
        assert -1e-9 <= terms.distillation <= most + 1e-9


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_gradient_of_the_distillation_where_the_student_equals_the_teacher(form):
    """The paper's leads away from there; the other forms are zero and stay."""
    relation, (teacher, _) = relation_module(), pair()
    student = in_training(teacher)
    terms = infosam_terms(relation, teacher, student, distillation=form)
    for gradient in torch.autograd.grad(terms.distillation, (student.image_features, student.mask_tokens)):
        if form == "mutual_information":
            assert gradient.abs().max() > 1e-4
        else:
            assert gradient.abs().max() < 1e-9
    assert form == "mutual_information" or terms.distillation.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_a_student_that_follows_the_distillation(form):
    """From near the teacher: the paper's takes the Gram of the relations away from there, the others home."""
    relation, (teacher, other) = relation_module().requires_grad_(False), pair()
    teacher = teacher._replace(image_features=teacher.image_features + 2 * teacher.image_features[:1])
    student = in_training(teacher._replace(mask_tokens=teacher.mask_tokens + 0.2 * other.mask_tokens))
    optimizer = torch.optim.Adam([student.image_features, student.mask_tokens], lr=0.01)
    distances = []
    for _ in range(60):
        grams = [gram_matrix(relation(*features).flatten(1).detach()) for features in (teacher, student)]
        distances.append((grams[0] - grams[1]).norm().item())
        optimizer.zero_grad()
        infosam_terms(relation, teacher, student, distillation=form).distillation.backward()
        optimizer.step()
    if form == "mutual_information":
        assert distances[-1] > 3 * distances[0]
    else:
        assert distances[-1] < 0.2 * distances[0]


def test_distillation_is_least_for_orthogonal_relations_of_the_student():
    """Without biases a dead pixel scores zero, so samples that live in different rows of pixels are orthogonal."""
    infosam = InfoSAMLoss(DIM)
    with torch.no_grad():
        for layer in (infosam.relation.query_proj, infosam.relation.key_proj):
            layer.bias.zero_()
    teacher, student = pair()
    teacher = teacher._replace(image_features=teacher.image_features + 2 * teacher.image_features[:1])
    apart = torch.zeros_like(student.image_features)
    for sample in range(4):
        apart[sample, :, sample] = student.image_features[sample, :, sample]
    with torch.no_grad():
        equal = infosam.terms(teacher, teacher).distillation
        least = infosam.terms(teacher, student._replace(image_features=apart)).distillation
    diagnostics = infosam.diagnostics()
    assert diagnostics.student_similarity.item() == pytest.approx(0, abs=1e-12)
    assert diagnostics.student_entropy.item() == pytest.approx(2, abs=1e-9)
    assert least.item() == pytest.approx(-diagnostics.teacher_entropy.item(), rel=1e-6)
    assert least < equal - 0.05


# Derivatives.


@pytest.mark.parametrize("index", [None, [1, 0, 1]], ids=["none", "repeated"])
@pytest.mark.parametrize(("form", "alpha"), [*forms_at(0.5, 1.0, 2.0, 3.0), ("debiased", math.inf)])
def test_gradient_of_the_loss_is_the_derivative(alpha, index, form):
    keywords = {"dim": 4, "size": (2, 2), "image_index": index, "dtype": torch.float64}
    relation = relation_module(4, dtype=torch.float64)
    teacher, student = sam_features(3, seed=0, **keywords), sam_features(3, seed=10, **keywords)

    # gradcheck moves the entries of its inputs in place, the module's parameter among them.
    def terms(image_features, mask_tokens, _weight, _gamma):
        moved = SAMFeatures(image_features, mask_tokens, student.image_index)
        return tuple(infosam_terms(relation, teacher, moved, alpha=alpha, distillation=form))

    trained = in_training(student)
    features = trained.image_features, trained.mask_tokens
    parameters = relation.key_proj.weight, relation.layer_norm_feat.weight
    if form == "jensen_renyi":
        # The module is a constant in it, which moved parameters are not: they have a derivative of L_r alone.
        constant = [parameter.detach() for parameter in parameters]
        assert torch.autograd.gradcheck(terms, (*features, *constant))
        assert torch.autograd.gradcheck(lambda *moved: terms(*moved)[1], (*features, *parameters))
    else:
        assert torch.autograd.gradcheck(terms, (*features, *parameters))


@pytest.mark.parametrize("index", [None, [1, 0, 1]], ids=["none", "repeated"])
def test_gradient_of_the_relation_is_the_derivative(index):
    relation = relation_module(4, dtype=torch.float64)
    features = in_training(
        sam_features(3, seed=0, dim=4, size=(2, 2), n_tokens=2, image_index=index, dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(
        lambda x, z, *_: relation(x, z, features.image_index), (*features[:2], *relation.parameters())
    )


@pytest.mark.parametrize(
    "function",
    [infosam_terms, lambda r, t, s, **form: InfoSAMLoss(DIM, **form).terms(t, s)],
    ids=["function", "module"],
)
@pytest.mark.parametrize("form", DISTILLATIONS)
def test_a_second_derivative_is_refused(function, form):
    teacher, student = pair()
    student = in_training(student)
    with pytest.raises(NotImplementedError, match=r"must run without create_graph=True"):
        torch.autograd.grad(
            function(relation_module(), teacher, student, distillation=form).loss,
            student.image_features,
            create_graph=True,
        )


@pytest.mark.parametrize("form", ["mutual_information", "cauchy_schwarz", "debiased"])
def test_detached_teacher_relation_gives_the_distillation_no_gradient_through_it(form):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair(dtype=torch.float64)
    trained = in_training(student)
    keywords = {"lambda_r": 0.7, "distillation": form}
    detached = infosam_terms(relation, teacher, trained, detach_teacher_relation=True, **keywords)
    attached = infosam_terms(relation, teacher, in_training(student), **keywords)
    assert torch.equal(detached.loss, attached.loss)
    actual = gradients(detached.loss, trained, relation)

    again = in_training(student)
    constant = relation(*teacher).flatten(1).detach()
    distillation = distillation_by_hand(constant, relation(*again).flatten(1), form)
    compression = infosam_terms(relation, teacher, again).compression
    expected = gradients(0.7 * compression + 0.5 * distillation, again, relation)
    ordinary = results(infosam_terms, relation, teacher, student, **keywords)["module"]
    for a, e in zip(actual, expected, strict=True):
        for name in e:
            assert_close_on_scale(a[name], e[name], name=name, rtol=1e-8)
    assert not torch.allclose(torch.cat([g.flatten() for g in actual[1].values()]), ordinary, rtol=1e-3, atol=1e-5)

    infosam = InfoSAMLoss(DIM, detach_teacher_relation=True, **keywords).double()
    infosam.relation = relation
    trained = in_training(student)
    of_module = gradients(infosam(teacher, trained), trained, relation)[1]
    assert all(torch.equal(of_module[name], actual[1][name]) for name in of_module)


def test_the_teacher_gets_no_gradient_even_if_it_requires_one():
    teacher, student = map(in_training, pair())
    infosam_terms(relation_module(), teacher, student).loss.backward()
    assert teacher.image_features.grad is None
    assert teacher.mask_tokens.grad is None
    assert student.image_features.grad is not None
    InfoSAMLoss(DIM)(teacher, student).backward()
    assert teacher.image_features.grad is None


@pytest.mark.parametrize("member", ["image_features", "mask_tokens"])
def test_one_member_that_requires_grad_is_enough(member):
    teacher, student = pair()
    leaf = getattr(student, member).requires_grad_()
    infosam_terms(relation_module(), teacher, student).loss.backward()
    assert leaf.grad.abs().max() > 0


def test_a_frozen_relation_module_is_left_alone():
    relation = relation_module().requires_grad_(False)
    teacher, student = pair()
    student = in_training(student)
    infosam_terms(relation, teacher, student).loss.backward()
    assert student.image_features.grad.abs().max() > 0


def test_parametrized_weights_of_the_relation_module_are_taken_and_trained():
    relation, (teacher, student) = relation_module(), pair()
    expected = infosam_terms(relation, teacher, in_training(student)).loss
    nn.utils.parametrizations.weight_norm(relation.key_proj)
    loss = infosam_terms(relation, teacher, in_training(student)).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in relation.key_proj.parametrizations.parameters())


# Dtypes.


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_features(low):
    relation, (teacher, student) = relation_module(), pair(dtype=low)
    exact = results(textbook.infosam_terms, in_double(relation), to(teacher, torch.float64), to(student, torch.float64))
    eager = results(textbook.infosam_terms, relation, to(teacher, torch.float32), to(student, torch.float32))
    actual = results(infosam_terms, relation, teacher, student)
    for name, value in actual.items():
        assert value.dtype == (low if name in ("image_features", "mask_tokens") else torch.float32)
        slack = 8.0 if name in ("loss", "compression", "distillation") else 2.0
        assert_within_budget(value, eager[name], exact[name], name=name, slack=slack)


def test_dtypes_of_teacher_and_student_may_differ():
    teacher, student = pair(dtype=torch.float16)
    loss = infosam_terms(relation_module(), teacher, in_training(to(student, torch.float32))).loss
    assert loss.dtype == torch.float32
    loss = infosam_terms(relation_module(), to(teacher, torch.float64), in_training(student)).loss
    assert loss.dtype == torch.float64


def test_a_module_in_bf16_computes_in_fp32():
    infosam = InfoSAMLoss(DIM).to(torch.bfloat16)
    teacher, student = pair()
    rounded = copy.deepcopy(infosam.relation).float()
    expected = results(infosam_terms, rounded, teacher, student)
    actual = results(lambda _, t, s: infosam.terms(t, s), infosam.relation, teacher, student)
    for name in ("loss", "compression", "distillation", "image_features", "mask_tokens"):
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected[name]), name
    assert actual["module"].dtype == torch.bfloat16
    assert_close_on_scale(actual["module"], expected["module"], name="module", rtol=0.01)


# The module.


def test_defaults_are_the_papers():
    infosam = InfoSAMLoss()
    assert (infosam.lambda_r, infosam.lambda_d, infosam.alpha, infosam.token) == (1.0, 0.5, 2.0, "first")
    assert infosam.detach_teacher_relation is infosam.check_finite is infosam.global_batch is False
    assert infosam.bank_size == 0
    assert infosam.distillation == "mutual_information"
    assert infosam.relation.dim == 256
    assert sum(parameter.numel() for parameter in infosam.parameters()) == 132_608
    objective = (
        "lambda_r=1.0, lambda_d=0.5, alpha=2.0, distillation='mutual_information', detach_teacher_relation=False"
    )
    assert repr(infosam).splitlines()[1].strip() == f"{objective}, token='first', global_batch=False, bank_size=0"


def on_meta() -> InfoSAMLoss:
    with torch.device("meta"):
        return InfoSAMLoss(DIM)


@pytest.mark.parametrize(
    "build",
    [
        lambda: RelationModule(DIM),
        lambda: InfoSAMLoss(DIM, bank_size=3),
        lambda: InfoSAMLoss(DIM, generator=torch.Generator().manual_seed(3)),
        lambda: copy.deepcopy(InfoSAMLoss(DIM)),
        on_meta,
    ],
    ids=["RelationModule", "InfoSAMLoss", "of a generator", "copied", "on meta"],
)
def test_no_global_random_state_is_moved(build):
    """With a loss of weight 0, the order of the data would be another one."""
    states = torch.get_rng_state(), [state.clone() for state in torch.cuda.get_rng_state_all()]
    build()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), states[1]))


def test_start_of_the_relation_module():
    relation = RelationModule(256)
    torch.manual_seed(1)
    same, other = InfoSAMLoss().relation, RelationModule(256, generator=torch.Generator().manual_seed(1))
    linear = nn.Linear(256, 256)
    for name in ("query_proj", "key_proj"):
        layer = getattr(relation, name)
        for kind, values in layer.named_parameters():
            assert torch.equal(values, getattr(same, name).get_parameter(kind))
            assert not torch.equal(values, getattr(other, name).get_parameter(kind))
            # Uniform, as nn.Linear draws.
            assert values.abs().max() <= 1 / 16
            assert values.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01 if kind == "weight" else 0.15)
            assert (values.dtype, values.requires_grad) == (torch.float32, True)
            assert not torch.equal(values, linear.get_parameter(kind))
    assert not torch.equal(relation.query_proj.weight, relation.key_proj.weight)
    assert torch.equal(relation.layer_norm_mask.weight, torch.ones(256))


def test_a_schedule_sets_another_objective():
    teacher, student = pair()
    infosam = InfoSAMLoss(DIM)
    changes = {"lambda_r": 0.3, "lambda_d": -1.7, "alpha": 1.0, "distillation": "cauchy_schwarz"}
    infosam.objective = infosam.objective._replace(**changes)
    assert infosam.objective == Objective(**changes)
    assert all(getattr(infosam, name) == value for name, value in infosam.objective._asdict().items())
    expected = infosam_terms(infosam.relation, teacher, in_training(student), **changes)
    assert all(map(torch.equal, infosam.terms(teacher, in_training(student)), expected))
    assert copy.deepcopy(infosam).objective == infosam.objective


def test_an_objective_is_checked_when_it_is_set():
    infosam = InfoSAMLoss(DIM)
    for changes, message in (
        ({"lambda_r": math.inf}, "lambda_r must be a finite number, got inf; 0 switches"),
        ({"alpha": 0}, "alpha must be a number above 0, got 0; 2 is the order"),
        ({"distillation": "cosine"}, "distillation must be one of .*, got 'cosine'; 'mutual_information' is"),
        ({"distillation": "debiased", "alpha": 1.9}, "alpha must be at least 2 under .*'debiased', got 1.9; below"),
    ):
        with pytest.raises(ValueError, match=f"InfoSAMLoss: {message}"):
            infosam.objective = infosam.objective._replace(**changes)
    with pytest.raises(TypeError, match="InfoSAMLoss: objective must be an Objective, got tuple; change the one"):
        infosam.objective = (1.0, 0.5)
    with pytest.raises(AttributeError, match="lambda_d"):
        infosam.lambda_d = 0.1
    assert infosam.objective == Objective()


def test_state_dict_is_that_of_the_relation():
    infosam, other = InfoSAMLoss(DIM), InfoSAMLoss(DIM, generator=torch.Generator().manual_seed(0))
    teacher, student = pair()
    infosam(teacher, in_training(student))
    state = infosam.state_dict()
    assert set(state) == {f"relation.{name}" for name in infosam.relation.state_dict()}
    assert not torch.equal(other(teacher, in_training(student)), infosam(teacher, in_training(student)))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(teacher, in_training(student)), infosam(teacher, in_training(student)))


@pytest.mark.parametrize("stepped", [False, True])
def test_deepcopy_pickle_and_save(stepped):
    infosam = InfoSAMLoss(DIM, lambda_r=0.3, alpha=1.5, distillation="cauchy_schwarz", token=1)
    teacher, student = pair(n_tokens=2)
    if stepped:
        infosam(teacher, in_training(student))
    buffer = io.BytesIO()
    torch.save(infosam, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(infosam), pickle.loads(pickle.dumps(infosam)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert torch.equal(other(teacher, in_training(student)), infosam(teacher, in_training(student)))
        assert repr(other) == repr(infosam)


def test_repeated_calls_are_bitwise_equal():
    relation, (teacher, student) = relation_module(), pair(size=(20, 30))
    first, second = (results(infosam_terms, relation, teacher, student) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_computes_without_gradient():
    teacher, student = pair()
    infosam = InfoSAMLoss(DIM)
    expected = infosam(teacher, in_training(student))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = infosam(teacher, student)
        assert torch.equal(loss, expected)
        assert not loss.requires_grad


def test_a_split_batch_is_another_loss():
    teacher, student = pair()
    infosam = InfoSAMLoss(DIM)
    whole = infosam(teacher, in_training(student))
    halves = [
        infosam(*(in_training(SAMFeatures(f.image_features[part], f.mask_tokens[part])) for f in (teacher, student)))
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert abs(sum(halves) / 2 - whole) > 0.05


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_order_of_samples_does_not_matter(form):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair(dtype=torch.float64)
    order = [2, 0, 3, 1]
    moved = (SAMFeatures(f.image_features[order], f.mask_tokens[order]) for f in (teacher, student))
    expected = results(infosam_terms, relation, teacher, student, distillation=form)
    actual = results(infosam_terms, relation, *moved, distillation=form)
    for name in expected:
        value = expected[name][order] if name in ("image_features", "mask_tokens") else expected[name]
        assert_close_on_scale(actual[name], value, name=name, rtol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_diagnostics_are_those_of_the_relations(alpha):
    infosam = InfoSAMLoss(DIM, alpha=alpha)
    teacher, student = pair()
    terms = infosam.terms(teacher, in_training(student))
    grams = [gram_matrix(infosam.relation(*f).flatten(1).detach().double()) for f in (teacher, student)]
    diagnostics = infosam.diagnostics()
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    expected = (
        *(renyi_entropy(gram, alpha) for gram in grams),
        -terms.distillation,
        *(gram[off_diagonal].square().mean() for gram in grams),
    )
    for name, value, target in zip(diagnostics._fields[:5], diagnostics[:5], expected, strict=True):
        assert value.item() == pytest.approx(target.item(), rel=1e-4), name
        assert value.dtype == torch.float64
        assert not value.requires_grad
    assert diagnostics.teacher_entropy != diagnostics.student_entropy


def test_diagnostics_follow_the_last_step():
    infosam = InfoSAMLoss(DIM)
    teacher, student = pair()
    infosam(teacher, in_training(student))
    first = infosam.diagnostics()
    infosam(student, in_training(teacher))
    assert infosam.diagnostics().teacher_entropy == pytest.approx(first.student_entropy)


def test_diagnostics_before_a_step_are_refused():
    with pytest.raises(RuntimeError, match="InfoSAMLoss: diagnostics must follow a step, got a loss that was not"):
        InfoSAMLoss(DIM).diagnostics()


# Refusals: constructors.


@pytest.mark.parametrize("name", ["lambda_r", "lambda_d"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(name, value):
    with pytest.raises(
        ValueError, match=rf"InfoSAMLoss: {name} must be a finite number, got {value}; 0 switches the term off"
    ):
        InfoSAMLoss(DIM, **{name: value})


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan])
def test_order_must_be_positive(alpha):
    with pytest.raises(ValueError, match=rf"InfoSAMLoss: alpha must be a number above 0, got {alpha}; 2 is the order"):
        InfoSAMLoss(DIM, alpha=alpha)
    with pytest.raises(ValueError, match=rf"infosam_terms: alpha must be a number above 0, got {alpha}"):
        infosam_terms(relation_module(), pair()[0], in_training(pair()[1]), alpha=alpha)


@pytest.mark.parametrize("value", ["Cauchy-Schwarz", "", None, True, ["cauchy_schwarz"]])
def test_distillation_must_be_one_of_its_forms(value):
    message = (
        r"{}: distillation must be one of \('mutual_information', 'cauchy_schwarz', 'debiased', 'jensen_renyi'\), "
        rf"got {re.escape(repr(value))}; 'mutual_information' is the paper's"
    )
    with pytest.raises(ValueError, match=message.format("InfoSAMLoss")):
        InfoSAMLoss(DIM, distillation=value)
    with pytest.raises(ValueError, match=message.format("infosam_terms")):
        infosam_terms(relation_module(), pair()[0], in_training(pair()[1]), distillation=value)


@pytest.mark.parametrize("token", ["second", -1, 1.0, True, None])
def test_token_must_be_first_all_or_an_index(token):
    message = rf"InfoSAMLoss: token must be 'first', 'all' or an index, got {re.escape(repr(token))}; the paper's is 0"
    with pytest.raises(ValueError, match=message):
        InfoSAMLoss(DIM, token=token)


@pytest.mark.parametrize("dim", [0, -3, 2.0, True, None, "256"])
def test_dim_must_be_a_positive_integer(dim):
    message = rf"dim must be a positive integer, got {re.escape(repr(dim))}; 256 is that of every SAM"
    for build in (RelationModule, InfoSAMLoss):
        with pytest.raises(ValueError, match=f"{build.__name__}: {message}"):
            build(dim)


def test_generator_must_be_one():
    for build in (RelationModule, InfoSAMLoss):
        message = rf"{build.__name__}: generator must be a torch.Generator, got int; torch\.Generator\(\)\.manual"
        with pytest.raises(TypeError, match=message):
            build(DIM, generator=0)


# Refusals: implementations.

TEACHER, STUDENT = pair()
CALLS_WITH_IMPL = {
    "resolve": resolve,
    "InfoSAMLoss": lambda impl: InfoSAMLoss(DIM, impl=impl),
    "infosam_terms": lambda impl: infosam_terms(relation_module(), TEACHER, in_training(STUDENT), impl=impl),
    "RelationModule.scores": lambda impl: relation_module().scores(*TEACHER[:2], impl=impl),
    "relation_scores": lambda impl: relation_scores(TEACHER.image_features, TEACHER.mask_tokens, impl=impl),
    "batch_gram": lambda impl: batch_gram(TEACHER.image_features, impl=impl),
    "gram_terms": lambda impl: gram_terms(*[torch.eye(3).double()] * 2, *[torch.eye(3)] * 2, Objective(), impl=impl),
}


@pytest.mark.parametrize("name", CALLS_WITH_IMPL)
def test_implementations(name):
    call = CALLS_WITH_IMPL[name]
    call("auto")
    call("reference")
    # Operations are called by nobody but the others, which look first.
    speaker = {"RelationModule.scores": "RelationModule"}.get(name, name)
    speaker = speaker if speaker in ("InfoSAMLoss", "infosam_terms", "RelationModule") else "implementation"
    message = rf"{speaker}: impl must be one of \('auto', 'reference', 'triton'\), got 'cuda'; 'auto' is"
    with pytest.raises(ValueError, match=message):
        call("cuda")


# Refusals: features.


def bad_features() -> dict[str, tuple[dict, type[Exception], str]]:
    """Return changed members by what is wrong, with the error and what follows the name of the features."""
    floats = "must be a floating-point tensor, got {}; pass what the model computed, in any float dtype"
    image_shape = r"must have shape \[b, d, h, w\] without zeros, got {}; for tokens \[b, l, d\] pass tokens.mT"
    token_shape = r"must have shape \[s, n, d\] without zeros, got {}; flatten images and prompts into s"
    return {
        "integer features": (
            {"image_features": torch.ones(4, DIM, 5, 7).int()},
            TypeError,
            r"\.image_features " + floats.format(r"torch\.int32"),
        ),
        "no features": ({"image_features": None}, TypeError, r"\.image_features " + floats.format("NoneType")),
        "complex tokens": (
            {"mask_tokens": torch.ones(4, 1, DIM).cfloat()},
            TypeError,
            r"\.mask_tokens " + floats.format(r"torch\.complex64"),
        ),
        "list of tokens": ({"mask_tokens": [[1.0]]}, TypeError, r"\.mask_tokens " + floats.format("list")),
        "flat features": (
            {"image_features": torch.ones(4, 35, DIM)},
            ValueError,
            r"\.image_features " + image_shape.format(r"\(4, 35, 12\)"),
        ),
        "no pixels": (
            {"image_features": torch.ones(4, DIM, 0, 7)},
            ValueError,
            r"\.image_features " + image_shape.format(r"\(4, 12, 0, 7\)"),
        ),
        "tokens without n": (
            {"mask_tokens": torch.ones(4, DIM)},
            ValueError,
            r"\.mask_tokens " + token_shape.format(r"\(4, 12\)"),
        ),
        "tokens per image": (
            {"mask_tokens": torch.ones(2, 2, 1, DIM)},
            ValueError,
            r"\.mask_tokens " + token_shape.format(r"\(2, 2, 1, 12\)"),
        ),
        "no tokens": (
            {"mask_tokens": torch.ones(4, 0, DIM)},
            ValueError,
            r"\.mask_tokens " + token_shape.format(r"\(4, 0, 12\)"),
        ),
        "two devices": (
            {"mask_tokens": torch.ones(4, 1, DIM, device="meta")},
            ValueError,
            r"\.image_features and {name}\.mask_tokens must be on one device, got cpu and meta; move one of them",
        ),
        "two widths": (
            {"mask_tokens": torch.ones(4, 1, 9)},
            ValueError,
            r"\.image_features and {name}\.mask_tokens must have as many channels, got 12 and 9; take both from",
        ),
        "no index": (
            {"mask_tokens": torch.ones(6, 1, DIM)},
            ValueError,
            r"\.image_index must say which image .* got None with 4 images and 6 samples; for p prompts an image pass",
        ),
        "float index": (
            {"image_index": torch.zeros(4)},
            TypeError,
            r"\.image_index must be an int64 tensor, got torch\.float32; convert it with \.long\(\)",
        ),
        "list as index": (
            {"image_index": [0, 1, 2, 3]},
            TypeError,
            r"\.image_index must be an int64 tensor, got list; convert it with \.long\(\)",
        ),
        "short index": (
            {"image_index": torch.arange(3)},
            ValueError,
            r"\.image_index must have shape \[s\] = \[4\], got \(3,\); give one image per sample",
        ),
        "deep index": (
            {"image_index": torch.zeros(4, 1).long()},
            ValueError,
            r"\.image_index must have shape \[s\] = \[4\], got \(4, 1\); give one image per sample",
        ),
        "negative index": (
            {"image_index": torch.tensor([0, 1, -1, 2])},
            ValueError,
            r"\.image_index must lie in \[0, 3\] with 4 images, got -1 to 2; count images from 0 in the order",
        ),
        "large index": (
            {"image_index": torch.tensor([0, 1, 4, 2])},
            ValueError,
            r"\.image_index must lie in \[0, 3\] with 4 images, got 0 to 4; count images from 0 in the order",
        ),
    }


@pytest.fixture(params=bad_features())
def bad(request):
    changes, error, message = bad_features()[request.param]
    return TEACHER._replace(**changes), error, message


def test_features_must_be_well_formed(bad):
    """The module takes one token out of the features before the loss looks at them."""
    features, error, message = bad
    functions = {"infosam_terms": partial(infosam_terms, relation_module()), "InfoSAMLoss": InfoSAMLoss(DIM)}
    for (function, call), who in product(functions.items(), ("teacher", "student")):
        both = {"teacher": TEACHER, "student": in_training(STUDENT)}
        # Where only one of the two were changed, shapes that are right by themselves would differ first.
        both = {**both, who: features} if "lie in" not in message else {"teacher": features, "student": features}
        name = who if "lie in" not in message else "teacher"
        with torch.no_grad(), pytest.raises(error, match=f"{function}: {name}" + message.replace("{name}", name)):
            call(**both)


def test_features_of_the_relation_module_must_be_well_formed(bad):
    features, error, message = bad
    with pytest.raises(error, match="RelationModule: features" + message.replace("{name}", "features")):
        relation_module()(*features)


def test_relations_of_no_samples_are_refused():
    with pytest.raises(
        ValueError, match=r"features.image_features must have shape \[b, d, h, w\] without zeros, got \(0,"
    ):
        RelationModule(DIM)(torch.zeros(0, DIM, 3, 3), torch.zeros(0, 1, DIM))


def test_an_int32_index_is_fine():
    features = TEACHER._replace(image_index=torch.tensor([3, 1, 1, 0], dtype=torch.int32))
    expected = relation_module()(features.image_features, features.mask_tokens, torch.tensor([3, 1, 1, 0]))
    assert torch.equal(relation_module()(*features), expected)


def test_features_must_have_the_width_of_the_module():
    message = r"{}: features must have dim = 9 channels, got 12; build the loss with dim=12"
    for function, call in {
        "RelationModule": lambda: relation_module(9)(*TEACHER),
        "infosam_terms": lambda: infosam_terms(relation_module(9), TEACHER, in_training(STUDENT)),
        "InfoSAMLoss": lambda: InfoSAMLoss(9)(TEACHER, in_training(STUDENT)),
    }.items():
        with pytest.raises(ValueError, match=message.format(function)):
            call()


def test_features_must_be_on_the_device_of_the_module():
    message = r"{}: features must be on the module's device meta, got cpu; move the loss with .*\.to\('cpu'\)"
    with pytest.raises(ValueError, match=message.format("RelationModule")):
        relation_module().to("meta")(*TEACHER)
    with pytest.raises(ValueError, match=message.format("InfoSAMLoss")):
        InfoSAMLoss(DIM).to("meta")(TEACHER, in_training(STUDENT))


# Refusals: teacher and student together.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_features": torch.ones(4, DIM, 7, 5)},
            r"image_features of teacher and student must have one shape, got \(4, 12, 5, 7\) and \(4, 12, 7, 5\); run",
        ),
        (
            {"mask_tokens": torch.ones(4, 2, DIM)},
            r"mask_tokens of teacher and student must have one shape, got \(4, 1, 12\) and \(4, 2, 12\); run both",
        ),
        (
            {"image_index": torch.tensor([0, 1, 3, 2])},
            r"image_index of teacher and student must be the same, got different samples; run both",
        ),
        (
            {name: getattr(STUDENT, name).to("meta") for name in ("image_features", "mask_tokens")},
            r"image_features of teacher and student must be on one device, got cpu and meta; move one",
        ),
    ],
    ids=["size", "tokens", "index", "device"],
)
def test_teacher_and_student_must_fit(changes, message):
    student = STUDENT._replace(**changes)
    with torch.no_grad(), pytest.raises(ValueError, match="infosam_terms: " + message):
        infosam_terms(relation_module(), TEACHER, student)
    with torch.no_grad(), pytest.raises(ValueError, match="InfoSAMLoss: " + message):
        InfoSAMLoss(DIM, token="all")(TEACHER, student)


def test_an_index_that_counts_the_samples_is_none():
    student = in_training(STUDENT)._replace(image_index=torch.arange(4))
    expected = infosam_terms(relation_module(), TEACHER, in_training(STUDENT))
    assert torch.equal(infosam_terms(relation_module(), TEACHER, student).loss, expected.loss)


def test_the_student_must_require_grad():
    message = r"the student's features must require grad, got features without gradient; run .* torch\.no_grad"
    with pytest.raises(ValueError, match=message):
        infosam_terms(relation_module(), TEACHER, STUDENT)
    with pytest.raises(ValueError, match=message):
        InfoSAMLoss(DIM)(TEACHER, STUDENT)


def test_token_must_exist():
    with pytest.raises(
        ValueError, match=r"token must be below the number of mask tokens, got 1 with 1 tokens; 'first'"
    ):
        InfoSAMLoss(DIM, token=1)(TEACHER, in_training(STUDENT))


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("source", [nn.Linear(1, 1), torch.ones(1), (torch.ones(1), torch.ones(1)), None])
def test_a_bare_model_is_no_source(who, source):
    both = {"teacher": TEACHER, "student": in_training(STUDENT), who: source}
    message = rf"InfoSAMLoss: {who} must be a tap or SAMFeatures, got {type(source).__name__}; .*{who} = tap\(model\)"
    with pytest.raises(TypeError, match=message):
        InfoSAMLoss(DIM)(**both)


def test_a_tapped_teacher_needs_a_batch():
    teacher = tap(nn.Sequential(nn.Identity(), nn.Identity()), image_features="0", mask_tokens="1")
    with pytest.raises(ValueError, match=r"InfoSAMLoss: batch must be given for the teacher to run on, got None; pass"):
        InfoSAMLoss(DIM)(teacher, in_training(STUDENT))
