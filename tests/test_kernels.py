"""The operations' references against plain PyTorch: blocks, layouts, dtypes, images, memory and derivatives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from renyi_kd.objective import Objective
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.batch_gram import reference as batch_gram_reference
from renyi_kd.ops.gram_terms import gram_terms
from renyi_kd.ops.prompts import gram_of_samples, image_index_on, prompts_of_each
from renyi_kd.ops.relation_scores import reference as relation_scores_reference
from renyi_kd.ops.relation_scores import relation_scores
from tests.support import randn
from tests.support.kernels import (
    LAYOUTS,
    check_gram,
    check_scores,
    check_scores_as_if_rounded_once_more,
    expanded,
    inputs,
    textbook_gram,
    textbook_scores,
    value_and_gradients,
)
from tests.support.memory import LargestNewTensor
from tests.support.tolerance import assert_close_on_scale

ELEMENTS = relation_scores_reference.BLOCK_ELEMENTS
# A pixel of one channel has no direction and one of two is a sign, so sizes begin at three channels.
SHAPES = [
    (1, 3, 1, 1),
    (2, 31, 3, 5),
    (2, 32, 5, 3),
    (2, 33, 1, 7),
    (1, 101, 4, 4),
    # Eight channels of that many pixels are a block, and so are that many pixels of 64 channels.
    *[(1, channels, ELEMENTS // 8 // 64, 64) for channels in (7, 8, 9, 17)],
    *[(1, 64, 1, ELEMENTS // 64 + delta) for delta in (-1, 0, 1)],
    (2, 64, 3, ELEMENTS // 64),
]
SMALL_SHAPES = [(3, 11, 7, 5), (3, 12, 9, 4), (3, 13, 1, 17), (3, 7, 17, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
IMAGES = {"none": None, "sorted": [0, 0, 1, 1, 1, 2], "unsorted": [2, 0, 2, 1, 0], "gaps": [2, 2, 2], "one": [1]}


# Of a small map several blocks: some channels of all pixels, all channels of some pixels, or some images; or one.
BLOCKS = st.sampled_from([500, 250, 100, ELEMENTS])
ROW_BLOCKS = st.sampled_from([48, batch_gram_reference.BLOCK_ELEMENTS])
CHANNEL_FIRST_OR_LAST = st.sampled_from(["channel-first", "channels-last"])


@contextmanager
def blocks_of(elements: int, of_rows: int = 48) -> Iterator[None]:
    with (
        mock.patch.object(relation_scores_reference, "BLOCK_ELEMENTS", elements),
        mock.patch.object(batch_gram_reference, "BLOCK_ELEMENTS", of_rows),
    ):
        yield


# relation_scores: sizes, dtypes, layouts, images.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["channel-first", "channels-last"])
def test_scores_around_the_edges_of_blocks(shape, layout):
    x, directions = inputs(shape)
    # A budget of two would ask for the textbook's order of summation over tens of thousands of pixels.
    check_scores(LAYOUTS[layout](x), directions, slack=4.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(shape=st.sampled_from(SMALL_SHAPES), blocks=BLOCKS)
def test_scores_in_every_layout(layout, shape, blocks):
    x, directions = inputs(shape)
    with blocks_of(blocks):
        check_scores(LAYOUTS[layout](x), directions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(layout=st.sampled_from(["channel-first", "channels-last", "gaps"]), blocks=BLOCKS)
def test_scores_in_every_dtype(dtype, layout, blocks):
    x, directions = inputs((3, 37, 6, 5), dtype)
    with blocks_of(blocks):
        check_scores(LAYOUTS[layout](x), directions)


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@given(layout=CHANNEL_FIRST_OR_LAST, blocks=BLOCKS)
def test_scores_of_several_samples_per_image(images, layout, blocks):
    x, directions = inputs((3, 11, 6, 5), n_samples=None if images is None else len(images))
    with blocks_of(blocks):
        _, grad_features, _ = check_scores(LAYOUTS[layout](x), directions, images)
    for image in set(range(3)) - set(images or range(3)):
        assert torch.equal(grad_features[image], torch.zeros_like(grad_features[image]))


@given(n_tokens=st.sampled_from([1, 4]), blocks=BLOCKS)
def test_scores_of_several_tokens(n_tokens, blocks):
    x, directions = inputs((2, 11, 6, 5), n_tokens=n_tokens)
    with blocks_of(blocks):
        scores, *_ = check_scores(x, directions)
    assert scores.shape == (2, n_tokens, 30)


def test_scores_in_the_order_of_pixels():
    x, directions = inputs((1, 5, 2, 3))
    scores = relation_scores(x, directions)
    for row in range(2):
        for column in range(3):
            one = textbook_scores(x[:, :, row : row + 1, column : column + 1], directions)
            torch.testing.assert_close(scores[..., 3 * row + column], one[..., 0])


@given(eps=st.sampled_from([1e-6, 0.5]), blocks=BLOCKS)
def test_eps_is_added_to_the_variance(eps, blocks):
    with blocks_of(blocks):
        check_scores(*inputs((2, 11, 6, 5)), eps=eps)


def test_only_the_part_of_a_direction_beside_its_mean_counts():
    x, directions = inputs((2, 11, 6, 5), torch.float64)
    shifted = relation_scores(x, directions + 1000)
    assert_close_on_scale(shifted, relation_scores(x, directions), name="scores", rtol=1e-11)
    *_, grad_directions = value_and_gradients(relation_scores, x, directions)
    assert grad_directions.sum(-1).abs().max() < 1e-12 * grad_directions.abs().max()


# relation_scores: hard numbers.


@given(layout=CHANNEL_FIRST_OR_LAST, mean=st.sampled_from([1000.0, -1000.0]), blocks=BLOCKS)
def test_scores_of_features_with_a_large_mean(layout, mean, blocks):
    x, directions = inputs((2, 67, 6, 5))
    with blocks_of(blocks):
        check_scores_as_if_rounded_once_more(LAYOUTS[layout](randn(*x.shape) + mean), directions)


@given(layout=CHANNEL_FIRST_OR_LAST, blocks=BLOCKS)
def test_scores_of_features_with_a_large_mean_in_each_image(layout, blocks):
    x, directions = inputs((3, 67, 6, 5))
    x = x + torch.tensor([0.0, 300.0, -900.0])[:, None, None, None] + 100 * randn(3, 1, 6, 5, seed=5)
    with blocks_of(blocks):
        check_scores_as_if_rounded_once_more(LAYOUTS[layout](x), directions)


@given(first=st.sampled_from([0.0, 30.0]), blocks=BLOCKS)
def test_scores_where_the_first_channels_are_unlike_the_others(first, blocks):
    x, directions = inputs((2, 128, 6, 5))
    x = torch.cat([x[:, :32] + first, x[:, 32:] - 5], dim=1)
    with blocks_of(blocks):
        check_scores(x, directions)


@given(scale=st.sampled_from([1e-6, 1e6]), blocks=BLOCKS)
def test_scores_of_small_and_large_features(scale, blocks):
    x, directions = inputs((2, 11, 6, 5))
    with blocks_of(blocks):
        check_scores(scale * x, directions)


def test_scores_of_large_half_precision_features():
    x, directions = inputs((2, 64, 6, 5), torch.float16)
    x = x * 8000
    assert x.abs().max() > 30000
    check_scores(x, directions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(constant=st.sampled_from([0.0, 0.1, 1.0, -3.3, 12345.6]), layout=CHANNEL_FIRST_OR_LAST, blocks=BLOCKS)
def test_a_pixel_with_all_channels_alike_has_score_and_gradient_zero(dtype, constant, layout, blocks):
    x, directions = inputs((2, 37, 6, 5), dtype)
    x[0, :, 2, 3] = constant
    x[1, :, :, 4] = constant
    dead = torch.zeros(2, 6, 5, dtype=torch.bool)
    dead[0, 2, 3] = dead[1, :, 4] = True
    x = LAYOUTS[layout](x)
    with blocks_of(blocks):
        scores, grad_features, grad_directions = value_and_gradients(relation_scores, x, directions)
    maps, gradients = rearrange(scores, "s n (h w) -> s h w n", h=6), grad_features.permute(0, 2, 3, 1)
    assert torch.equal(maps[dead], torch.zeros_like(maps[dead]))
    assert torch.equal(gradients[dead], torch.zeros_like(gradients[dead]))
    expected = value_and_gradients(textbook_scores, x.double(), directions.double())
    alive = expected[1].permute(0, 2, 3, 1)[~dead]
    eps = 8 * max(torch.finfo(dtype).eps, 1e-6)
    assert_close_on_scale(gradients[~dead], alive, name="grad_features", rtol=eps)
    assert_close_on_scale(scores, expected[0], name="scores", rtol=1e-5)
    assert_close_on_scale(grad_directions, expected[2], name="grad_directions", rtol=1e-5)


def test_a_pixel_whose_channels_are_nearly_alike_is_alive():
    x, directions = inputs((2, 37, 6, 5))
    x = 100 * (1 + 1e-4 * randn(*x.shape))
    expected = value_and_gradients(textbook_scores, x.double(), directions.double())
    for name, a, e in zip(
        ("scores", "x", "w"), value_and_gradients(relation_scores, x, directions), expected, strict=True
    ):
        assert_close_on_scale(a, e, name=name, rtol=1e-2)


def test_a_single_channel_has_no_direction():
    value, *gradients = value_and_gradients(relation_scores, randn(2, 1, 3, 3), randn(2, 1, 1, seed=1))
    for tensor in (value, *gradients):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_two_channels_are_a_sign():
    x, directions = inputs((2, 2, 6, 5), torch.float64)
    difference = (x[:, 0] - x[:, 1]).sign().flatten(1)[:, None]
    expected = difference * (directions[..., :1] - directions[..., 1:])
    assert_close_on_scale(relation_scores(x, directions, eps=0.0), expected, name="scores", rtol=1e-10)


@given(bad=st.sampled_from([math.nan, math.inf]), blocks=BLOCKS)
def test_nan_and_inf_stay_in_their_pixel_and_are_never_a_number(bad, blocks):
    x, directions = inputs((2, 11, 6, 5))
    with blocks_of(blocks):
        clean = relation_scores(x, directions)
        x[1, 7, 2, 3] = bad
        scores = relation_scores(x, directions)
    pixel = 2 * 5 + 3
    assert scores[1, :, pixel].isnan().all()
    scores[1, :, pixel] = clean[1, :, pixel]
    torch.testing.assert_close(scores, clean)


# batch_gram.


def test_images_of_samples_are_copied_to_a_device_once():
    device, images = torch.device("cpu"), (0, 0, 1)
    index = image_index_on(device, images)
    assert index.tolist() == [0, 0, 1]
    assert image_index_on(device, images) is index
    # Who follows operations has a tensor of their own.
    with FakeTensorMode():
        assert image_index_on(device, images) is not index


ROWS = [(1, 1), (2, 5), (4, 3, 7), (3, 11, 6, 5), (5, 2, 3, 4, 2), (12, 9), (13, 3, 7), (25, 2, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=st.sampled_from(ROWS), blocks=ROW_BLOCKS)
def test_gram_in_every_dtype(dtype, shape, blocks):
    with blocks_of(ELEMENTS, blocks):
        check_gram(0.3 + randn(*shape, dtype=dtype))


def test_rows_are_copied_in_blocks_and_never_all_at_once():
    n_slices = 3 * batch_gram_reference.BLOCK_ELEMENTS // 64
    rows = torch.empty(2, n_slices, 2, 16)
    for x, n_blocks in ((rows, 1), (rows.to(torch.bfloat16), 3), (rows.mT, 3)):
        blocks = batch_gram_reference._blocks(x, torch.float32)
        assert len(blocks) == n_blocks
        assert sum(len(range(n_slices)[part]) for part in blocks) == n_slices


@pytest.mark.parametrize(
    ("images", "n_images", "expected"),
    [
        ([0, 1, 2], 3, 1),
        ([0, 0, 1, 1], 2, 2),
        ([0, 1, 0, 1], 2, None),
        ([0, 0, 1], 2, None),
        ([0, 0, 1, 1], 3, None),
        ([1, 0], 2, None),
    ],
)
def test_samples_of_an_image_that_follow_each_other_need_no_index(images, n_images, expected):
    assert prompts_of_each(images, n_images) == expected
    rows = randn(n_images, 5).double()
    index = torch.tensor(images)
    assert torch.equal(gram_of_samples(rows @ rows.mT, images), (rows @ rows.mT)[index][:, index])


@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_gram_around_the_edges_of_blocks(delta):
    edge = batch_gram_reference.BLOCK_ELEMENTS // 4
    check_gram(randn(4, edge + delta))
    check_gram(randn(4, 2 * edge + delta))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(shape=st.sampled_from(SMALL_SHAPES), blocks=ROW_BLOCKS)
def test_gram_in_every_layout(layout, shape, blocks):
    rows = LAYOUTS[layout](randn(*shape))
    with blocks_of(ELEMENTS, blocks):
        check_gram(rows)
        expected = batch_gram(randn(*shape) if layout != "expanded" else expanded(randn(*shape)).contiguous())
        torch.testing.assert_close(batch_gram(rows), expected, rtol=1e-5, atol=1e-4)


def test_gram_of_large_half_precision_rows():
    # A power of two: in whatever order, fp32 sums a hundred of its squares without rounding.
    rows = 32768 * randn(3, 100, dtype=torch.float16).sign()
    assert torch.equal(batch_gram(rows), rows.double() @ rows.double().mT)


def test_sums_of_slices_are_kept_in_fp64():
    """Two thousand slices lose no more than one."""
    rows = 1 + 0.01 * randn(2, 2000, 20)
    assert_close_on_scale(
        batch_gram(rows), rows.flatten(1).double() @ rows.flatten(1).double().mT, name="gram", rtol=1e-8
    )


def test_gram_propagates_nan():
    rows = randn(3, 7)
    rows[1, 2] = math.nan
    assert torch.equal(batch_gram(rows).isnan(), torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool())


# gram_terms with the Cauchy-Schwarz divergence; tests/test_loss.py has both forms on features.

ROOT = 2**-0.5
ALIKE, APART = [[1, 0, 0]] * 3, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
# Cosines 3/5 and 4/5 of the second map with the others, or the other way round.
CHAIN, TURNED = [[1, 0], [0.6, 0.8], [0, 1]], [[1, 0], [0.8, 0.6], [0, 1]]
OPPOSITE, STAR = [[1, 0], [-1, 0]], [[1, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]]
# The divergence of orthogonal Grams of s samples, less log2 of the product of their squared norms.
CEILING = {s: 40 - 2 * math.log2(s) + 2 / math.log(2) for s in (2, 3)}
PAIRS = {
    "equal": (CHAIN, CHAIN, 0.0),
    "equal but for scale and reflection": (CHAIN, [[0, 2], [2.4, 1.8], [9, 0]], 0.0),
    "turned": (CHAIN, TURNED, math.log2(5 * 5 / 4.92**2)),
    "two, orthogonal student": ([[1, 0], [1, 1]], [[1, 0], [0, 1]], math.log2(3 * 2 / 2**2)),
    "two, opposite sign": ([[1, 0], [ROOT, ROOT]], [[1, 0], [-ROOT, ROOT]], math.log2(3 * 3 / 1**2)),
    "three alike, three orthogonal": (ALIKE, APART, math.log2(9 * 3 / 3**2)),
    "three orthogonal, three alike": (APART, ALIKE, math.log2(9 * 3 / 3**2)),
    "one zero map": (CHAIN, [[1, 0], [0.6, 0.8], [0, 0]], math.log2(5 * 3.72 / 3.72**2)),
    "the same zero map": ([[1, 0], [0.6, 0.8], [0, 0]], [[1, 0], [0.6, 0.8], [0, 0]], 0.0),
    "zero maps": (CHAIN, [[0, 0]] * 3, math.log2(5 * 3 / 3**2)),
    "orthogonal Grams of two": ([[1, 0], [1, 0]], OPPOSITE, math.log2(4 * 4) + CEILING[2]),
    "orthogonal Grams of three": (ALIKE, STAR, math.log2(9 * 4.5) + CEILING[3]),
}
IDENTITY = {s: torch.eye(s, dtype=torch.float64) for s in range(2, 7)}


def divergence(teacher: Tensor, student: Tensor, **keywords) -> Tensor:
    grams = [IDENTITY[len(teacher)]] * 2
    objective = Objective(distillation="cauchy_schwarz", **keywords)
    return gram_terms(*grams, teacher, student, objective).distillation


@pytest.mark.parametrize(("teacher", "student", "bits"), PAIRS.values(), ids=PAIRS)
def test_divergence_of_explicit_maps_is_the_same_at_every_order(teacher, student, bits):
    teacher, student = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (teacher, student))
    for alpha in (0.5, 1.0, 2.0, math.inf):
        value = divergence(teacher, student, alpha=alpha)
        assert value.item() == pytest.approx(bits, rel=1e-10, abs=1e-12), alpha
        for gradient in torch.autograd.grad(value, (teacher, student)):
            assert gradient.isfinite().all(), alpha


def test_loss_weighs_the_divergence():
    maps = [torch.tensor(x, dtype=torch.float64) for x in (CHAIN, TURNED)]
    grams = [torch.eye(3, dtype=torch.float64)] * 2
    objective = Objective(lambda_r=0.7, lambda_d=-3.0)
    paper = gram_terms(*grams, *maps, objective)
    terms = gram_terms(*grams, *maps, objective._replace(distillation="cauchy_schwarz"))
    assert torch.equal(terms.compression, paper.compression)
    assert terms.compression.item() == pytest.approx(math.log2(3 / 5))
    assert terms.loss.item() == pytest.approx(0.7 * math.log2(3 / 5) - 3 * math.log2(25 / 4.92**2))


@given(
    seed=st.integers(0, 10_000),
    n_samples=st.integers(2, 6),
    n_scores=st.integers(1, 4),
    like=st.sampled_from([0.0, 0.5, 1.0]),
    zeros=st.integers(0, 2),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_laws_of_the_divergence(seed, n_samples, n_scores, like, zeros, scale):
    teacher = randn(n_samples, n_scores, seed=seed, dtype=torch.float64)
    student = like * teacher + (1 - like) * randn(n_samples, n_scores, seed=seed + 20_000, dtype=torch.float64)
    student[:zeros] = 0
    terms = gram_terms(*[IDENTITY[n_samples]] * 2, teacher, student, Objective(distillation="cauchy_schwarz"))
    value = terms.distillation
    grams = terms.teacher_gram, terms.student_gram
    assert -1e-12 <= value < 43 + 2 * math.log2(n_samples)
    # Half the squared distance of two unit vectors is 1 less their cosine: zero only where they are equal.
    a, b = (gram / gram.norm() for gram in grams)
    cosine = 1 - (a - b).square().sum().item() / 2
    if value < 40:
        assert (-value / 2).exp2().item() == pytest.approx(cosine, abs=1e-9)
    else:
        assert cosine <= 2**-20 + 1e-12
    if like == 1 and zeros == 0:
        assert value.item() == pytest.approx(0, abs=1e-12)
    close = {"rel": 1e-6, "abs": 1e-9}
    assert divergence(student, teacher).item() == pytest.approx(value.item(), **close)
    scales = scale * (1 + randn(n_samples, 1, seed=seed, dtype=torch.float64).abs())
    assert divergence(teacher, scales * student).item() == pytest.approx(value.item(), **close)
    assert divergence(scales * teacher, student).item() == pytest.approx(value.item(), **close)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed))
    assert divergence(teacher[order], student[order]).item() == pytest.approx(value.item(), **close)
    rotation = torch.linalg.qr(randn(n_scores, n_scores, seed=seed + 1, dtype=torch.float64)).Q
    assert divergence(teacher, student @ rotation).item() == pytest.approx(value.item(), **close)


def test_divergence_tells_signs_apart():
    maps = randn(4, 5, dtype=torch.float64)
    flipped = maps * torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None]
    assert divergence(maps, maps).item() == pytest.approx(0, abs=1e-12)
    assert divergence(maps, flipped) > 0.1
    assert divergence(flipped, flipped).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("detach", [False, True])
def test_divergence_has_no_gradient_where_the_grams_are_equal(detach):
    teacher = randn(4, 5, dtype=torch.float64).requires_grad_()
    student = (3 * teacher.detach()).requires_grad_()
    value = divergence(teacher, student, detach_teacher_relation=detach)
    of_teacher, of_student = torch.autograd.grad(value, (teacher, student), materialize_grads=True)
    assert of_teacher.abs().max() < 1e-14
    assert of_student.abs().max() < 1e-14


@pytest.mark.parametrize("n_samples", [2, 4])
def test_gradient_of_the_divergence_is_the_derivative(n_samples):
    maps = [randn(n_samples, 5, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(divergence, maps)


def test_detached_teacher_gets_no_gradient_of_the_divergence():
    maps = [randn(4, 5, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    attached = divergence(*maps)
    detached = divergence(*maps, detach_teacher_relation=True)
    assert torch.equal(detached, attached)
    (expected,) = torch.autograd.grad(attached, maps[1])
    of_teacher, of_student = torch.autograd.grad(detached, maps, materialize_grads=True)
    assert torch.equal(of_student, expected)
    assert of_teacher.abs().max() == 0
    assert torch.autograd.gradcheck(lambda x: divergence(maps[0].detach(), x, detach_teacher_relation=True), maps[1])


def nearly_opposite(angle: float) -> Tensor:
    return torch.tensor([[1, 0], [-math.cos(angle), math.sin(angle)]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("angle", "on_tangent"), [(0.01, False), (1.4e-3, False), (1.37e-3, True), (1e-4, True)])
def test_divergence_goes_on_along_its_tangent(angle, on_tangent):
    """The product of the Grams is the square of the angle by which the maps are not opposite, and may be 2^-19."""
    alike, student = torch.tensor([[1.0, 0]] * 2, dtype=torch.float64), nearly_opposite(angle)
    product = 2 - 2 * math.cos(angle)
    assert (product < 2**-19) == on_tangent
    beyond = 2 / math.log(2) * (1 - product * 2**19) if on_tangent else 0.0
    norms = math.log2(4 * (2 + 2 * math.cos(angle) ** 2))
    value = divergence(alike, student)
    assert value.item() == pytest.approx(norms - 2 * math.log2(max(product, 2**-19)) + beyond, rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: divergence(alike, x), student, atol=1e-3)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().max() > 1


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_of_what_is_not_finite_is_nan(bad, who):
    maps = [randn(4, 5, seed=1), randn(4, 5, seed=2)]
    maps[who][2, 3] = bad
    assert divergence(*maps).isnan()


# Both: derivatives, layout of gradients, repeatability, autocast.

OPERATIONS = {
    "relation_scores": lambda x, directions: value_and_gradients(relation_scores, x, directions),
    "relation_scores, images": lambda x, directions: value_and_gradients(
        relation_scores, x, directions, image_index=[2, 0, 2]
    ),
    "batch_gram": lambda x, _directions: value_and_gradients(batch_gram, x),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("layout", ["channel-first", "channels-last", "h b w d"])
def test_gradient_of_scores_is_the_derivative(images, layout):
    x, directions = inputs((3, 6, 3, 5), torch.float64, n_samples=None if images is None else len(images))
    x, directions = LAYOUTS[layout](x).requires_grad_(), directions.requires_grad_()
    with blocks_of(500):
        assert torch.autograd.gradcheck(lambda a, b: relation_scores(a, b, images), (x, directions))


@given(blocks=ROW_BLOCKS)
def test_gradient_of_the_gram_is_the_derivative(blocks):
    rows = LAYOUTS["h b w d"](randn(3, 4, 3, 5, dtype=torch.float64)).requires_grad_()
    with blocks_of(ELEMENTS, blocks):
        assert torch.autograd.gradcheck(batch_gram, (rows,))


def test_gradients_are_made_only_where_they_are_needed():
    x, directions = inputs((3, 6, 3, 5))
    both = value_and_gradients(relation_scores, x, directions)
    upstream = randn(*both[0].shape, seed=99)
    leaf = x.clone().requires_grad_()
    (of_features,) = torch.autograd.grad(relation_scores(leaf, directions), leaf, upstream)
    leaf = directions.clone().requires_grad_()
    (of_directions,) = torch.autograd.grad(relation_scores(x, leaf), leaf, upstream)
    assert torch.equal(of_features, both[1])
    assert torch.equal(of_directions, both[2])


@each_operation
@given(layout=CHANNEL_FIRST_OR_LAST, dtype=st.sampled_from([torch.float32, torch.float16]), blocks=BLOCKS)
def test_gradient_has_the_layout_of_the_features(operation, layout, dtype, blocks):
    x, directions = inputs((3, 6, 4, 5), dtype)
    x = LAYOUTS[layout](x)
    with blocks_of(blocks):
        _, gradient, *_ = operation(x, directions)
    assert gradient.stride() == x.stride()
    assert gradient.dtype == dtype


@each_operation
@given(blocks=BLOCKS)
def test_layouts_agree(operation, blocks):
    x, directions = inputs((3, 6, 4, 5))
    with blocks_of(blocks):
        first, *others = [operation(LAYOUTS[layout](x), directions) for layout in LAYOUTS if layout != "expanded"]
    for other in others:
        for a, b in zip(other, first, strict=True):
            assert_close_on_scale(a, b, name="layout", rtol=1e-5)


@each_operation
def test_repeated_calls_are_bitwise_equal(operation):
    x, directions = inputs((3, 65, 40, 40))
    for a, b in zip(operation(x, directions), operation(x, directions), strict=True):
        assert torch.equal(a, b)


@each_operation
@given(dtype=st.sampled_from([torch.float32, torch.float16]), blocks=BLOCKS)
def test_no_element_of_new_memory_is_left_unwritten(operation, dtype, blocks):
    """In deterministic mode PyTorch fills what ``empty`` returns with NaN."""
    x, directions = inputs((3, 11, 6, 5), dtype)
    with blocks_of(blocks):
        expected = operation(x, directions)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            actual = operation(x, directions)
        finally:
            torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@each_operation
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_bit(operation, low, dtype):
    x, directions = inputs((3, 40, 6, 5), dtype)
    expected = operation(x, directions)
    with torch.autocast("cpu", low):
        assert (x.float() @ x.float().mT).dtype == low
        actual = operation(x, directions)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_no_gradient_and_inference_mode():
    x, directions = inputs((3, 6, 4, 5))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(relation_scores(x, directions), textbook_scores(x, directions))
            torch.testing.assert_close(batch_gram(x).float(), textbook_gram(x))


@each_operation
@given(blocks=BLOCKS)
def test_inputs_are_left_alone(operation, blocks):
    x, directions = inputs((3, 6, 4, 5))
    before = x.clone(), directions.clone()
    with blocks_of(blocks):
        operation(x, directions)
    assert torch.equal(x, before[0])
    assert torch.equal(directions, before[1])


@pytest.mark.parametrize(
    "function", [relation_scores, lambda x, _: batch_gram(x)], ids=["relation_scores", "batch_gram"]
)
def test_second_derivative_is_refused(function):
    x, directions = inputs((3, 6, 4, 5))
    x.requires_grad_()
    value = function(x, directions)
    with pytest.raises(NotImplementedError, match=r"backward must run without create_graph=True, got a request"):
        torch.autograd.grad(value.sum(), x, create_graph=True)
    # A constant upstream gradient needs no graph of its own: the one where a gradient penalty would vanish.
    with pytest.raises(NotImplementedError, match=r"second derivative; (use gram_matrix|differentiate a textbook)"):
        torch.autograd.grad(function(x, directions), x, torch.ones_like(value), create_graph=True)


# Memory.


LAYOUTS_OF_MAPS = ["channel-first", "channels-last", "gaps", "channels-last, gaps", "h b w d", "columns first"]


def largest_new_tensors(function, x: Tensor, *others: Tensor) -> tuple[int, int]:
    """Return the bytes of the largest new tensor in the forward and in the backward pass."""
    x = x.detach().requires_grad_()
    with LargestNewTensor() as forward:
        value = function(x, *others)
    upstream = torch.ones_like(value)
    with LargestNewTensor() as backward:
        torch.autograd.grad(value, x, upstream)
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS_OF_MAPS)
def test_scores_make_nothing_of_the_size_of_the_map(dtype, layout):
    x, directions = inputs((2, 192, 96, 128), dtype, n_tokens=1)
    x = LAYOUTS[layout](x)
    size, block = x.numel() * x.element_size(), 4 * ELEMENTS
    assert 4 * x.numel() > 2 * block, "too small to show anything"
    forward, backward = largest_new_tensors(relation_scores, x, directions)
    assert forward <= block
    assert backward <= max(size, block)
    textbook, _ = largest_new_tensors(textbook_scores, x, directions)
    assert textbook >= 4 * x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS_OF_MAPS)
def test_gram_makes_nothing_of_the_size_of_the_rows(dtype, layout):
    block = batch_gram_reference.BLOCK_ELEMENTS
    x = LAYOUTS[layout](randn(4, 32, 64, 1 + 2 * block // (4 * 32 * 64), dtype=dtype))
    assert x.numel() > 2 * block
    forward, backward = largest_new_tensors(batch_gram, x)
    assert forward <= 4 * block
    assert backward <= max(x.numel() * x.element_size(), 4 * block)
