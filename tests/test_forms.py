"""The forms of L_d with their minimum at the teacher: laws, weights of samples, descents, refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.descent import descend, state, student_maps, teacher_maps
from renyi_kd import (
    InfoSAMLoss,
    Objective,
    RelationModule,
    SAMFeatures,
    gram_matrix,
    infosam_terms,
    joint_entropy,
    renyi_entropy,
    tap,
)
from renyi_kd.ops.gram_terms import gram_terms
from tests.support import gradients, in_training, module_gradients, randn, relation_module, sam_features
from tests.support.models import DIM as SAM_DIM
from tests.support.models import hf_batch, hf_sam
from tests.support.tolerance import assert_close_on_scale

DIM = 12
FORMS = ["debiased", "jensen_renyi"]
WEIGHTS = [0.25, 1.0, 0.0, 0.6]
fp64 = partial(torch.tensor, dtype=torch.float64)

maps_of = {
    "seed": st.integers(0, 10_000),
    "n_samples": st.integers(1, 6),
    "n_scores": st.integers(1, 5),
    "like": st.sampled_from([0.0, 0.5, 1.0]),
}


def maps(seed: int, n_samples: int, n_scores: int, like: float) -> tuple[Tensor, Tensor]:
    """Return maps of a teacher and of a student that are alike to some degree."""
    teacher = randn(n_samples, n_scores, seed=seed, dtype=torch.float64)
    return teacher, like * teacher + (1 - like) * randn(n_samples, n_scores, seed=seed + 20_000, dtype=torch.float64)


def divergence(form: str, teacher: Tensor, student: Tensor, alpha: float = 2.0, weight: Tensor | None = None) -> Tensor:
    """Return L_d of relation maps ``[s, k]``."""
    grams = [torch.eye(len(teacher), dtype=torch.float64)] * 2
    objective = Objective(distillation=form, alpha=alpha)
    return gram_terms(*grams, teacher, student, objective, weight=weight, impl="reference").distillation


def gradient_of(form: str, teacher: Tensor, student: Tensor, alpha: float = 2.0) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(divergence(form, teacher, student, alpha), student)[0]


def signs_and_scales(n: int, seed: int) -> Tensor:
    values = randn(n, 1, seed=seed, dtype=torch.float64)
    return values.sign() * (0.5 + values.abs())


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed, dtype=torch.float64)).Q


def pair(n_samples: int = 4, dtype: torch.dtype = torch.float64, **settings) -> tuple[SAMFeatures, SAMFeatures]:
    """Return features of a teacher, and of a student that resembles it a little."""
    teacher, student = (sam_features(n_samples, seed=seed, dtype=dtype, **settings) for seed in (0, 10))
    return teacher, SAMFeatures(*(s + 0.5 * t for s, t in zip(student[:2], teacher[:2], strict=True)), student[2])


def rows(features: SAMFeatures, wanted: slice) -> SAMFeatures:
    return SAMFeatures(features.image_features[wanted], features.mask_tokens[wanted])


def relation_maps(relation: RelationModule, features: SAMFeatures) -> Tensor:
    return relation(*features).flatten(1)


def of_pairs(relation: RelationModule, teacher: SAMFeatures, student: SAMFeatures) -> Tensor:
    """Return the Jensen-Rényi divergence of each sample ``[s]``, its relations with their graph."""
    both = zip(*(relation_maps(relation, features) for features in (teacher, student)), strict=True)
    return torch.stack([renyi_entropy(gram_matrix(torch.stack(maps)), 2) for maps in both])


# The debiased mutual information.


@given(**maps_of, alpha=st.sampled_from([2.0, 3.0, 5.0, math.inf]))
def test_laws_of_the_debiased_form(seed, n_samples, n_scores, like, alpha):
    teacher, student = maps(seed, n_samples, n_scores, like)
    bits = partial(divergence, "debiased", alpha=alpha)
    value = bits(teacher, student).item()
    grams = gram_matrix(teacher), gram_matrix(student)
    own = [joint_entropy(gram, gram, alpha=alpha) for gram in grams]
    assert value == pytest.approx((joint_entropy(*grams, alpha=alpha) - sum(own) / 2).item(), abs=1e-12)
    assert value >= -1e-12
    close = partial(pytest.approx, rel=1e-9, abs=1e-12)
    assert bits(student, teacher).item() == close(value)
    assert bits(teacher, signs_and_scales(n_samples, seed + 1) * student).item() == close(value)
    assert bits(teacher, student @ rotation(n_scores, seed + 2)).item() == close(value)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed))
    assert bits(teacher[order], student[order]).item() == close(value)
    assert bits(teacher.repeat(2, 1), student.repeat(2, 1)).item() == close(value)
    if alpha == 2:
        # Zero exactly where the squared cosines are equal, as that of two matrices is 1 nowhere else.
        squares = [gram.square().flatten() for gram in grams]
        assert 2**-value == close(torch.cosine_similarity(*squares, 0).item())
        assert value <= math.log2(n_samples) / 2 + 1e-12


@given(**maps_of, alpha=st.sampled_from([2.0, 3.0, 5.0, math.inf]))
def test_the_debiased_form_is_stationary_at_cosines_of_the_teachers_magnitude(seed, n_samples, n_scores, like, alpha):
    teacher, _ = maps(seed, n_samples, n_scores, like)
    student = signs_and_scales(n_samples, seed + 1) * teacher @ rotation(n_scores, seed + 2)
    assert divergence("debiased", teacher, student, alpha).item() == pytest.approx(0, abs=1e-12)
    assert gradient_of("debiased", teacher, student, alpha).abs().max() < 1e-9


def test_values_of_the_debiased_form():
    one, other, between = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    alike, apart = fp64([one, one]), fp64([one, other])
    # From sums of t^4, s^4 and t^2 s^2: 4, 2 and 2.
    assert divergence("debiased", alike, apart).item() == pytest.approx(0.5)
    # 2 + 2 * .6^4, 2 and 2: the teacher's is a soft Gram.
    assert divergence("debiased", fp64([one, between]), apart).item() == pytest.approx(math.log2(2.2592 / 2) / 2)
    for n in (3, 5):
        # The largest there is: maps that are all alike, and all orthogonal.
        most = divergence("debiased", torch.ones(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))
        assert most.item() == pytest.approx(math.log2(n) / 2)


# Found by descent. Its maps are those of four samples and three pixels.
BELOW_ZERO = (
    fp64([[-0.2, 1.4, 1.2], [-0.4, 0.8, -0.1], [-1.0, 0.0, 0.3], [1.1, 1.0, -0.1]]),
    fp64([[0.1, 1.3, 1.7], [-0.7, 0.6, 0.5], [-0.5, 0.2, -0.4], [1.6, 0.7, 0.4]]),
)


@pytest.mark.parametrize(("alpha", "bits"), [(0.5, -0.0219), (1.0, -0.0232), (1.5, -0.0124), (1.8, -0.0031)])
def test_the_debiased_form_is_refused_where_it_can_be_negative(alpha, bits):
    grams = [gram_matrix(each) for each in BELOW_ZERO]
    own = [joint_entropy(gram, gram, alpha=alpha).item() for gram in grams]
    assert joint_entropy(*grams, alpha=alpha).item() - sum(own) / 2 == pytest.approx(bits, abs=1e-4)
    assert divergence("debiased", *BELOW_ZERO).item() > 0
    settings = {"alpha": alpha, "distillation": "debiased"}
    message = rf"{{}}: alpha must be at least 2 under distillation='debiased', got {alpha}; below, it can be negative"
    with pytest.raises(ValueError, match=message.format("infosam_terms")):
        infosam_terms(relation_module(), pair()[0], in_training(pair()[1]), **settings)
    with pytest.raises(ValueError, match=message.format("InfoSAMLoss")):
        InfoSAMLoss(DIM, **settings)
    infosam = InfoSAMLoss(DIM, distillation="debiased")
    with pytest.raises(ValueError, match=message.format("InfoSAMLoss")):
        infosam.objective = infosam.objective._replace(alpha=alpha)
    assert infosam.alpha == 2


def test_one_sample_is_refused_where_the_form_compares_samples():
    teacher, student = pair(1)
    with pytest.raises(ValueError, match=r"infosam_terms: the batch must hold at least two samples"):
        infosam_terms(relation_module(), teacher, in_training(student), distillation="debiased")


# The Jensen-Rényi divergence of each sample's pair.


@given(**maps_of, weighted=st.booleans())
def test_laws_of_the_divergence_of_pairs(seed, n_samples, n_scores, like, weighted):
    teacher, student = maps(seed, n_samples, n_scores, like)
    weight = randn(n_samples, seed=seed + 3, dtype=torch.float64).abs() if weighted else None
    bits = partial(divergence, "jensen_renyi", weight=weight)
    value = bits(teacher, student).item()
    both = zip(teacher, student, strict=True)
    each = torch.stack([renyi_entropy(gram_matrix(torch.stack(one)), 2) for one in both])
    cosines = torch.cosine_similarity(teacher, student)
    torch.testing.assert_close(each, 1 - (1 + cosines.square()).log2(), rtol=0, atol=1e-12)
    weights = torch.ones(n_samples, dtype=torch.float64) if weight is None else weight
    # Over the number of samples, not over the sum of weights.
    assert value == pytest.approx((weights * each).sum().item() / n_samples, abs=1e-12)
    assert -1e-12 <= value <= weights.mean() + 1e-12
    close = partial(pytest.approx, rel=1e-9, abs=1e-12)
    assert bits(student, teacher).item() == close(value)
    assert bits(signs_and_scales(n_samples, seed + 1) * teacher, student).item() == close(value)
    assert bits(teacher, signs_and_scales(n_samples, seed + 1) * student).item() == close(value)
    assert bits(*(each @ rotation(n_scores, seed + 2) for each in (teacher, student))).item() == close(value)
    order = torch.randperm(n_scores, generator=torch.Generator().manual_seed(seed))
    assert bits(teacher[:, order], student[:, order]).item() == close(value)
    if like == 1:
        assert value == pytest.approx(0, abs=1e-12)
        assert gradient_of("jensen_renyi", teacher, student).abs().max() < 1e-9
    # No order but 2 is asked for.
    assert divergence("jensen_renyi", teacher, student, 1.0, weight).item() == value


def turned(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit maps of pairs at these angles."""
    return torch.eye(2, dtype=torch.float64)[:1].expand(len(angles), 2), torch.stack([angles.cos(), angles.sin()], 1)


def test_the_divergence_of_pairs_by_their_angle():
    for angle, bits in ((0.0, 0.0), (math.pi, 0.0), (math.pi / 2, 1.0), (math.pi / 4, 1 - math.log2(1.5))):
        assert divergence("jensen_renyi", *turned(fp64([angle]))).item() == pytest.approx(bits, abs=1e-12)
    for small in (1e-2, 1e-3):
        value = divergence("jensen_renyi", *turned(fp64([small]))).item()
        assert value == pytest.approx(small**2 / (2 * math.log(2)), rel=small)


def test_the_gradient_of_pairs_is_bounded():
    """At most 1 / (sqrt(2) ln 2) = 1.02 bits per radian, where cos 2 theta = -1/3."""
    steep = math.acos(-1 / 3) / 2
    angles = torch.cat([torch.linspace(0, math.pi, 181, dtype=torch.float64), fp64([steep])])
    teacher, student = turned(angles)
    # Of a mean over as many pairs.
    slopes = len(angles) * gradient_of("jensen_renyi", teacher, student).norm(dim=1)
    expected = (2 * angles).sin().abs() / ((1 + angles.cos().square()) * math.log(2))
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-10)
    assert slopes[-1].item() == pytest.approx(1 / (math.sqrt(2) * math.log(2)), rel=1e-12)
    assert slopes[-1] > slopes[:-1].max() > 1.02


def test_pairs_see_the_places_of_pixels():
    teacher = randn(3, 20, dtype=torch.float64)
    moved = teacher.roll(1, 1)
    assert divergence("jensen_renyi", teacher, moved) > 0.3
    assert divergence("jensen_renyi", teacher, teacher @ rotation(20, seed=1)) > 0.3
    # Which forms that compare Grams cannot.
    assert divergence("debiased", teacher, moved).item() == pytest.approx(0, abs=1e-12)
    assert divergence("cauchy_schwarz", teacher, moved).item() == pytest.approx(0, abs=1e-12)


def test_a_map_without_scores_is_orthogonal_to_every_other():
    teacher = randn(3, 5, dtype=torch.float64)
    student = teacher.clone()
    student[1] = 0
    assert divergence("jensen_renyi", teacher, student).item() == pytest.approx(1 / 3)
    assert torch.equal(gradient_of("jensen_renyi", teacher, student)[1], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_one_sample_is_enough_for_pairs(n_tokens):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair(1, n_tokens=n_tokens)
    trained = in_training(student)
    terms = infosam_terms(relation, teacher, trained, distillation="jensen_renyi", lambda_d=0.7)
    assert terms.compression.item() == 0
    assert terms.distillation.item() == pytest.approx(of_pairs(relation, teacher, student)[0].item(), abs=1e-12)
    assert terms.loss.item() == pytest.approx(0.7 * terms.distillation.item())
    of_student, of_module = gradients(terms.loss, trained, relation)
    assert min(value.abs().max() for value in of_student.values()) > 1e-4
    assert max(value.abs().max() for value in of_module.values()) < 1e-12
    infosam = InfoSAMLoss(DIM, distillation="jensen_renyi", token="all").double()
    assert infosam(teacher, in_training(student)) > 0
    diagnostics = torch.stack(infosam.diagnostics()[:5])
    assert torch.equal(diagnostics, torch.zeros_like(diagnostics))


@pytest.mark.parametrize("weight", [None, fp64(WEIGHTS)], ids=["alike", "weighted"])
@pytest.mark.parametrize("n_shards", [2, 4])
def test_accumulated_pairs_are_those_of_the_whole_batch(n_shards, weight):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair()
    settings = {"distillation": "jensen_renyi", "lambda_r": 0.0, "lambda_d": 0.7}
    whole = in_training(student)
    loss = infosam_terms(relation, teacher, whole, sample_weight=weight, **settings).loss
    shards = [slice(first, first + 4 // n_shards) for first in range(0, 4, 4 // n_shards)]
    apart = in_training(student)
    losses = [
        infosam_terms(
            relation,
            rows(teacher, shard),
            rows(apart, shard),
            sample_weight=None if weight is None else weight[shard],
            **settings,
        ).loss
        for shard in shards
    ]
    mean = sum(losses) / n_shards
    assert mean.item() == pytest.approx(loss.item(), abs=1e-12)
    expected, found = gradients(loss, whole, relation)[0], gradients(mean, apart, relation)[0]
    for name, value in expected.items():
        assert_close_on_scale(found[name], value, name=name, rtol=1e-12)


@pytest.mark.parametrize("index", [None, [2, 0, 1, 0]], ids=["none", "unsorted"])
def test_weighted_pairs_and_their_gradients(index):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair(image_index=index)
    settings = {"distillation": "jensen_renyi", "lambda_r": 0.3, "lambda_d": -1.7}
    weight, trained, again = fp64(WEIGHTS), in_training(student), in_training(student)
    terms = infosam_terms(relation, teacher, trained, sample_weight=weight, **settings)
    constant = relation_module(dtype=torch.float64).requires_grad_(False)
    by_hand = (weight * of_pairs(constant, teacher, again)).sum() / 4
    assert terms.distillation.item() == pytest.approx(by_hand.item(), abs=1e-12)
    compression = infosam_terms(relation, teacher, again).compression
    assert terms.compression.item() == pytest.approx(compression.item(), abs=1e-12)
    found = gradients(terms.loss, trained, relation)
    for actual, expected in zip(found, gradients(0.3 * compression - 1.7 * by_hand, again, relation), strict=True):
        for name, value in expected.items():
            assert_close_on_scale(actual[name], value, name=name, rtol=1e-10)
    # The third sample is the one of no weight.
    assert torch.equal(found[0]["mask_tokens"][2], torch.zeros(1, DIM, dtype=torch.float64))


@pytest.mark.parametrize("weight", [None, fp64(WEIGHTS)], ids=["alike", "weighted"])
@pytest.mark.parametrize("index", [None, [1, 0, 1, 1]], ids=["none", "repeated"])
def test_gradient_of_weighted_pairs_is_the_derivative(index, weight):
    relation = relation_module(4, dtype=torch.float64)
    teacher, student = pair(dim=4, size=(2, 2), n_tokens=2, image_index=index)

    def terms(image_features, mask_tokens, *_):
        moved = SAMFeatures(image_features, mask_tokens, student.image_index)
        return tuple(infosam_terms(relation, teacher, moved, distillation="jensen_renyi", sample_weight=weight))

    features = in_training(student)[:2]
    assert torch.autograd.gradcheck(terms, features)
    # gradcheck moves the parameters in place.
    assert torch.autograd.gradcheck(lambda *moved: terms(*moved)[1], (*features, *relation.parameters()))


@pytest.mark.parametrize("alpha", [2.0, 3.0, math.inf])
def test_gradient_of_the_debiased_form_is_the_derivative_for_every_parameter(alpha):
    relation = relation_module(4, dtype=torch.float64)
    teacher, student = pair(dim=4, size=(2, 2), n_tokens=2)

    def terms(image_features, mask_tokens, *_):
        moved = SAMFeatures(image_features, mask_tokens)
        return tuple(infosam_terms(relation, teacher, moved, distillation="debiased", alpha=alpha))

    assert torch.autograd.gradcheck(terms, (*in_training(student)[:2], *relation.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_every_dtype(dtype):
    relation, (teacher, student) = relation_module(), pair(dtype=torch.float32)
    weight = torch.tensor([0.25, 1.0, 0.0, 0.5])
    settings = {"distillation": "jensen_renyi", "lambda_r": 0.0}
    trained, again = in_training(student), in_training(student)
    terms = infosam_terms(relation, teacher, trained, sample_weight=weight.to(dtype), **settings)
    expected = infosam_terms(relation, teacher, again, sample_weight=weight, **settings)
    assert terms.loss.dtype == torch.float32
    assert torch.equal(terms.loss, expected.loss)
    found = gradients(terms.loss, trained, relation)[0]
    assert all(torch.equal(found[name], value) for name, value in gradients(expected.loss, again, relation)[0].items())


def test_weights_are_constants():
    """A teacher's own estimate of its IoU may come with a graph; to follow the gradient would lower the weight."""
    teacher, student = pair()
    weight = fp64(WEIGHTS, requires_grad=True)
    for bank_size in (0, 4):
        infosam = InfoSAMLoss(DIM, distillation="jensen_renyi", bank_size=bank_size).double()
        infosam(teacher, in_training(student), sample_weight=weight).backward()
        assert weight.grad is None


# The relation module, which pairs take as a constant.


@pytest.mark.parametrize("detach", [False, True])
def test_pairs_give_the_module_no_gradient(detach):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair()
    settings = {"distillation": "jensen_renyi", "detach_teacher_relation": detach}
    terms = infosam_terms(relation, teacher, in_training(student), **settings)

    def of_module(term: Tensor) -> list[Tensor]:
        return torch.autograd.grad(
            term, relation.parameters(), retain_graph=True, allow_unused=True, materialize_grads=True
        )

    assert not any(value.any() for value in of_module(terms.distillation))
    of_compression = of_module(terms.compression)
    assert all(map(torch.equal, of_module(terms.loss), of_compression))
    assert max(value.abs().max() for value in of_compression) > 1e-3


def test_without_compression_the_module_stays_as_it_began():
    infosam = InfoSAMLoss(DIM, lambda_r=0.0, distillation="jensen_renyi")
    began = {name: value.clone() for name, value in infosam.state_dict().items()}
    teacher, student = pair(dtype=torch.float32)
    optimizer = torch.optim.SGD(infosam.parameters(), lr=1.0, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        infosam(teacher, in_training(student)).backward()
        # Zeros, not None, which DDP would wait for.
        assert all(torch.equal(value.grad, torch.zeros_like(value)) for value in infosam.parameters())
        optimizer.step()
    assert all(torch.equal(value, began[name]) for name, value in infosam.state_dict().items())
    decaying = torch.optim.AdamW(infosam.parameters(), lr=0.1, weight_decay=0.1)
    decaying.step()
    assert not torch.equal(infosam.relation.key_proj.weight, began["relation.key_proj.weight"])


def test_a_module_that_were_no_constant_would_forget_the_features():
    """Why it is one: its parameters alone make all maps alike, whatever the features."""
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair()
    optimizer = torch.optim.Adam(relation.parameters(), lr=0.02)
    found = []
    for _ in range(200):
        maps = relation_maps(relation, teacher)
        term = of_pairs(relation, teacher, student).mean()
        found.append((term.item(), gram_matrix(maps.detach())[0, 1:].abs().mean().item()))
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    (first, cosine), (last, cosine_at_last) = found[0], found[-1]
    assert last < 0.01 * first
    # Other samples of the teacher, which have nothing to do with it, have its maps.
    assert cosine < 0.4
    assert cosine_at_last > 0.99
    trained = in_training(student)
    term = infosam_terms(relation_module(dtype=torch.float64), teacher, trained, distillation="jensen_renyi")
    assert term.distillation.item() == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize(("like", "least"), [(0.0, 0.9997), (0.9, 0.99)], ids=["uncorrelated", "alike"])
def test_the_relation_begins_close_to_an_inner_product(like, least):
    """Its projections, uniform in +-1 / 16, add 1 / 48 of a token's length to it, aside."""
    found = []
    for seed in range(8):
        pixels = randn(4, 256, 16, 16, seed=seed) * (1 - like) + like * randn(1, 256, 1, 1, seed=seed + 10)
        tokens = randn(4, 1, 256, seed=seed + 20)
        relation = RelationModule(generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            of_module = relation_maps(relation, SAMFeatures(pixels, tokens))
        plain = F.layer_norm(pixels.flatten(2).mT, [256]) @ F.layer_norm(tokens, [256]).mT
        found.append(torch.cosine_similarity(of_module, plain[..., 0], 1))
    cosines = torch.cat(found)
    assert least < cosines.min()
    if like == 0:
        angle = (2 - 2 * cosines).sqrt().mean().item()
        assert angle == pytest.approx(1 / 48, rel=0.05)


# Descents of free maps.


@pytest.mark.parametrize("start", ["teacher", "near", "random"])
@pytest.mark.parametrize("form", ["mutual_information", "cauchy_schwarz", "debiased", "jensen_renyi"])
def test_where_a_descent_ends(form, start):
    teacher = teacher_maps(4, 64)
    before = student_maps(teacher, start)
    path = descend(teacher, before, form, 600, step_size=0.12)
    maps, bits = path[-1]
    end = state(len(path) - 1, teacher, maps, bits)
    gram = maps @ maps.mT
    if form == "mutual_information":
        assert (gram - torch.eye(4)).abs().max() < 1e-6
        assert end.gram_distance > 0.3
        return
    assert end.bits == pytest.approx(0, abs=1e-9)
    if form == "jensen_renyi":
        assert (maps * teacher).sum(1).abs().min() > 1 - 1e-12
    elif form == "debiased":
        assert (gram.abs() - (teacher @ teacher.mT).abs()).abs().max() < 1e-6
    else:
        assert (gram - teacher @ teacher.mT).abs().max() < 1e-4
    if form != "jensen_renyi" and start != "teacher":
        # Of the maps themselves it sees nothing: they stay about as far as they were.
        assert end.map_distance > 0.8 * state(0, teacher, before, 0.0).map_distance


def test_the_debiased_form_has_other_minima():
    """Where the signs of three cosines contradict one another, as no turning of the teacher's maps can make them."""
    teacher = teacher_maps(8, 64, seed=9)
    path = descend(teacher, student_maps(teacher, "random", seed=109), "debiased", 2000, step_size=0.12)
    maps, bits = path[-1]
    assert len(path) <= 2000
    assert gradient_of("debiased", teacher, maps).norm() < 1e-12
    assert bits > 1e-3
    signs = (maps @ maps.mT).sign()
    assert torch.einsum("ij,jk,ik->ijk", signs, signs, signs).min() == -1
    for seed in range(3):
        aside = F.normalize(maps + 0.01 * randn(8, 64, seed=seed, dtype=torch.float64) / 8, dim=1)
        assert divergence("debiased", teacher, aside) > bits


# Around it: a bank, models with taps, a compiler.


@pytest.mark.parametrize("weight", [None, fp64([0.25, 0.7])], ids=["alike", "weighted"])
def test_samples_of_a_bank_join_the_compression_alone(weight):
    settings = {"distillation": "jensen_renyi", "lambda_r": 0.3}
    relation = relation_module(dtype=torch.float64)
    infosam, without = (InfoSAMLoss(DIM, bank_size=n, **settings).double() for n in (3, 0))
    infosam.relation = without.relation = relation
    for seed in (20, 40):
        earlier = (sam_features(2, seed=s, dtype=torch.float64) for s in (seed, seed + 10))
        infosam(next(earlier), in_training(next(earlier)), sample_weight=weight)
    teacher, student = pair(2)
    own, again = in_training(student), in_training(student)
    terms = infosam.terms(teacher, own, sample_weight=weight)
    assert infosam.diagnostics().teacher_entropy > math.log2(3)
    expected = without.terms(teacher, again, sample_weight=weight)
    assert terms.distillation.item() == pytest.approx(expected.distillation.item(), abs=1e-12)
    assert terms.compression.item() != pytest.approx(expected.compression.item(), abs=0.1)
    found = gradients(terms.loss, own, relation)[0]
    wanted = gradients(expected.loss, again, relation)[0]
    for name, value in wanted.items():
        assert_close_on_scale(found[name], value, name=name, rtol=1e-12)


def test_a_bank_that_holds_what_is_not_finite_leaves_pairs_alone():
    infosam = InfoSAMLoss(DIM, bank_size=4, distillation="jensen_renyi").double()
    teacher, student = pair()
    broken = student._replace(image_features=student.image_features.clone())
    broken.image_features[0] = torch.nan
    assert infosam.terms(teacher, in_training(broken)).distillation.isnan()
    expected = infosam_terms(infosam.relation, teacher, in_training(student), distillation="jensen_renyi")
    found = infosam.terms(teacher, in_training(student)).distillation
    assert found.item() == pytest.approx(expected.distillation.item(), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_a_tapped_sam(form):
    student, infosam = hf_sam(1), InfoSAMLoss(SAM_DIM, distillation=form)
    tapped_teacher, tapped_student = tap(hf_sam(0)), tap(student)
    batch = hf_batch(2, 2)
    inputs = {name: batch[name] for name in ("pixel_values", "input_boxes")}
    weight = None if form == "debiased" else torch.tensor(WEIGHTS)
    with torch.no_grad():
        whole = infosam.terms(tapped_teacher, tapped_student, inputs)
    loss = infosam(tapped_teacher, tapped_student, inputs, sample_weight=weight)
    found = module_gradients(loss, student, infosam)
    assert all(value.isfinite().all() for value in found.values())
    for part in ("0.vision_encoder", "0.mask_decoder", "1.relation"):
        assert max(value.abs().max() for name, value in found.items() if name.startswith(part)) > 0
    assert whole.distillation > 0
    if weight is None:
        assert loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)
    else:
        assert whole.compression < loss < whole.loss
        with pytest.raises(ValueError, match=r"InfoSAMLoss: sample_weight must have shape \[s\] = \[4\], got \[2\]"):
            infosam(tapped_teacher, tapped_student, inputs, sample_weight=weight[:2])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("form", "weight"),
    [("debiased", None), ("jensen_renyi", None), ("jensen_renyi", fp64(WEIGHTS))],
    ids=["debiased", "pairs", "weighted pairs"],
)
def test_under_a_compiler(form, weight):
    relation, (teacher, student) = relation_module(dtype=torch.float64), pair()

    def loss(features: SAMFeatures) -> Tensor:
        return infosam_terms(relation, teacher, features, distillation=form, sample_weight=weight).loss

    one, other = in_training(student), in_training(student)
    value, expected = torch.compile(loss, backend="eager", fullgraph=True)(one), loss(other)
    assert torch.equal(value, expected)
    for found, wanted in zip(gradients(value, one, relation), gradients(expected, other, relation), strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# Refusals.


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3), ValueError, r"must have shape \[s\] = \[4\], got \[3\]; give one number per sample"),
        (torch.ones(4, 1), ValueError, r"must have shape \[s\] = \[4\], got \[4, 1\]; give one"),
        (torch.ones(()), ValueError, r"must have shape \[s\] = \[4\], got \[\]; give one"),
        (torch.ones(4).long(), TypeError, r"must be a floating-point tensor, got torch\.int64; give one number"),
        (torch.ones(4).bool(), TypeError, r"must be a floating-point tensor, got torch\.bool; give one number"),
        (torch.ones(4).cfloat(), TypeError, r"must be a floating-point tensor, got torch\.complex64; give"),
        ([1.0, 1.0, 1.0, 1.0], TypeError, r"must be a floating-point tensor, got list; give one number per sample"),
        (0.5, TypeError, r"must be a floating-point tensor, got float; give one number per sample"),
        (torch.ones(4, device="meta"), ValueError, r"must be on the features' device cpu, got meta; move it with"),
        (torch.tensor([1.0, -0.5, 1.0, 1.0]), ValueError, r"must .* not negative, got \[1\.0, -0\.5, 1\.0, 1\.0\];"),
        (torch.tensor([1.0, math.nan, 1.0, 1.0]), ValueError, r"must be finite and .*, got \[1\.0, nan, 1\.0, 1\.0\];"),
        (torch.tensor([1.0, math.inf, 1.0, 1.0]), ValueError, r"must be finite and .*, got \[1\.0, inf, 1\.0, 1\.0\];"),
    ],
    ids=[
        "short", "deep", "scalar", "integer", "bool", "complex", "list", "number", "device", "negative", "NaN", "inf",
    ],
)  # fmt: skip
@pytest.mark.parametrize("check_finite", [False, True])
def test_weights_must_be_well_formed(weight, error, message, check_finite):
    teacher, student = pair(dtype=torch.float32)
    settings = {"distillation": "jensen_renyi", "check_finite": check_finite}
    with pytest.raises(error, match="infosam_terms: sample_weight " + message):
        infosam_terms(relation_module(), teacher, in_training(student), sample_weight=weight, **settings)
    infosam = InfoSAMLoss(DIM, **settings)
    with pytest.raises(error, match="InfoSAMLoss: sample_weight " + message):
        infosam(teacher, in_training(student), sample_weight=weight)
    with torch.no_grad(), pytest.raises(error, match="InfoSAMLoss: sample_weight " + message):
        infosam.terms(teacher, student, sample_weight=weight)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_weights_of_zero_leave_nothing(n_samples):
    teacher, student = (sam_features(n_samples, seed=seed) for seed in (0, 10))
    weight, settings = torch.zeros(n_samples), {"distillation": "jensen_renyi", "lambda_r": 0.0}
    trained = in_training(student)
    loss = infosam_terms(relation_module(), teacher, trained, sample_weight=weight, **settings).loss
    loss.backward()
    assert loss.item() == trained.mask_tokens.grad.abs().max() == trained.image_features.grad.abs().max() == 0
    message = (
        r"infosam_terms: sample_weight must be above 0 for some sample under check_finite, got \[0\.0.*; leave the"
    )
    with pytest.raises(ValueError, match=message):
        infosam_terms(
            relation_module(), teacher, in_training(student), sample_weight=weight, check_finite=True, **settings
        )


@pytest.mark.parametrize("form", ["mutual_information", "cauchy_schwarz", "debiased"])
def test_forms_that_compare_samples_have_no_weights(form):
    teacher, student = pair(dtype=torch.float32)
    message = rf"{{}}: sample_weight must go with distillation='jensen_renyi', got it with '{form}', which compares"
    with pytest.raises(ValueError, match=message.format("infosam_terms")):
        infosam_terms(
            relation_module(), teacher, in_training(student), distillation=form, sample_weight=torch.tensor(WEIGHTS)
        )
    with pytest.raises(ValueError, match=message.format("InfoSAMLoss")):
        InfoSAMLoss(DIM, distillation=form)(teacher, in_training(student), sample_weight=torch.tensor(WEIGHTS))
