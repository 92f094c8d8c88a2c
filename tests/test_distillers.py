"""The distillers of the benchmark: each against its formula in NumPy, and what all have in common."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.segmentation.distillers import DISTILLERS, Distiller, make
from benchmarks.segmentation.observation import Observation
from renyi_kd import SAMFeatures, infosam_terms

DIM, CHANNELS, SIZE = 4, (3, 5), 8
INFOSAM = [name for name in DISTILLERS if name.startswith("infosam")]
PAIRS = [name for name in INFOSAM if "jensen_renyi" in name]
WITH_RELATION = ["mobilesam_relation", "tinysam_relation"]
MAP, TOKENS, LOGITS, LAYERS = "image_features", "mask_tokens", "logits", "layers"
# What of the student gets a gradient.
TRAINED = {
    "none": set(),
    "logit": {LOGITS},
    "pkd": {MAP},
    "pkt": {MAP},
    "ibd": {LOGITS, LAYERS},
    "vid": {MAP},
    "semckd": {LAYERS},
    "reviewkd": {LAYERS},
    "tinysam": {MAP, TOKENS, LOGITS},
    "mobilesam": {MAP},
    **{name: {MAP, TOKENS} for name in INFOSAM},
    "infosam_no_ld": set(),
    "mobilesam_relation": {MAP, TOKENS},
    "tinysam_relation": {MAP, TOKENS, LOGITS},
}
each = pytest.mark.parametrize("name", DISTILLERS)


def made(name: str, channels: tuple[int, ...] = CHANNELS) -> Distiller:
    return make(name, dim=DIM, layer_channels=channels)


def observed(b: int = 3, p: int = 2, *, channels: tuple[int, ...] = CHANNELS, scale: float = 1.0) -> Observation:
    index = torch.arange(b).repeat_interleave(p)
    features = SAMFeatures(scale * torch.randn(b, DIM, 3, 3), scale * torch.randn(b * p, 2, DIM), index)
    layers = [torch.randn(b, c, 8 // (i + 1), 8 // (i + 1)) for i, c in enumerate(channels)]
    return Observation(features, 4 * torch.randn(b, p, SIZE, SIZE), tuple(scale * layer for layer in layers))


def batch_of(b: int = 3, p: int = 2) -> dict[str, Tensor]:
    inside = torch.ones(b, 1, SIZE, SIZE)
    inside[0, :, 5:] = 0
    inside[1:2, :, :, 3:] = 0
    return {"masks": (torch.rand(b, p, SIZE, SIZE) > 0.5).float() * inside, "inside": inside}


def mapped(observation: Observation, function) -> Observation:
    (images, tokens, index), logits, layers = observation[:3]
    features = SAMFeatures(function(images), function(tokens), index)
    return Observation(features, function(logits), tuple(map(function, layers)))


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def leaves(observation: Observation) -> dict[str, tuple[Tensor, ...]]:
    features, logits, layers = observation[:3]
    return {MAP: (features.image_features,), TOKENS: (features.mask_tokens,), LOGITS: (logits,), LAYERS: layers}


def with_map(observation: Observation, images: Tensor) -> Observation:
    return observation._replace(features=observation.features._replace(image_features=images))


def array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()


def maps(observation: Observation) -> np.ndarray:
    return array(observation.features.image_features)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def linear(module: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ array(module.weight).T + array(module.bias)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def batch_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)


def convolved(module: torch.nn.Conv2d, x: np.ndarray) -> np.ndarray:
    kernel = array(module.weight)
    reach = kernel.shape[-1] // 2
    height, width = x.shape[-2:]
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    result = np.zeros((len(x), len(kernel), height, width))
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            shifted = padded[:, :, i : i + height, j : j + width]
            result += np.einsum("bchw,oc->bohw", shifted, kernel[:, :, i, j])
    return result if module.bias is None else result + array(module.bias)[:, None, None]


def pooled(x: np.ndarray, size: int) -> np.ndarray:
    side = x.shape[-1] / size
    cells = [(math.floor(i * side), math.ceil((i + 1) * side)) for i in range(size)]
    return np.stack([np.stack([x[..., a:b, c:d].mean((-2, -1)) for c, d in cells], -1) for a, b in cells], -2)


def soft_label_kl(teacher: Tensor, student: Tensor, inside: Tensor, temperature: float) -> float:
    values = []
    for image in range(len(teacher)):
        seen = inside[image, 0].bool()
        for t, s in zip(array(teacher[image, :, seen]).ravel(), array(student[image, :, seen]).ravel(), strict=True):
            p, q = sigmoid(t / temperature), sigmoid(s / temperature)
            values.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return float(np.mean(values))


def entropy(gram: np.ndarray, alpha: float) -> float:
    eigenvalues = np.linalg.eigvalsh(gram / np.trace(gram))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    if alpha == 1:
        return float(-(eigenvalues * np.log2(eigenvalues)).sum())
    return float(np.log2((eigenvalues**alpha).sum()) / (1 - alpha))


def gram_of(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def relation_maps(distiller: Distiller, observation: Observation) -> np.ndarray:
    images, tokens, index = observation.features
    with torch.no_grad():
        return array(distiller.infosam.relation(images, tokens[:, :1], index).flatten(1))


def compression_of(distiller: Distiller, teacher: Observation, alpha: float = 2.0) -> float:
    images, tokens, index = teacher.features
    relation = gram_of(relation_maps(distiller, teacher))
    joint = relation * gram_of(array(images[index].flatten(1))) * gram_of(array(tokens[:, 0]))
    return entropy(relation, alpha) - entropy(joint, alpha)


def test_no_distillation_is_zero():
    assert made("none")(observed(), observed(), batch_of()).item() == 0


def test_logit_is_nine_times_the_divergence_of_the_softened_masks():
    # Sigmoids of thirds: 3/4 against 1/2 in the three pixels of two images; the fourth is padding.
    logits = torch.tensor([[3 * math.log(3), 50.0], [3 * math.log(3), 3 * math.log(3)]])[:, None, None]
    inside = torch.tensor([[1.0, 0.0], [1.0, 1.0]])[:, None, None]
    teacher = observed(2, 1)._replace(logits=logits)
    student = observed(2, 1)._replace(logits=torch.zeros(2, 1, 1, 2))
    loss = made("logit")(teacher, student, {"inside": inside})
    assert loss.item() == pytest.approx(9 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-5)
    reverse = made("logit")(student, teacher, {"inside": inside})
    assert reverse.item() == pytest.approx(9 * 0.5 * (math.log(2 / 3) + math.log(2)), rel=1e-5)


def test_logit_counts_pixels_and_not_images():
    teacher, student, batch = observed(), observed(), batch_of()
    expected = 9 * soft_label_kl(teacher.logits, student.logits, batch["inside"], 3)
    assert made("logit")(teacher, student, batch).item() == pytest.approx(expected, rel=1e-5)


def test_logit_of_certain_masks_is_right():
    teacher = observed(1, 1)._replace(logits=torch.full((1, 1, 1, 1), 3e4))
    student = observed(1, 1)._replace(logits=torch.full((1, 1, 1, 1), -3e4))
    assert made("logit")(teacher, student, {"inside": torch.ones(1, 1, 1, 1)}).item() == pytest.approx(9e4)


def test_pkd_is_six_times_one_minus_the_correlation_of_channels():
    teacher, student = observed(), observed()
    t, s = (maps(each).swapaxes(0, 1).reshape(DIM, -1) for each in (teacher, student))
    expected = 6 * np.mean([1 - np.corrcoef(t[c], s[c])[0, 1] for c in range(DIM)])
    assert made("pkd")(teacher, student, batch_of()).item() == pytest.approx(expected, rel=1e-4)


def test_pkt_is_the_mean_over_all_pairs_of_images():
    teacher, student = observed(), observed()
    t, s = (maps(each).mean((2, 3)) for each in (teacher, student))
    total = 0.0
    for i in range(3):
        p, q = ([(x[i] @ x[j] / math.sqrt(x[i] @ x[i] * (x[j] @ x[j])) + 1) / 2 for j in range(3)] for x in (t, s))
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert made("pkt")(teacher, student, batch_of()).item() == pytest.approx(30_000 * total / 9, rel=1e-3)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_pkt_of_opposite_images_is_finite(who):
    images = torch.randn(1, DIM, 3, 3)
    opposite, other = with_map(observed(2), torch.cat([images, -images])), observed(2)
    teacher, student = (opposite, mapped(other, leaf)) if who == "teacher" else (other, mapped(opposite, leaf))
    loss = made("pkt")(teacher, student, batch_of(2))
    loss.backward()
    assert loss.isfinite()
    assert student.features.image_features.grad.isfinite().all()


def test_vid_is_the_likelihood_with_a_variance_per_channel():
    distiller, teacher, student = made("vid"), observed(), observed()
    assert torch.nn.functional.softplus(distiller.alpha).tolist() == pytest.approx([5 - 1e-5] * DIM)
    torch.nn.init.normal_(distiller.alpha)
    first, second, third = (array(distiller.mean[i].weight)[:, :, 0, 0] for i in (0, 2, 4))
    t, s = maps(teacher), maps(student)
    total = 0.0
    for b, y, x in np.ndindex(3, 3, 3):
        mean = third @ np.maximum(second @ np.maximum(first @ s[b, :, y, x], 0), 0)
        for c in range(DIM):
            variance = math.log1p(math.exp(distiller.alpha[c].item())) + 1e-5
            total += ((mean[c] - t[b, c, y, x]) ** 2 / variance + math.log(variance)) / 2
    assert distiller(teacher, student, batch_of()).item() == pytest.approx(total / (27 * DIM), rel=1e-4)


def test_ibd_weighs_the_energy_maps_of_every_pair_of_stages():
    distiller, teacher, student, batch = made("ibd"), observed(), observed(), batch_of()
    positions = array(distiller.teacher_position) @ array(distiller.student_position).T
    features = 0.0
    for b in range(3):
        for t in range(2):
            query = layer_norm(linear(distiller.query[t][0], array(teacher.layers[t][b]).mean((1, 2))))
            scores, distances = [], []
            for s in range(2):
                mean = array(student.layers[s][b]).mean((1, 2))
                key = np.maximum(layer_norm(linear(distiller.key[s][0], mean)), 0)
                keys = layer_norm(linear(distiller.key_of_teacher[0], key))
                scores.append((keys[128 * t : 128 * (t + 1)] @ query + positions[t, s]) / math.sqrt(128))
                energies = [(array(layer[b]) ** 2).mean(0) for layer in (student.layers[s], teacher.layers[t])]
                if s != t:
                    # Of 8 x 8 to 4 x 4, or back.
                    energies[0] = pooled(energies[0], 4) if s == 0 else np.kron(energies[0], np.ones((2, 2)))
                unit = [energy / np.linalg.norm(energy) for energy in energies]
                distances.append(((unit[0] - unit[1]) ** 2).mean())
            features += softmax(np.array(scores)) @ distances / 3
    expected = soft_label_kl(teacher.logits, student.logits, batch["inside"], 1) + 0.8 * features
    # The scale of the KL would hide the other term.
    assert features > 0.01
    assert distiller(teacher, student, batch).item() == pytest.approx(expected, rel=1e-5)


def test_semckd_weighs_the_projected_stages_of_every_pair():
    distiller, teacher, student = made("semckd"), observed(), observed()

    def embedded(modules: torch.nn.ModuleList, layers: tuple[Tensor, ...]) -> list[np.ndarray]:
        vectors = []
        for module, layer in zip(modules, layers, strict=True):
            flat = array(layer.flatten(1))
            rows = np.concatenate([flat @ flat.T, np.zeros((3, 61))], 1)
            vector = linear(module[2], np.maximum(linear(module[0], rows), 0))
            vectors.append(vector / np.linalg.norm(vector, axis=1, keepdims=True))
        return vectors

    queries, keys = embedded(distiller.query, student.layers), embedded(distiller.key, teacher.layers)
    total = 0.0
    for s in range(2):
        attention = softmax(np.stack([(queries[s] * key).sum(1) for key in keys], 1))
        for t in range(2):
            g = distiller.projections[s][t]
            found, target = array(student.layers[s]), array(teacher.layers[t])
            found = pooled(found, 4) if s < t else found
            target = pooled(target, 4) if t < s else target
            for index in (0, 3):
                found = np.maximum(batch_norm(convolved(g[index], found)), 0)
            distance = ((convolved(g[6], found) - target) ** 2).mean((1, 2, 3))
            total += (attention[:, t] * distance).sum()
    expected = 400 * total / (3 * 2)
    assert distiller(teacher, student, batch_of()).item() == pytest.approx(expected, rel=1e-4)


def test_semckd_of_vanishing_embeddings_is_finite():
    distiller, teacher, student = made("semckd", (3,)), observed(channels=(3,)), observed(channels=(3,))
    expected = distiller(teacher, student, batch_of())
    for parameter in distiller.query.parameters():
        torch.nn.init.zeros_(parameter)
    loss = distiller(teacher, mapped(student, leaf), batch_of())
    loss.backward()
    # One stage has all of the attention anyway.
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in distiller.parameters())


def test_semckd_keeps_its_projections_narrow():
    distiller = made("semckd", (200,))
    assert distiller.projections[0][0][3].weight.shape == (256, 256, 3, 3)
    assert made("semckd", (100,)).projections[0][0][3].weight.shape == (200, 200, 3, 3)


def test_reviewkd_fuses_later_stages_and_compares_at_several_sizes():
    distiller, teacher, student = made("reviewkd"), observed(), observed()
    early, late = distiller.fusions
    deep = batch_norm(convolved(late.enter[0], array(student.layers[1])))
    own = batch_norm(convolved(early.enter[0], array(student.layers[0])))
    grown = np.kron(deep, np.ones((2, 2)))
    attention = sigmoid(convolved(early.attention, np.concatenate([own, grown], 1)))
    fused = attention[:, :1] * own + attention[:, 1:] * grown
    expected = 0.0
    cases = ((early, fused, teacher.layers[0], (4, 2, 1)), (late, deep, teacher.layers[1], (2, 1)))
    for fusion, x, layer, sizes in cases:
        found, target = batch_norm(convolved(fusion.leave[0], x)), array(layer)
        weights = [1.0, 0.5, 0.25, 0.125][: len(sizes) + 1]
        errors = [((found - target) ** 2).mean()]
        errors += [((pooled(found, size) - pooled(target, size)) ** 2).mean() for size in sizes]
        expected += np.dot(weights, errors) / sum(weights)
    assert distiller(teacher, student, batch_of()).item() == pytest.approx(expected, rel=1e-4)


def test_tinysam_adds_three_distances_and_weighs_hard_masks():
    # Two masks of three pixels and one of padding: the student is as good as the teacher in the first, IoU 1/2 for
    # both, and worse in the second, 1/3 against 2/3.
    masks = torch.tensor([[[[1.0, 0, 0, 1]], [[1, 1, 1, 0]]]])
    teacher_logits = torch.tensor([[[[2.0, 3, -1, -9]], [[1, 1, -1, 9]]]])
    student_logits = torch.tensor([[[[1.0, 1, -4, 9]], [[-1, 3, -1, -9]]]])
    inside = torch.tensor([[[[1.0, 1, 1, 0]]]])
    images, tokens = torch.zeros(1, DIM, 1, 1), torch.zeros(2, 2, DIM)
    teacher = Observation(SAMFeatures(images, tokens, torch.tensor([0, 0])), teacher_logits)
    student = Observation(SAMFeatures(images + 0.5, tokens - 0.25, torch.tensor([0, 0])), student_logits)
    first, second = (1 + 2 + 3) / 3, (2 + 2 + 0) / 3
    hardness = 1 / (1 + math.exp(-((2 / 3) / (1 / 3 + 1e-6) - 1)))
    expected = 0.5 + 0.25 + (0.5 * first + hardness * second) / 2
    loss = made("tinysam")(teacher, student, {"masks": masks, "inside": inside})
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("found", "hardness"), [(-5.0, 0.5), (5.0, 1.0)])
def test_tinysam_knows_empty_masks(found, hardness):
    observation = observed(1, 1)
    teacher = observation._replace(logits=torch.full((1, 1, SIZE, SIZE), -6.0))
    student = observation._replace(logits=torch.full((1, 1, SIZE, SIZE), found))
    batch = {"masks": torch.zeros(1, 1, SIZE, SIZE), "inside": torch.ones(1, 1, SIZE, SIZE)}
    assert made("tinysam")(teacher, student, batch).item() == pytest.approx(hardness * abs(found + 6), rel=1e-5)


def test_mobilesam_is_the_mean_squared_error():
    teacher, student = observed(), observed()
    expected = np.mean([(t - s) ** 2 for t, s in zip(maps(teacher).flat, maps(student).flat, strict=True)])
    assert made("mobilesam")(teacher, student, batch_of()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "lambda_r", "lambda_d", "alpha"),
    [
        ("infosam", 1, 0.5, 2),
        ("infosam_no_lr", 0, 0.5, 2),
        ("infosam_no_ld", 1, 0, 2),
        ("infosam_alpha_1", 1, 0.5, 1),
        ("infosam_alpha_3", 1, 0.5, 3),
        ("infosam_tenth", 0.1, 0.05, 2),
        ("infosam_detached", 1, 0.5, 2),
        ("infosam_bank", 1, 0.5, 2),
        ("infosam_cauchy_schwarz", 1, 0.5, 2),
    ],
)
def test_infosam_is_the_weighted_sum_of_its_terms(name, lambda_r, lambda_d, alpha):
    distiller, teacher, student = made(name), observed(), observed()
    assert distiller.state() == {}
    loss = distiller(teacher, mapped(student, leaf), batch_of())
    t, s = (gram_of(relation_maps(distiller, each)) for each in (teacher, student))
    distillation = entropy(t * s, alpha) - entropy(t, alpha) - entropy(s, alpha)
    if name == "infosam_cauchy_schwarz":
        distillation = -math.log2((t * s).sum() ** 2 / ((t * t).sum() * (s * s).sum()))
    compression = compression_of(distiller, teacher, alpha)
    assert loss.item() == pytest.approx(lambda_r * compression + lambda_d * distillation, abs=1e-4)
    off_diagonal = ~np.eye(6, dtype=bool)
    assert distiller.state() == pytest.approx(
        {
            "loss": loss.item(),
            "compression": compression,
            "distillation": distillation,
            "mutual_information": entropy(t, alpha) + entropy(s, alpha) - entropy(t * s, alpha),
            "teacher_similarity": (t[off_diagonal] ** 2).mean(),
            "student_similarity": (s[off_diagonal] ** 2).mean(),
            "teacher_entropy": entropy(t, alpha),
            "student_entropy": entropy(s, alpha),
        },
        abs=1e-4,
    )


def test_infosam_detached_differs_in_the_gradient_of_the_module_alone():
    teacher, student, gradients = observed(), observed(), []
    detached, attached = made("infosam_detached"), made("infosam")
    detached.load_state_dict(attached.state_dict())
    for distiller in (attached, detached):
        of_student = mapped(student, leaf)
        distiller(teacher, of_student, batch_of()).backward()
        gradients.append((of_student.features.image_features.grad, distiller.infosam.relation.query_proj.weight.grad))
    (student_gradient, gradient), (same, other) = gradients
    torch.testing.assert_close(student_gradient, same)
    assert not torch.allclose(gradient, other, rtol=1e-2)


def test_infosam_bank_takes_the_samples_of_earlier_steps_along():
    distiller, teachers, students = made("infosam_bank"), *([observed() for _ in range(4)] for _ in range(2))
    for teacher, student in zip(teachers, students, strict=True):
        loss = distiller(teacher, mapped(student, leaf), batch_of())

    def latest(steps: list[Observation]) -> SAMFeatures:
        """Return the first tokens of the last steps together: of six samples a step, twelve are kept."""
        images, tokens, index = zip(*(step.features for step in steps[:0:-1]), strict=True)
        index = torch.cat([3 * number + own for number, own in enumerate(index)])
        return SAMFeatures(torch.cat(images), torch.cat(tokens)[:, :1], index)

    with torch.no_grad():
        expected = infosam_terms(distiller.infosam.relation, latest(teachers), latest(students)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", WITH_RELATION)
def test_the_relation_adds_the_distance_of_its_maps_and_the_compression(name):
    distiller, teacher, student, batch = made(name), observed(), observed(), batch_of()
    assert distiller.state() == {}
    loss = distiller(teacher, mapped(student, leaf), batch).item()
    t, s = relation_maps(distiller, teacher), relation_maps(distiller, student)
    distance = np.mean([((t[i] - s[i]) ** 2).sum() for i in range(6)])
    compression = compression_of(distiller, teacher)
    plain = made(name.removesuffix("_relation"))(teacher, student, batch).item()
    assert loss == pytest.approx(plain + distance + compression, rel=1e-4)
    state = distiller.state()
    assert state["relation_distance"] == pytest.approx(distance, rel=1e-4)
    assert state["compression"] == pytest.approx(compression, abs=1e-4)
    assert state["teacher_similarity"] != state["student_similarity"]
    assert set(state) >= {"teacher_entropy", "student_entropy"}


@pytest.mark.parametrize("name", WITH_RELATION)
def test_the_relation_is_trained_by_the_compression_alone(name):
    distiller, only = made(name), made("infosam_no_ld")
    only.infosam.load_state_dict(distiller.infosam.state_dict())
    teacher, student, batch = observed(), observed(), batch_of()
    for each_distiller in (distiller, only):
        each_distiller(teacher, mapped(student, leaf), batch).backward()
    for mine, other in zip(distiller.infosam.parameters(), only.infosam.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("name", ["logit", "pkd", "pkt", "tinysam", "mobilesam", "ibd"])
def test_a_student_like_the_teacher_has_no_loss_and_another_has(name):
    channels = (3,)
    distiller, batch = made(name, channels), batch_of()
    teacher, other = observed(channels=channels), observed(channels=channels)
    assert distiller(teacher, teacher, batch).item() == pytest.approx(0, abs=1e-6)
    assert distiller(teacher, other, batch).item() > 0.01


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("infosam_cauchy_schwarz", "distillation"),
        ("mobilesam_relation", "relation_distance"),
        ("tinysam_relation", "relation_distance"),
    ],
)
def test_a_student_like_the_teacher_has_its_relations(name, term):
    distiller, teacher = made(name), observed()
    distiller(teacher, mapped(teacher, leaf), batch_of())
    assert distiller.state()[term] == pytest.approx(0, abs=1e-6)
    distiller(teacher, mapped(observed(), leaf), batch_of())
    assert distiller.state()[term] > 0.01


def test_vid_is_least_where_the_mean_is_the_teacher():
    distiller, student = made("vid"), observed()
    with torch.no_grad():
        images = distiller.mean(student.features.image_features)
    at_best = distiller(with_map(student, images), student, batch_of())
    assert at_best.item() == pytest.approx(math.log(5) / 2, rel=1e-5)


def test_every_distiller_is_in_the_table_of_this_file():
    assert set(TRAINED) == set(DISTILLERS)


@each
def test_the_gradient_reaches_the_student_and_the_module_and_not_the_teacher(name):
    distiller = made(name)
    teacher, student = mapped(observed(), leaf), mapped(observed(), leaf)
    loss = distiller(teacher, student, batch_of())
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    if loss.requires_grad:
        (-1.7 * loss).backward()
    assert all(value.grad is None for values in leaves(teacher).values() for value in values)
    for member, values in leaves(student).items():
        for value in values:
            reached = value.grad is not None and bool(value.grad.any())
            assert reached == (member in TRAINED[name]), member
            assert value.grad is None or value.grad.isfinite().all()
    for parameter in distiller.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        # The form of pairs has the relation module as a constant.
        assert parameter.grad.any() == (name not in PAIRS)
    assert distiller.needs_layers == (LAYERS in TRAINED[name])


@each
@given(dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_and_autocast_change_nothing_but_the_inputs(name, dtype):
    distiller, batch = made(name), batch_of()
    teacher, student = mapped(observed(), lambda x: x.to(dtype)), mapped(observed(), lambda x: x.to(dtype))
    exact = distiller(mapped(teacher, Tensor.float), mapped(student, lambda x: leaf(x.float())), batch)
    of_student = mapped(student, leaf)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distiller(teacher, of_student, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-7)


@each
def test_large_half_precision_features_are_no_hazard(name):
    distiller, batch = made(name), batch_of()
    teacher, student = (mapped(observed(scale=3000), lambda x: leaf(x.half())) for _ in range(2))
    loss = distiller(teacher, student, batch)
    assert loss.isfinite()
    if loss.requires_grad:
        (loss / 1e6).backward()
    for values in leaves(student).values():
        assert all(value.grad is None or value.grad.isfinite().all() for value in values)


@each
@given(constant=st.sampled_from([0.0, 1.0]), who=st.sampled_from(["teacher", "student", "both"]))
def test_constant_features_are_no_hazard(name, constant, who):
    distiller, batch = made(name), batch_of()
    teacher, student = observed(), observed()
    if who != "student":
        teacher = mapped(teacher, lambda x: torch.full_like(x, constant))
    if who != "teacher":
        student = mapped(student, lambda x: torch.full_like(x, constant))
    student = mapped(student, leaf)
    loss = distiller(teacher, student, batch)
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()
    gradients = [value.grad for values in leaves(student).values() for value in values]
    gradients += [parameter.grad for parameter in distiller.parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@each
@given(garbage=st.sampled_from([37.0, float("nan")]))
def test_the_padding_has_no_influence(name, garbage):
    distiller, batch = made(name), batch_of()
    teacher, student = observed(), mapped(observed(), leaf)
    outside = ~batch["inside"].bool().expand(3, 2, SIZE, SIZE)
    expected = distiller(teacher, student, batch).item()
    changed = {**batch, "masks": batch["masks"].masked_fill(outside, 1)}
    for owner in ("teacher", "student"):
        of_teacher = teacher._replace(logits=teacher.logits.masked_fill(outside, garbage))
        of_student = student._replace(logits=leaf(student.logits.masked_fill(outside, garbage)))
        pair = (of_teacher, student) if owner == "teacher" else (teacher, of_student)
        loss = distiller(*pair, changed)
        assert loss.item() == pytest.approx(expected, rel=1e-5), owner
        if loss.requires_grad:
            loss.backward()
        assert of_student.logits.grad is None or not of_student.logits.grad[outside].any()


@each
@given(empty=st.sampled_from([slice(1), slice(3)]))
def test_images_of_nothing_but_padding_are_no_hazard(name, empty):
    batch = batch_of()
    batch["inside"][empty] = 0
    assert made(name)(observed(), mapped(observed(), leaf), batch).isfinite()


@pytest.mark.parametrize("name", ["pkt", "semckd"])
def test_similarities_of_one_image_are_refused(name):
    with pytest.raises(ValueError, match=r"the batch must hold at least two images, got 1"):
        made(name)(observed(1), mapped(observed(1), leaf), batch_of(1))


@pytest.mark.parametrize("name", sorted({*INFOSAM, *WITH_RELATION} - {"infosam_bank", *PAIRS}))
def test_relations_of_one_sample_are_refused(name):
    with pytest.raises(ValueError, match="the batch must hold at least two samples"):
        made(name)(observed(1, 1), mapped(observed(1, 1), leaf), batch_of(1, 1))


@pytest.mark.parametrize("name", sorted(set(DISTILLERS) - {"pkt", "semckd", *INFOSAM, *WITH_RELATION}))
def test_the_others_take_one_image(name):
    assert made(name)(observed(1, 1), mapped(observed(1, 1), leaf), batch_of(1, 1)).isfinite()


def test_semckd_refuses_a_batch_beyond_its_rows():
    big = observed(65, 1)
    with pytest.raises(ValueError, match="SemCKD: the batch must hold at most 64 images, got 65"):
        made("semckd")(big, big, batch_of(65, 1))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"make: name must be one of none, logit, pkd, .*, got 'kd'"):
        make("kd", dim=DIM)


@pytest.mark.parametrize("name", ["ibd", "semckd", "reviewkd"])
def test_stages_are_asked_for(name):
    with pytest.raises(ValueError, match="layer_channels must not be empty"):
        make(name, dim=DIM)
    with pytest.raises(ValueError, match=r"student\.layers must have the channels \(3, 5\), got \(\)"):
        made(name)(observed(), observed()._replace(layers=()), batch_of())


@each
def test_a_student_of_other_shapes_is_refused(name):
    teacher, student = observed(), observed()
    with pytest.raises(ValueError, match="logits of teacher and student must have one shape"):
        made(name)(teacher, student._replace(logits=student.logits[..., 1:]), batch_of())
    with pytest.raises(ValueError, match="image_features of teacher and student must have one shape"):
        made(name)(teacher, with_map(student, student.features.image_features[..., 1:]), batch_of())
