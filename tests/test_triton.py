"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from renyi_kd import InfoSAMLoss, Objective, SAMFeatures, feature_entropy, gram, infosam_terms
from renyi_kd.ops import dispatch
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.feature_terms import Pair, feature_terms
from renyi_kd.ops.gram_moment import gram_moment
from renyi_kd.ops.gram_terms import gram_terms
from renyi_kd.ops.gram_terms.types import RelationTerms
from renyi_kd.ops.prompts import image_index_on
from renyi_kd.ops.relation_directions import RelationWeights, relation_directions
from renyi_kd.ops.relation_scores import relation_scores
from tests.support import gradients, in_training, randn, relation_module, sam_features
from tests.support.directions import directions_and_gradients, directions_inputs, textbook_directions
from tests.support.golden import CASES, check_gradients, check_values, features_of, load_case, relation_of
from tests.support.kernels import (
    LAYOUTS,
    check_gram,
    check_scores,
    inputs,
    textbook_gram,
    textbook_scores,
    value_and_gradients,
)
from tests.support.tolerance import assert_close_on_scale, assert_within_budget

batch_gram_triton = pytest.importorskip("renyi_kd.ops.batch_gram.triton", reason="pip install 'renyi-kd[triton]'")
import renyi_kd.ops.feature_terms.triton  # noqa: E402  (operators are known from here on)
import renyi_kd.ops.gram_terms.triton  # noqa: E402, F401
from renyi_kd.ops import gpu, row_products  # noqa: E402
from renyi_kd.ops.feature_terms import teacher_kernel  # noqa: E402
from renyi_kd.ops.gram_moment import triton as gram_moment_triton  # noqa: E402
from renyi_kd.ops.gram_terms import launch as gram_terms_launch  # noqa: E402
from renyi_kd.ops.relation_directions import triton as relation_directions_triton  # noqa: E402
from renyi_kd.ops.relation_scores import reference as relation_scores_reference  # noqa: E402
from renyi_kd.ops.relation_scores import triton as relation_scores_triton  # noqa: E402
from tests.support.launches import launches  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter of Triton 3.9 multiplies the bit patterns of bfloat16 in tl.dot.
DOT_DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
IMAGES = {"none": None, "unsorted": [2, 0, 2, 1, 0], "gaps": [2, 2, 2]}


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


# relation_scores.

FORWARD, BACKWARD = (
    tile["BLOCK_P"] for tile in (relation_scores_triton.forward_tile(256, 1), relation_scores_triton.backward_tile(256))
)


@pytest.mark.parametrize(
    "n_pixels", sorted({1, *(block + delta for block in (FORWARD, BACKWARD) for delta in (-1, 0, 1))})
)
@pytest.mark.parametrize("n_channels", [200, 256])
def test_scores_around_the_edges_of_tiles(n_pixels, n_channels):
    # The interpreter sums 256 channels one after the other, the textbook in a tree.
    check_scores(*on_device(*inputs((2, n_channels, 1, n_pixels))), slack=4.0, impl="triton")


@pytest.mark.parametrize("n_channels", [3, 31, 32, 33, 100])
def test_scores_of_ragged_channels(n_channels):
    check_scores(*on_device(*inputs((2, n_channels, 5, 7))), impl="triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_in_every_layout(layout):
    x, directions = on_device(*inputs((3, 11, 7, 5)))
    check_scores(LAYOUTS[layout](x), directions, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channel-first", "channels-last", "gaps"])
def test_scores_in_every_dtype(dtype, layout):
    x, directions = on_device(*inputs((3, 37, 6, 5), dtype))
    check_scores(LAYOUTS[layout](x), directions, impl="triton")


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_scores_of_several_samples_per_image(images):
    x, directions = on_device(*inputs((3, 11, 6, 5), n_samples=None if images is None else len(images)))
    check_scores(x, directions, images, impl="triton")


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_scores_where_the_images_of_samples_are_on_the_device(n_tokens, dtype):
    x, directions = inputs((4, 11, 6, 5), n_samples=5, n_tokens=n_tokens)
    x, directions, index = on_device(x, directions, torch.tensor([2, 0, 2, 3, 0], dtype=dtype))
    _, grad, _ = check_scores(x, directions, index, impl="triton")
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))


@pytest.mark.parametrize("size", [(5, 10), (7, 4), (1, 12), (12, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("layout", ["channel-first", "channels-last", "gaps"])
def test_scores_of_any_width(size, layout):
    x, directions = on_device(*inputs((2, 12, *size)))
    check_scores(LAYOUTS[layout](x), directions, impl="triton")


@pytest.mark.parametrize("n_programs", [1, 4, 9])
def test_scores_where_a_program_has_several_tiles(n_programs, monkeypatch):
    monkeypatch.setattr(relation_scores_triton, "PROGRAMS", n_programs)
    # Seven tiles of an image, the last one ragged.
    check_scores(*on_device(*inputs((2, 256, 1, 6 * BACKWARD + 3))), impl="triton")


def test_offsets_are_added_and_get_their_gradient():
    x, directions = on_device(*inputs((3, 11, 6, 5)))
    (offsets,) = on_device(randn(3, 2, seed=5))

    def run(impl):
        return value_and_gradients(
            lambda *t: relation_scores(t[0], t[1], offsets=t[2], impl=impl), x, directions, offsets
        )

    for name, actual, expected in zip(("scores", "x", "w", "c"), run("triton"), run("reference"), strict=True):
        assert_close_on_scale(actual, expected, name=name, rtol=1e-6)


def test_dead_pixels_have_the_offset_and_no_gradient():
    x, directions = on_device(*inputs((2, 32, 4, 4)))
    x[0, :, 1, 2] = 300.1
    x[1, :, 3, 3] = 0
    scores, grad, _ = value_and_gradients(relation_scores, x, directions, impl="triton")
    assert torch.equal(scores[0, :, 6], torch.zeros_like(scores[0, :, 6]))
    assert torch.equal(grad[0, :, 1, 2], torch.zeros_like(grad[0, :, 1, 2]))
    assert torch.equal(grad[1, :, 3, 3], torch.zeros_like(grad[1, :, 3, 3]))
    assert (grad[0, :, 1, 1] != 0).all()


def test_scores_where_the_mean_is_large():
    x, directions = on_device(*inputs((2, 64, 3, 5)))
    check_scores(x + 100, directions, slack=4.0, impl="triton")


def test_scores_where_both_means_are_large():
    """The directions' mean meets what rounding leaves of the pixels'."""
    x, directions = on_device(*inputs((2, 64, 3, 5)))
    check_scores(x + 100, directions + 10, slack=4.0, impl="triton")


@pytest.mark.parametrize("mean_of_directions", [0, 10])
@pytest.mark.parametrize("drift", [0.0, 0.1])
@pytest.mark.parametrize("mean", [0, 1000, -1000])
def test_scores_keep_their_digits_where_means_are_large(mean, drift, mean_of_directions):
    """A large mean, of pixels or of directions, or a slope along the channels leaves them fp32's digits."""
    x, directions = on_device(*inputs((2, 256, 3, 5), n_tokens=1))
    x = x + mean + drift * torch.arange(256, device=x.device)[:, None, None]
    directions = directions + mean_of_directions
    exact = textbook_scores(x.double(), directions.double())
    alone = relation_scores(x, directions, impl="triton")
    with_gram, _ = teacher_kernel.launch(x, directions[:, 0], torch.zeros(2, device=x.device), 1e-5)
    for name, scores in (("scores", alone), ("teacher pass", with_gram[:, None])):
        assert_close_on_scale(scores, exact, name=name, rtol=1e-6)


# relation_directions.

ROWS, TILE = relation_directions_triton.BLOCK_R, relation_directions_triton.BLOCK_W


def check_directions(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, n_draws: int = 1) -> None:
    """Compare values and gradients with the reference's in fp64, at the budget of the textbook's over all draws."""

    def kernels(mask_tokens: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return relation_directions(mask_tokens, RelationWeights(*weights), impl="triton")

    found, eager, exact = [], [], []
    for draw in range(n_draws):
        values = on_device(*directions_inputs(*shape, dtype, draw))
        found.append(directions_and_gradients(kernels, values))
        eager.append(directions_and_gradients(textbook_directions, tuple(value.float() for value in values)))
        exact.append(directions_and_gradients(textbook_directions, tuple(value.double() for value in values)))
    for name in found[0]:
        value, of_textbook, truth = (
            torch.stack([one[name].detach() for one in each]) for each in (found, eager, exact)
        )
        assert value.dtype == (dtype if name.startswith("gradient") else torch.float32), name
        # The interpreter sums a row one after the other, the textbook in a tree.
        assert_within_budget(value, of_textbook, truth, name=name, slack=4.0)


@pytest.mark.parametrize("n_tokens", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS])
def test_directions_of_any_number_of_tokens(n_tokens):
    # The offset of one token is one number, which the textbook may get right by chance: then there is no budget.
    check_directions((n_tokens, 1, 40), n_draws=8 if n_tokens == 1 else 1)


@pytest.mark.parametrize("n_channels", [3, TILE - 1, TILE, TILE + 1, 2 * TILE + 5, 6 * TILE + 4])
def test_directions_of_ragged_channels(n_channels):
    check_directions((3, 2, n_channels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_directions_in_low_precision(dtype):
    check_directions((3, 2, 40), dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_directions_or_offsets_alone_are_differentiated(which):
    tokens, *weights = on_device(*directions_inputs(3, 1, 40, torch.float32))
    gradients_by = {}
    for impl in ("triton", "reference"):
        leaf = tokens.clone().requires_grad_()
        out = relation_directions(leaf, RelationWeights(*weights), impl=impl)[which]
        (gradients_by[impl],) = torch.autograd.grad(out.square().sum(), leaf)
    assert_close_on_scale(gradients_by["triton"], gradients_by["reference"], name="tokens", rtol=1e-5)


def test_directions_of_a_dead_token_have_no_gradient():
    tokens, *weights = on_device(*directions_inputs(3, 1, 40, torch.float32))
    tokens[1] = 7.1
    run = {}
    for impl in ("triton", "reference"):
        run[impl] = directions_and_gradients(
            lambda z, *w, impl=impl: relation_directions(z, RelationWeights(*w), impl=impl), (tokens, *weights)
        )
    assert torch.equal(run["triton"]["gradient of mask_tokens"][1], torch.zeros_like(tokens[1]))
    for name, value in run["triton"].items():
        assert_close_on_scale(value, run["reference"][name], name=name, rtol=1e-5)


# batch_gram.


@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 17, 65])
@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_gram_of_any_number_of_rows(n_rows, dtype):
    check_gram(on_device(0.3 + randn(n_rows, 5, 33, dtype=dtype))[0], impl="triton")


@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("n_programs", [2, 512])
def test_gram_around_the_edges_of_blocks(delta, n_blocks, n_programs, monkeypatch):
    monkeypatch.setattr(batch_gram_triton, "PROGRAMS", n_programs)
    tile = row_products.tile_of_rows(3, torch.float32, torch.device(DEVICE))
    n_columns = n_blocks * tile["BLOCK_L"] * tile["BLOCK_K"] + delta
    check_gram(on_device(randn(3, n_columns))[0], impl="triton")


@pytest.mark.parametrize("n_programs", [1, 8, 512])
def test_gram_of_several_blocks_of_rows_and_steps(n_programs, monkeypatch):
    monkeypatch.setattr(batch_gram_triton, "PROGRAMS", n_programs)
    n_rows, n_columns = batch_gram_triton.BLOCK_S + 3, 4 * batch_gram_triton.BLOCK_K + 5
    check_gram(on_device(randn(n_rows, n_columns))[0], impl="triton")


@pytest.mark.parametrize(("has_tensor_cores", "precision"), [(True, "tf32x3"), (False, "ieee")])
def test_products_of_many_rows_keep_the_digits_of_fp32(has_tensor_cores, precision, monkeypatch):
    chosen: list[str] = []

    def launcher(_kernel: object, _grid: object) -> Callable[..., None]:
        return lambda *_args, **settings: chosen.append(settings["PRECISION"])

    monkeypatch.setattr(batch_gram_triton, "launcher", launcher)
    monkeypatch.setattr(gpu, "has_tensor_cores", lambda _device: has_tensor_cores)
    batch_gram_triton.launch_forward(on_device(randn(batch_gram_triton.MAX_ROWS + 1, 5))[0])
    assert chosen == [precision]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_in_every_layout(layout):
    check_gram(LAYOUTS[layout](on_device(randn(3, 11, 7, 5))[0]), impl="triton")


def test_gram_of_rows_whose_columns_are_one_number():
    rows = on_device(randn(3, 1))[0].expand(3, 40)
    partial = batch_gram_triton.launch_forward(rows)
    assert_close_on_scale(partial.sum(0).double(), rows.double() @ rows.double().mT, name="gram", rtol=1e-6)


def test_gram_of_large_half_precision_rows():
    (rows,) = on_device(40000 * randn(3, 100, dtype=torch.float16).sign())
    assert_close_on_scale(batch_gram(rows, impl="triton"), rows.double() @ rows.double().mT, name="gram", rtol=1e-6)


def test_gradient_of_rows_that_overlap():
    rows = on_device(randn(13))[0].as_strided((5, 9), (1, 1))
    check_gram(rows, impl="triton")


# The teacher's map in one read.


def check_teacher_pass(x: Tensor, directions: Tensor, slack: float = 4.0) -> None:
    """Compare scores and Gram with the textbook's; the interpreter sums one after the other, the textbook in a tree."""
    (offsets,) = on_device(randn(len(x), seed=5))
    scores, parts = teacher_kernel.launch(x, directions[:, 0].contiguous(), offsets, 1e-5)
    eager, exact = (
        textbook_scores(x.to(dtype), directions.to(dtype)).squeeze(1) + offsets.to(dtype)[:, None]
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget(scores, eager, exact, name="scores", slack=slack)
    gram, of_textbook = parts.sum(0, dtype=torch.float64).float(), textbook_gram(x)
    assert_within_budget(gram, of_textbook, textbook_gram(x.double()), name="gram", slack=4.0)


def teacher_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return on_device(*(value.to(dtype) for value in inputs(shape, n_tokens=1)))


@pytest.mark.parametrize("n_images", [2, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("layout", ["channel-first", "channels-last"])
def test_teacher_pass_of_any_number_of_images(n_images, layout):
    x, directions = teacher_inputs(n_images, 19, 3, 7)
    check_teacher_pass(LAYOUTS[layout](x), directions)


@pytest.mark.parametrize("layout", ["channel-first", "channels-last"])
@pytest.mark.parametrize("n_samples", [3, 18])
def test_teacher_pass_of_several_samples_per_image(n_samples, layout):
    x, directions = teacher_inputs(4, 19, 3, 7)
    index = torch.tensor([2, 0, 2, *[3] * (n_samples - 3)], device=x.device)
    directions, statistics = (
        directions[index, 0] + index[:, None],
        torch.full((n_samples, 2, 21), math.nan).to(x.device),
    )
    offsets = torch.zeros(n_samples, device=x.device)
    scores, parts = teacher_kernel.launch(LAYOUTS[layout](x), directions, offsets, 1e-5, statistics, index)
    expected = teacher_kernel.launch(x[index], directions, offsets, 1e-5)
    assert_close_on_scale(scores, expected[0], name="scores", rtol=1e-6)
    assert_close_on_scale(parts.sum(0), expected[1].sum(0), name="gram", rtol=1e-6)
    pixels = x[index].flatten(2).double()
    rstd = (pixels.var(1, correction=0) + 1e-5).rsqrt()
    assert_close_on_scale(statistics, torch.stack([pixels.mean(1), rstd], 1), name="statistics", rtol=1e-6)


@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("n_blocks", [1, 5])
@pytest.mark.parametrize("n_programs", [2, 512])
def test_teacher_pass_around_the_edges_of_tiles(delta, n_blocks, n_programs, monkeypatch):
    monkeypatch.setattr(teacher_kernel, "PROGRAMS", n_programs)
    check_teacher_pass(*teacher_inputs(3, 8, 1, n_blocks * row_products.RUN + delta))


@pytest.mark.parametrize("n_channels", [3, 4, 5, 16, 33, 37, 256])
@pytest.mark.parametrize("layout", ["channel-first", "channels-last"])
def test_teacher_pass_of_ragged_channels(n_channels, layout):
    x, directions = teacher_inputs(2, n_channels, 5, 7)
    check_teacher_pass(LAYOUTS[layout](x), directions)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_teacher_pass_in_every_layout(layout):
    x, directions = teacher_inputs(3, 11, 7, 5)
    check_teacher_pass(LAYOUTS[layout](x), directions)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_teacher_pass_in_every_dtype(dtype):
    x, directions = teacher_inputs(3, 37, 6, 5)
    check_teacher_pass(x.to(dtype), directions)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_teacher_pass_where_means_are_large(mean, drift):
    """The means of pixels, those of the directions, and those of the channels seen first and last."""
    x, directions = teacher_inputs(2, 256, 3, 5)
    channels = torch.arange(256, device=x.device)
    # The textbook loses the digits of the mean, these scores must not.
    slack = 0.02 if mean and not drift else 4.0
    check_teacher_pass(x + mean + drift * channels[:, None, None], directions + mean / 10 + drift * channels, slack)


def test_teacher_pass_over_dead_pixels():
    x, directions = teacher_inputs(2, 7, 4, 12)
    x[0, :, 1:] = 300.1 + randn(3, 12, seed=7).to(x.device)
    x[1, :, 3, 3] = 0
    # The last bit of a few channels is still nothing but rounding.
    x[0, ::3] = torch.where(x[0, ::3] > 200, x[0, ::3].nextafter(torch.tensor(1e3, device=x.device)), x[0, ::3])
    offsets = torch.tensor([1.5, -2.5], device=x.device)
    scores, _ = teacher_kernel.launch(x, directions[:, 0], offsets, 1e-5)
    dead = scores == offsets[:, None]
    assert dead[0, 12:].all()
    assert dead[1, 39]
    assert dead.sum() == 37


def test_teacher_pass_keeps_nan_where_it_is():
    x, directions = teacher_inputs(3, 8, 3, 5)
    x[1, 2, 1, 3] = math.nan
    scores, parts = teacher_kernel.launch(x, directions[:, 0], torch.zeros(3, device=x.device), 1e-5)
    assert scores.isnan().nonzero().tolist() == [[1, 8]]
    gram = parts.sum(0)
    assert gram.isnan().nonzero().tolist() == [[0, 1], [1, 0], [1, 1], [1, 2], [2, 1]]


# gram_terms.

BLOCK_L = gram_terms_launch.BLOCK_L
DISTILLATIONS = ["mutual_information", "cauchy_schwarz", "debiased", "jensen_renyi"]
GRAM_FORMS = DISTILLATIONS[:3]
SIZES = [
    (2, 1),
    (3, BLOCK_L - 1),
    (4, BLOCK_L),
    (4, BLOCK_L + 1),
    (5, 3 * BLOCK_L + 5),
    (16, 40),
    (16, 1200),
    (17, 33),
    (40, 20),
]


def relations(n_samples: int, n_scores: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return Grams of images and tokens, and maps of teacher and student of which two are alike in each."""
    images, tokens = (1 + randn(n_samples, 30, seed=seed, dtype=torch.float64) for seed in (1, 2))
    teacher = randn(n_samples, n_scores, seed=3) + 0.5
    student = 0.5 * teacher + randn(n_samples, n_scores, seed=4)
    if n_samples > 2:
        teacher[1], student[2] = teacher[0], -student[0]
    return on_device(images @ images.mT, tokens @ tokens.mT, teacher.to(dtype), student.to(dtype))


def terms_and_gradients(
    impl, arguments, upstream=(-1.7, 0.4, -2.1), weight=None, **keywords
) -> tuple[RelationTerms, list[Tensor]]:
    image_gram, token_gram, *maps = arguments
    maps = [scores.detach().requires_grad_() for scores in maps]
    terms = gram_terms(image_gram, token_gram, *maps, Objective(**keywords), weight=weight, impl=impl)
    total = sum(weight * term for weight, term in zip(upstream, terms[:3], strict=True) if weight)
    # Of pairs, L_r has nothing of the student's map and L_d nothing of the teacher's.
    return terms, list(torch.autograd.grad(total, maps, materialize_grads=True))


def sample_weights(n_samples: int) -> Tensor:
    """Return weights of samples, the first of them 0 where there are several."""
    return torch.linspace(0 if n_samples > 1 else 0.3, 1.7, n_samples, device=DEVICE)


# Maps of a lower precision differ in how they are loaded: in one stretch of rows that fill no block, and in several.
HALF_SIZES = [(size, dtype) for size in (SIZES[4], SIZES[7]) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("size", "dtype"), [*((size, torch.float32) for size in SIZES), *HALF_SIZES], ids=str)
@pytest.mark.parametrize("form", DISTILLATIONS)
def test_terms_of_relations(size, dtype, form):
    arguments = relations(*size, dtype)
    keywords = {"lambda_r": 1.5, "lambda_d": 0.25, "distillation": form}
    actual, actual_gradients = terms_and_gradients("triton", arguments, **keywords)
    eager, eager_gradients = terms_and_gradients("reference", arguments, **keywords)
    exact, exact_gradients = terms_and_gradients("reference", [value.double() for value in arguments], **keywords)
    for name, a, e, t in zip(RelationTerms._fields, actual, eager, exact, strict=True):
        assert a.dtype == e.dtype, name
        if a.dtype == torch.float64:
            assert_close_on_scale(a, t, name=name, rtol=1e-13)
        else:
            # Of one entry alone, the exact L_r can be zero.
            assert abs(a.item() - t.item()) <= torch.finfo(dtype).eps * max(1.0, abs(t.item())), name
    if size[1] > 1:
        for name, a, e, t in zip(
            ("teacher", "student"), actual_gradients, eager_gradients, exact_gradients, strict=True
        ):
            assert_within_budget(a, e, t, name=f"gradient of the {name}'s map")


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((size, torch.float32) for size in ((1, 1), (1, BLOCK_L + 1), *SIZES)), *HALF_SIZES],
    ids=str,
)
def test_terms_of_weighted_pairs(size, dtype):
    image_gram, token_gram, *maps = relations(*size)
    arguments, weight = (image_gram, token_gram, *(scores.to(dtype) for scores in maps)), sample_weights(size[0])
    keywords = {"lambda_r": 1.5, "lambda_d": 0.25, "distillation": "jensen_renyi"}
    actual, actual_gradients = terms_and_gradients("triton", arguments, weight=weight, **keywords)
    eager_gradients = terms_and_gradients("reference", arguments, weight=weight, **keywords)[1]
    doubles = [value.double() for value in arguments]
    exact, exact_gradients = terms_and_gradients("reference", doubles, weight=weight.double(), **keywords)
    for name, a, t in zip(RelationTerms._fields, actual, exact, strict=True):
        eps = 1e-13 if a.dtype == torch.float64 else torch.finfo(dtype).eps
        assert_close_on_scale(a, t, name=name, rtol=eps, scale=1.0)
    if size[1] > 1:
        assert_within_budget(actual_gradients[1], eager_gradients[1], exact_gradients[1], name="student")
        # One sample's L_r is constant.
        if size[0] == 1:
            assert torch.equal(actual_gradients[0], torch.zeros_like(actual_gradients[0]))
        else:
            assert_within_budget(actual_gradients[0], eager_gradients[0], exact_gradients[0], name="teacher")


@pytest.mark.parametrize("form", GRAM_FORMS)
def test_terms_of_one_sample_are_constant(form):
    terms, gradients_of_maps = terms_and_gradients("triton", relations(1, 70), distillation=form)
    assert terms.loss == terms.compression == terms.distillation == 0
    assert terms.teacher_gram == terms.student_gram == 1
    for gradient in gradients_of_maps:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_every_number_that_is_kept_for_the_backward_is_written(form):
    """In deterministic mode PyTorch fills what ``empty`` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        outputs = torch.ops.renyi_kd.gram_terms(*relations(5, 70), 1.0, 0.5, form, False, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_in_every_dtype_and_any_stride(dtype):
    arguments, weight = relations(5, 70), sample_weights(5).to(dtype)
    strided = torch.full((10,), math.nan, dtype=dtype, device=DEVICE)
    strided[::2] = weight
    actual = gram_terms(*arguments, Objective(distillation="jensen_renyi"), weight=strided[::2], impl="triton")
    expected = gram_terms(*arguments, Objective(distillation="jensen_renyi"), weight=weight, impl="reference")
    for name, a, e in zip(RelationTerms._fields, actual, expected, strict=True):
        assert_close_on_scale(a, e, name=name, rtol=1e-6)


@pytest.mark.parametrize("n_programs", [1, 3])
@pytest.mark.parametrize("form", ["mutual_information", "jensen_renyi"])
def test_terms_where_a_program_has_several_stretches(n_programs, form, monkeypatch):
    arguments, objective = relations(5, 4 * BLOCK_L + 3), Objective(distillation=form)
    expected = gram_terms(*arguments, objective, impl="triton")
    monkeypatch.setattr(gram_terms_launch, "PROGRAMS", n_programs)
    for a, e in zip(gram_terms(*arguments, objective, impl="triton"), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("upstream", [(-1.7, 0, 0), (0, -1.7, 0), (0, 0, -1.7)], ids=["loss", "L_r", "L_d"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("form", DISTILLATIONS)
def test_every_term_has_its_own_gradient(upstream, detach, form):
    arguments, keywords = relations(5, 70), {"detach_teacher_relation": detach, "distillation": form}
    actual = terms_and_gradients("triton", arguments, upstream, **keywords)[1]
    expected = terms_and_gradients("reference", arguments, upstream, **keywords)[1]
    for name, a, e in zip(("teacher", "student"), actual, expected, strict=True):
        if e.abs().max() == 0:
            assert torch.equal(a, e), name
        else:
            assert_close_on_scale(a, e, name=name, rtol=1e-6)


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_nearly_equal_relations_keep_their_digits(form):
    """In fp32 the Gram of maps that differ by 1e-3 is all ones but for six digits; fp64 keeps the gradient's."""
    base = randn(1, 300, seed=8)
    maps = [base + 1e-3 * randn(4, 300, seed=seed) for seed in (9, 10)]
    arguments = (*relations(4, 300)[:2], *on_device(*maps))
    actual = terms_and_gradients("triton", arguments, distillation=form)[1]
    exact = terms_and_gradients("reference", [value.double() for value in arguments], distillation=form)[1]
    for name, a, t in zip(("teacher", "student"), actual, exact, strict=True):
        assert_close_on_scale(a, t, name=name, rtol=1e-6)


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_a_zero_relation_is_orthogonal_and_gets_no_gradient(form):
    arguments = relations(4, 50)
    arguments[2][1] = 0
    arguments[3][3] = 0
    actual, actual_gradients = terms_and_gradients("triton", arguments, distillation=form)
    expected, expected_gradients = terms_and_gradients("reference", arguments, distillation=form)
    for a, e in zip((*actual, *actual_gradients), (*expected, *expected_gradients), strict=True):
        assert_close_on_scale(a, e, name="zero relation", rtol=1e-6)
    for who, sample in ((0, 1), (1, 3)):
        assert torch.equal(actual_gradients[who][sample], torch.zeros_like(actual_gradients[who][sample]))


@pytest.mark.parametrize(("angle", "on_tangent"), [(0.0, True), (1e-3, True), (2e-3, False), (0.1, False)], ids=str)
def test_divergence_of_nearly_orthogonal_grams_is_finite(angle, on_tangent):
    """The teacher's maps are alike, the student's opposite but for an angle, whose square the Grams' product is."""
    teacher, student = torch.ones(2, 7), torch.zeros(2, 7)
    student[:, 0] = torch.tensor([1.0, -math.cos(angle)])
    student[1, 1] = math.sin(angle)
    arguments = (*relations(2, 7)[:2], *on_device(teacher, student))
    keywords = {"distillation": "cauchy_schwarz", "upstream": (0, 0, -1.7)}
    actual, actual_gradients = terms_and_gradients("triton", arguments, **keywords)
    exact, exact_gradients = terms_and_gradients("reference", [value.double() for value in arguments], **keywords)
    assert actual.distillation.item() == pytest.approx(exact.distillation.item(), rel=1e-6)
    assert (actual.distillation > 40) == on_tangent
    for name, a, e in zip(("teacher", "student"), actual_gradients, exact_gradients, strict=True):
        # The teacher's is nothing but rounding, and so is the student's at the angle 0.
        assert_close_on_scale(a, e, name=name, rtol=1e-6, scale=1.0)
    assert (actual_gradients[1].abs().max() > 1) == (angle > 0)


def test_divergence_of_equal_relations_is_zero_without_gradient():
    image_gram, token_gram, maps, _ = relations(5, 70)
    keywords = {"distillation": "cauchy_schwarz", "upstream": (0, 0, -1.7)}
    terms, gradients_of_maps = terms_and_gradients("triton", (image_gram, token_gram, maps, maps), **keywords)
    assert terms.distillation.item() == pytest.approx(0, abs=1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients_of_maps)


@pytest.mark.parametrize("size", [(2, 1), (5, 70), (17, 33)], ids=str)
def test_debiased_term_of_equal_relations_is_zero_without_gradient(size):
    """To the last bit, and so where one model's maps have another sign."""
    image_gram, token_gram, maps, _ = relations(*size)
    signs = torch.where(torch.arange(len(maps), device=DEVICE) % 2 == 0, 1, -1)[:, None]
    for student in (maps, signs * maps):
        terms, gradients_of_maps = terms_and_gradients(
            "triton", (image_gram, token_gram, maps, student), (0, 0, -1.7), distillation="debiased"
        )
        assert terms.distillation == 0
        for gradient in gradients_of_maps:
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_pairs_at_right_angles_have_one_bit_and_equal_ones_none():
    teacher, student = torch.eye(4, 9), torch.eye(4, 9).flip(0)
    # Of two a pair is equal but for scale and sign.
    student[:2] = torch.tensor([4.0, -0.5])[:, None] * teacher[:2]
    arguments = (*relations(4, 9)[:2], *on_device(teacher, student))
    terms, (_, gradient) = terms_and_gradients("triton", arguments, (0, 0, -1.7), distillation="jensen_renyi")
    assert terms.distillation == 0.5
    # A maximum, and a minimum.
    assert torch.equal(gradient, torch.zeros_like(gradient))
    weight = torch.tensor([1.0, 1.0, 0.5, 0.0], device=DEVICE)
    assert gram_terms(*arguments, Objective(distillation="jensen_renyi"), weight=weight, impl="triton")[2] == 0.125


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_nan_reaches_the_loss(form):
    arguments = relations(4, 50)
    arguments[3][2, 7] = math.nan
    terms = gram_terms(*arguments, Objective(distillation=form), impl="triton")
    assert terms.loss.isnan()
    assert terms.distillation.isnan()
    assert not terms.compression.isnan()


# gram_moment.

BLOCK_N = gram_moment_triton.FORWARD_BLOCKS["BLOCK_N"]
LINEAR, RBF, POLYNOMIAL = gram.Linear(), gram.RBF(3.0), gram.Polynomial(3, 0.5)
VARIABLES = {
    "linear": [LINEAR],
    "rbf": [RBF],
    "polynomial": [POLYNOMIAL],
    "two": [RBF, LINEAR],
    "four": [LINEAR, RBF, POLYNOMIAL, RBF],
}


def textbook_moment(features, kernels) -> Tensor:
    """Return the moment as the kernels compute it, distances expanded in the dtype of the features."""
    product = torch.ones((), device=DEVICE)
    for x, kernel in zip(features, kernels, strict=True):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(kernel, gram.RBF):
            centred = x - x.mean(0)
            norms = centred.square().sum(1)
            distances = (norms[:, None] + norms - 2 * centred @ centred.mT).fill_diagonal_(0)
            product = product * (-distances / (2 * kernel.bandwidth**2)).exp()
        else:
            product = product * gram.gram_matrix(x, kernel)
    return product.square().sum(dtype=torch.float64)


def moment_and_gradients(impl, features, kernels) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in features]
    moment = textbook_moment(leaves, kernels) if impl == "eager" else gram_moment(leaves, kernels, impl=impl)
    return [moment.detach(), *torch.autograd.grad(moment, leaves, torch.full_like(moment, -1.7))]


def check_moment(features, kernels) -> None:
    actual = moment_and_gradients("triton", features, kernels)
    eager = moment_and_gradients("eager", features, kernels)
    exact = moment_and_gradients("reference", [x.double() for x in features], kernels)
    assert actual[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
    for k, (a, e, t) in enumerate(zip(actual[1:], eager[1:], exact[1:], strict=True)):
        # Twice more than a matrix product's own: of up to four tiles, each with an error of its own.
        assert_within_budget(a, e, t, name=f"gradient of variable {k}", slack=4.0)


def samples(n_samples: int, n_variables: int, n_features: int = 9, dtype=torch.float32) -> tuple[Tensor, ...]:
    features = [0.4 + randn(n_samples, n_features + 7 * k, seed=k, dtype=dtype) for k in range(n_variables)]
    if n_samples > 3:
        features[0][1] = features[0][0]
        features[-1][2] = 0
    return on_device(*features)


@pytest.mark.parametrize("n_samples", [2, BLOCK_N - 1, BLOCK_N, BLOCK_N + 1, 2 * BLOCK_N + 5])
@pytest.mark.parametrize("kernels", VARIABLES.values(), ids=VARIABLES)
def test_moment_around_the_edges_of_tiles(n_samples, kernels):
    check_moment(samples(n_samples, len(kernels)), kernels)


@pytest.mark.parametrize("kernels", VARIABLES.values(), ids=VARIABLES)
def test_moment_of_samples_that_are_prepared_in_blocks(kernels, monkeypatch):
    monkeypatch.setattr(gram_moment_triton, "PREPARED_ELEMENTS", 40)
    check_moment(samples(BLOCK_N + 1, len(kernels)), kernels)


@pytest.mark.parametrize("kernel", [LINEAR, RBF, POLYNOMIAL], ids=str)
def test_samples_are_prepared_without_a_copy_of_them_all(kernel):
    features = randn(64, 2**16).to(DEVICE)
    with torch.profiler.profile(profile_memory=True) as seen:
        gram_moment_triton._arguments([features], *([number] for number in gram_moment_triton._numbers(kernel)))
    largest = max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in seen.events())
    # Bytes of a block in fp64.
    assert largest <= 8 * gram_moment_triton.PREPARED_ELEMENTS < features.nbytes


@pytest.mark.parametrize("kernel", [gram.Polynomial(4), gram.Polynomial(6, 2.0)], ids=str)
def test_moment_of_a_power_beyond_fp32(kernel):
    (features,) = samples(19, 1)
    check_moment([1e5 * features], [kernel])


@pytest.mark.parametrize("n_features", [1, 15, 16, 17, 128, 129])
def test_moment_of_ragged_features(n_features):
    check_moment(samples(9, 2, n_features), [RBF, LINEAR])


def test_moment_of_samples_far_from_the_origin():
    """Of distances only differences count: those from the mean keep the digits."""
    features = samples(40, 1)[0] + 1000
    actual = moment_and_gradients("triton", [features], [RBF])
    exact = moment_and_gradients("reference", [features.double()], [RBF])
    assert actual[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
    assert_close_on_scale(actual[1], exact[1].float(), name="gradient", rtol=1e-5)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_moment_in_every_dtype(dtype):
    check_moment(samples(40, 3, dtype=dtype), [LINEAR, RBF, POLYNOMIAL])


def test_moment_of_strided_features():
    (x,) = samples(40, 1, 6)
    wide = torch.full((13, 40), math.nan, device=DEVICE)
    wide[1::2] = x.T
    check_moment([wide[1::2].T], [LINEAR])


def test_moment_of_features_further_apart_than_int32():
    (x,) = samples(2, 1, 17, dtype=torch.float16)
    # 4.5 GB of addresses, of which two columns are ever touched.
    wide = torch.empty(17, 2**27, dtype=torch.float16, device=DEVICE)[:, :2]
    wide.copy_(x.T)
    assert moment_and_gradients("triton", [wide.T], [LINEAR])[0] == moment_and_gradients("triton", [x], [LINEAR])[0]


# The interpreter computes with NumPy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("kernel", [LINEAR, RBF, POLYNOMIAL], ids=lambda kernel: type(kernel).__name__)
def test_moment_of_what_is_not_finite_is_not_finite(kernel, bad):
    (x,) = samples(8, 1)
    x[3, 2] = bad
    assert not gram_moment([x], [kernel], impl="triton").isfinite()


@pytest.mark.parametrize("reach", [10, 100, 1000])
@pytest.mark.parametrize("n_features", [3, 64])
def test_digits_of_rbf_distances_are_as_documented(reach, n_features):
    x = randn(64, n_features) / n_features**0.5
    x[32:] += 2 * reach / n_features**0.5
    (x,) = on_device(x)
    assert 0.9 < (x - x.mean(0)).norm(dim=1).max() / reach < 1.3
    fast, right = (feature_entropy(x, kernel=gram.RBF(1.0), impl=impl).item() for impl in ("triton", "reference"))
    assert abs(fast - right) < 1e-7 * reach**2


def test_moment_of_one_sample_is_one():
    assert gram_moment([torch.ones(1, 3, device=DEVICE)], [RBF], impl="triton").item() == 1


# The whole loss.


def loss_and_gradients(function, teacher, student, relation, **keywords) -> list[Tensor]:
    terms = function(relation, teacher, student, **keywords)
    leaves, parameters = gradients(terms.loss, student, relation)
    return [*terms, *leaves.values(), *parameters.values()]


def weighted(form: str, features: SAMFeatures) -> dict[str, Tensor]:
    """Return weights of the samples as a keyword, where the form has them."""
    return {"sample_weight": sample_weights(len(features.mask_tokens))} if form == "jensen_renyi" else {}


def setting(dtype=torch.float32, image_index=None):
    def prepare(features: SAMFeatures) -> SAMFeatures:
        return features._replace(
            image_features=features.image_features.to(DEVICE), mask_tokens=features.mask_tokens.to(DEVICE)
        )

    teacher, student = (sam_features(4, seed=seed, dtype=dtype, image_index=image_index) for seed in (1, 3))
    return prepare(teacher), in_training(prepare(student)), relation_module().to(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "image_index", "detach", "form"),
    [
        *product(DOT_DTYPES, (None, [0, 1, 0, 2, 2]), (False,), DISTILLATIONS),
        *product((torch.float32,), (None,), (True,), GRAM_FORMS),
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_reference(dtype, image_index, detach, form):
    arguments = setting(dtype, image_index)
    keywords = {"lambda_r": 0.7, "lambda_d": 1.5, "detach_teacher_relation": detach, "distillation": form}
    keywords |= weighted(form, arguments[0])
    actual = loss_and_gradients(infosam_terms, *arguments, impl="triton", **keywords)
    expected = loss_and_gradients(infosam_terms, *arguments, impl="reference", **keywords)
    largest = max(value.abs().max().item() for value in expected[5:])
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        rtol = 4 * torch.finfo(dtype).eps if index in (3, 4) and dtype != torch.float32 else 2e-6
        assert_close_on_scale(a, e, name=str(index), rtol=rtol, scale=largest if index > 4 else 0.0)


@pytest.mark.parametrize(
    ("image_index", "form"),
    [*product((None,), DISTILLATIONS), *product(([0, 1, 0, 2, 2],), ("mutual_information", "jensen_renyi"))],
    ids=str,
)
def test_the_loss_with_samples_of_earlier_steps_is_that_of_the_reference(image_index, form):
    found = {}
    for impl in ("triton", "reference"):
        teacher, student, relation = setting(image_index=image_index)
        infosam = InfoSAMLoss(12, bank_size=3, distillation=form, impl=impl).to(DEVICE)
        infosam.relation = relation
        infosam(teacher, student._replace(image_features=student.image_features.flip(-1)))
        loss = infosam(teacher, student)
        found[impl] = [loss.detach(), *(value for of in gradients(loss, student, relation) for value in of.values())]
    largest = max(value.abs().max().item() for value in found["reference"][3:])
    for index, (a, e) in enumerate(zip(*found.values(), strict=True)):
        assert_close_on_scale(a, e, name=str(index), rtol=2e-6, scale=largest if index > 2 else 0.0)


PARTS = ["map", "tokens", "map, module", "tokens, module", "map, tokens, module"]


# The forms differ in what they tell the maps of relations, and not in what is made of that.
@pytest.mark.parametrize(
    ("parts", "n_tokens", "form"),
    [*product(PARTS, (1, 3), ("mutual_information",)), *product((PARTS[0], PARTS[-1]), (1,), ("jensen_renyi",))],
)
def test_the_loss_gives_gradients_to_what_needs_them(parts, n_tokens, form):
    """Of one token the teacher's map takes one read, of several two."""
    teacher, student, relation = setting()
    tokens = [torch.cat([features.mask_tokens.detach()] * n_tokens, 1) for features in (teacher, student)]
    tokens = [value + torch.arange(n_tokens, device=DEVICE)[:, None] * randn(1, 1, 12).to(DEVICE) for value in tokens]
    leaves = {"map": student.image_features.detach(), "tokens": tokens[1]}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in parts)
    relation.requires_grad_("module" in parts)
    wanted = [leaf for leaf in (*leaves.values(), *relation.parameters()) if leaf.requires_grad]
    found = {}
    for impl in ("triton", "reference"):
        terms = infosam_terms(
            relation,
            teacher._replace(mask_tokens=tokens[0]),
            SAMFeatures(leaves["map"], leaves["tokens"]),
            distillation=form,
            impl=impl,
        )
        found[impl] = torch.autograd.grad(-1.7 * terms.loss + 0.4 * terms.compression, wanted)
    largest = max(value.abs().max().item() for value in found["reference"])
    for a, e in zip(*found.values(), strict=True):
        assert_close_on_scale(a, e, name=f"{tuple(a.shape)}", rtol=1e-5, scale=largest)


# As many channels as a SAM has, or many pixels or samples, and every form: more of these take the interpreter minutes.
@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        ((4, 256, 4, 4), torch.float32, "mutual_information"),
        ((4, 64, 8, 8), torch.float16, "cauchy_schwarz"),
        ((4, 4, 16, 16), torch.float32, "debiased"),
        ((4, 4, 32, 32), torch.float16, "jensen_renyi"),
        ((64, 4, 8, 8), torch.float32, "mutual_information"),
    ],
    ids=str,
)
def test_a_step_takes_eight_launches(shape, dtype, form):
    """Kernels of the package and every operation of PyTorch that is neither a view nor an allocation."""
    n_samples, dim = shape[:2]
    maps = [1 + randn(*shape, seed=seed).to(DEVICE, dtype) for seed in (1, 3)]
    teacher, student = (
        # As a decoder returns them: one of several tokens.
        SAMFeatures(x, 1 + randn(n_samples, 3, dim, seed=5 + k).to(DEVICE, dtype)[:, 1:2])
        for k, x in enumerate(maps)
    )
    student, relation = in_training(student), relation_module(dim).to(DEVICE)
    upstream = torch.ones((), device=DEVICE)
    with launches() as names:
        loss = infosam_terms(relation, teacher, student, distillation=form, impl="triton").loss
        torch.autograd.grad(loss, [*student[:2], *relation.parameters()], upstream)
    assert len(names) == 8, names
    # Tokens wider than the maps have stretches of their own.
    expected = infosam_terms(relation, teacher, student, distillation=form, impl="reference").loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_several_prompts_an_image_take_no_launch():
    teacher, student, relation = setting(image_index=[0, 1, 0, 2, 2])
    (upstream,) = on_device(torch.ones(()))

    def step() -> None:
        loss = infosam_terms(relation, teacher, student, impl="triton").loss
        torch.autograd.grad(loss, [*student[:2], *relation.parameters()], upstream)

    # From then on the index is where the features are.
    step()
    with launches() as names:
        step()
    assert len(names) == 8, names


def test_the_index_of_a_step_of_another_mode_is_none_of_a_training_step():
    """What is kept of a pattern of prompts serves every step, whatever the mode of the first."""
    images = [0, 1, 1, 3]
    teacher, student, relation = setting(image_index=images)
    with FakeTensorMode():
        image_index_on(torch.device(DEVICE), tuple(images))
    with torch.inference_mode():
        infosam_terms(relation, teacher, student, impl="triton")
    found, expected = (
        loss_and_gradients(infosam_terms, teacher, student, relation, impl=impl) for impl in ("triton", "reference")
    )
    assert_close_on_scale(found[0], expected[0], name="loss", rtol=1e-5)
    assert_close_on_scale(found[3], expected[3], name="map", rtol=1e-5)


def test_weights_of_samples_take_no_launch():
    teacher, student, relation = setting()
    (upstream,) = on_device(torch.ones(()))
    pair = Pair(*teacher[:2], *student[:2], None, sample_weights(4))
    with launches() as names:
        loss = feature_terms(
            pair, relation.value(student.mask_tokens), Objective(distillation="jensen_renyi"), impl="triton"
        ).loss
        torch.autograd.grad(loss, [*student[:2], *relation.parameters()], upstream)
    assert len(names) == 8, names


@pytest.mark.parametrize("form", ["mutual_information", "jensen_renyi"])
def test_the_loss_where_tokens_have_several_stretches(form):
    """What no program wrote of a part must not be read: in deterministic mode it is NaN."""
    n_tokens = BLOCK_L // 12 + 3
    teacher, student = (sam_features(4, seed=seed, n_tokens=n_tokens) for seed in (1, 3))
    teacher, student = (SAMFeatures(*on_device(*features[:2])) for features in (teacher, student))
    arguments, found = (teacher, in_training(student), relation_module().to(DEVICE)), {}
    torch.use_deterministic_algorithms(True)
    try:
        for impl in ("triton", "reference"):
            found[impl] = loss_and_gradients(infosam_terms, *arguments, distillation=form, impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    largest = max(value.abs().max().item() for value in found["reference"][5:])
    for index, (a, e) in enumerate(zip(*found.values(), strict=True)):
        assert_close_on_scale(a, e, name=str(index), rtol=2e-6, scale=largest if index > 4 else 0.0)


@pytest.mark.parametrize("n_samples", [16, 17])
def test_the_loss_of_many_samples_of_few_pixels_is_that_of_the_reference(n_samples):
    """One program then sums several blocks of a Gram of images in several parts."""
    teacher, student = (sam_features(n_samples, seed=seed, size=(5, 16)) for seed in (1, 3))
    teacher, student = (SAMFeatures(*on_device(*features[:2])) for features in (teacher, student))
    arguments = teacher, in_training(student), relation_module().to(DEVICE)
    actual, expected = (loss_and_gradients(infosam_terms, *arguments, impl=impl) for impl in ("triton", "reference"))
    largest = max(value.abs().max().item() for value in expected[5:])
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close_on_scale(a, e, name=str(index), rtol=2e-6, scale=largest if index > 4 else 0.0)


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_the_loss_of_one_pair_is_that_of_the_reference(n_tokens):
    teacher, student = (sam_features(1, seed=seed, n_tokens=n_tokens) for seed in (1, 3))
    teacher, student = (SAMFeatures(*on_device(*features[:2])) for features in (teacher, student))
    arguments = teacher, in_training(student), relation_module().to(DEVICE)
    actual, expected = (
        loss_and_gradients(infosam_terms, *arguments, distillation="jensen_renyi", impl=impl, **weighted_one)
        for impl in ("triton", "reference")
        for weighted_one in [weighted("jensen_renyi", teacher)]
    )
    for name, a, e in zip(("loss", "L_r", "L_d", "map", "tokens"), actual[:5], expected[:5], strict=True):
        assert_close_on_scale(a, e, name=name, rtol=2e-6, scale=float(name == "L_r"))
    for gradient in actual[5:]:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_module_is_a_constant_in_the_divergence_of_pairs():
    teacher, student, relation = setting()
    keywords = {"distillation": "jensen_renyi", "impl": "triton"}
    parameters = list(relation.parameters())
    without = infosam_terms(relation, teacher, student, lambda_r=0.0, **keywords)
    for value in (without.loss, infosam_terms(relation, teacher, student, **keywords).distillation):
        of_student, of_module = gradients(-1.7 * value, student, relation)
        assert all(gradient.abs().max() > 0 for gradient in of_student.values())
        for name, gradient in of_module.items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
    terms = infosam_terms(relation, teacher, student, **keywords)
    of_loss = torch.autograd.grad(terms.loss, parameters, retain_graph=True)
    of_compression = torch.autograd.grad(terms.compression, parameters)
    for a, e in zip(of_loss, of_compression, strict=True):
        assert torch.equal(a, e)
        assert e.abs().max() > 0


@pytest.mark.parametrize("layout", ["channel-last", "channel-first"])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_official_implementation(name, layout):
    settings, tensors = load_case(name)
    tensors = dict(zip(tensors, on_device(*tensors.values()), strict=True))

    def as_map(x: Tensor) -> Tensor:
        x = x.mT.unsqueeze(-1)
        return x.contiguous() if layout == "channel-first" else x

    relation = relation_of(tensors, settings["D"]).float().to(DEVICE)
    teacher, student = (features_of(tensors, who, torch.float32, as_map) for who in ("teacher", "student"))
    student = in_training(student)
    weights = {"lambda_r": settings.get("wr", 1.0), "lambda_d": settings.get("wd", 0.5)}
    terms = infosam_terms(relation, teacher, student, impl="triton", **weights)
    check_values(terms, tensors, torch.float32)
    check_gradients(*gradients(terms.loss, student, relation), tensors, torch.float32)


def test_other_orders_run_where_they_can():
    teacher, student, relation = setting()
    for form in DISTILLATIONS:
        keywords = {"alpha": 2.5, "distillation": form}
        with pytest.raises(
            RuntimeError, match=r"got alpha = 2\.5 \(the kernels know the closed form of 2\); use impl="
        ):
            infosam_terms(relation, teacher, student, impl="triton", **keywords)
        assert infosam_terms(relation, teacher, student, **keywords).loss.isfinite()


# What torch.compile itself does when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("form", "impl", "layout"),
    [
        ("mutual_information", "triton", torch.contiguous_format),
        pytest.param("cauchy_schwarz", "triton", torch.contiguous_format, marks=pytest.mark.long),
        pytest.param("debiased", "triton", torch.contiguous_format, marks=pytest.mark.long),
        ("jensen_renyi", "triton", torch.contiguous_format),
        pytest.param("cauchy_schwarz", "reference", torch.contiguous_format, marks=pytest.mark.long),
        ("mutual_information", "reference", torch.channels_last),
    ],
)
def test_the_loss_under_torch_compile(form, impl, layout, monkeypatch):
    # Several blocks, as maps of their real size have.
    monkeypatch.setattr(relation_scores_reference, "BLOCK_ELEMENTS", 64)
    teacher, student, relation = setting()
    teacher, student = (
        features._replace(image_features=features.image_features.detach().contiguous(memory_format=layout))
        for features in (teacher, student)
    )
    student = in_training(student)
    compiled = torch.compile(
        functools.partial(infosam_terms, distillation=form, impl=impl),
        fullgraph=True,
        backend="aot_eager",
    )
    weight = weighted(form, teacher)
    actual = loss_and_gradients(compiled, teacher, student, relation, **weight)
    expected = loss_and_gradients(infosam_terms, teacher, student, relation, distillation=form, impl=impl, **weight)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("low", "form"),
    [*product((torch.bfloat16,), DISTILLATIONS), (torch.float16, "mutual_information")],
    ids=str,
)
def test_autocast_changes_no_bit(low, form):
    arguments = setting()
    keywords = {"distillation": form, "impl": "triton", **weighted(form, arguments[0])}
    expected = loss_and_gradients(infosam_terms, *arguments, **keywords)
    with torch.autocast(DEVICE, low):
        actual = loss_and_gradients(infosam_terms, *arguments, **keywords)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_to_another_half_precision_than_the_features(low, impl):
    """As of a teacher that was loaded in fp16 where the loop runs in bf16; autocast would refuse to mix them."""
    other = torch.float16 if low == torch.bfloat16 else torch.bfloat16
    teacher, student, relation = setting()
    teacher, student = (value._replace(mask_tokens=value.mask_tokens.to(other)) for value in (teacher, student))
    expected = infosam_terms(relation, teacher, student, impl=impl)
    with torch.autocast(DEVICE, low):
        actual = infosam_terms(relation, teacher, student, impl=impl)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


# What torch.compile itself does when it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_map_of_another_size_compiles_nothing_again():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    relation = relation_module().to(DEVICE)

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def loss(x: Tensor, tokens: Tensor) -> Tensor:
        return infosam_terms(relation, SAMFeatures(x + 1, tokens), SAMFeatures(x, tokens), impl="triton").loss

    compilations = []
    for height, width in ((6, 5), (7, 8), (9, 4)):
        x, tokens = on_device(randn(3, 12, height, width), randn(3, 1, 12))
        assert loss(x.requires_grad_(), tokens).isfinite()
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@pytest.mark.parametrize("form", DISTILLATIONS)
def test_repeated_steps_are_bitwise_equal_and_nothing_is_left_unwritten(form):
    """In deterministic mode PyTorch fills what ``empty`` returns with NaN."""
    arguments = setting()
    keywords = {"distillation": form, "impl": "triton", **weighted(form, arguments[0])}
    expected = loss_and_gradients(infosam_terms, *arguments, **keywords)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        actual = loss_and_gradients(infosam_terms, *arguments, **keywords)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("image_index", [None, [0, 1, 0, 2, 2]], ids=str)
@pytest.mark.parametrize("form", DISTILLATIONS)
def test_a_step_replays_from_a_cuda_graph(form, image_index):
    """After a capture, other values in the same tensors give the loss and gradients of those values."""
    teacher, student, relation = setting(image_index=image_index)
    leaves = [*student[:2], *relation.parameters()]

    def step() -> list[Tensor]:
        loss = infosam_terms(relation, teacher, student, distillation=form, impl="triton").loss
        # Without its graph, which would belong to the stream of the capture.
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (11, 12):
        with torch.no_grad():
            for features in (teacher, student):
                for value in features[:2]:
                    value.copy_(randn(*value.shape, seed=seed).to(value))
        graph.replay()
        for a, e in zip(captured, step(), strict=True):
            assert torch.equal(a, e)


# Operators.


def operator_arguments() -> dict[str, tuple]:
    x, directions = on_device(*inputs((2, 8, 3, 5)))
    (offsets,) = on_device(randn(2, 2, seed=5))
    rows = x.flatten(1)
    image_gram, token_gram, *maps = relations(3, 20)
    mix, weight = torch.ones(3, 3, 3, dtype=torch.float64, device=DEVICE), sample_weights(3)
    leaves = [value.detach().requires_grad_() for value in (x, directions, offsets, rows, *maps)]
    x, directions, offsets, rows, *maps = leaves
    tokens, *weights = (value.detach() for value in on_device(*directions_inputs(2, 1, 8, torch.float32)))
    student = [value.clone().requires_grad_() for value in (x.detach(), tokens)]
    weights = [value.requires_grad_() for value in weights]
    features = x.detach(), tokens + 1, *student
    settings = (1e-5, 1e-5, 1.0, 0.5, "mutual_information", False, None, None)
    of_pairs = (*settings[:4], "jensen_renyi", False, weight[:2], None)
    packed = torch.ops.renyi_kd.feature_terms(*features, weights, *settings)[5]
    scores = [value.detach() for value in torch.ops.renyi_kd.relation_scores(x, directions, offsets, None, 1e-5, True)]
    one = torch.ones((), device=DEVICE)
    return {
        "feature_terms": (*features, weights, *settings),
        "feature_terms, jensen_renyi": (*features, weights, *of_pairs),
        **{
            f"feature_terms_backward, {name}": (
                *(features[0], *student),
                weights,
                packed,
                None,
                one,
                None,
                None,
                1.0,
                0.5,
                name == "pairs",
                True,
                True,
            )
            for name in ("Grams", "pairs")
        },
        "relation_scores": (x, directions, offsets, None, 1e-5, True),
        "relation_scores_backward": (x, directions, offsets, None, *scores, torch.ones_like(scores[0]), True, True),
        "batch_gram": (rows,),
        "batch_gram_backward": (rows, torch.ones(2, 2, dtype=torch.float64, device=DEVICE)),
        **{
            f"gram_terms, {form}": (image_gram, token_gram, *maps, 1.0, 0.5, form, False, None)
            for form in DISTILLATIONS
        },
        "gram_terms, weighted": (image_gram, token_gram, *maps, 1.0, 0.5, "jensen_renyi", False, weight),
        "gram_moment": ([rows, rows.detach().clone().requires_grad_()], [0, 2], [0.0, 1.5], [1, 1]),
        "gram_moment_backward": (
            [rows, rows],
            torch.ones((), dtype=torch.float64, device=DEVICE),
            [0, 2],
            [0.0, 1.5],
            [1, 1],
            1,
        ),
        "gram_terms_backward, Grams": (*maps, mix, one, None, None, 1.0, 0.5, False),
        "gram_terms_backward, pairs": (*maps, mix, one, None, None, 1.0, 0.5, True),
    }


# Named, as making the arguments runs kernels, which must not fail before the first test.
OPERATORS = (
    "feature_terms",
    "feature_terms, jensen_renyi",
    "feature_terms_backward, Grams",
    "feature_terms_backward, pairs",
    "relation_scores",
    "relation_scores_backward",
    "batch_gram",
    "batch_gram_backward",
    *(f"gram_terms, {form}" for form in DISTILLATIONS),
    "gram_terms, weighted",
    "gram_moment",
    "gram_moment_backward",
    "gram_terms_backward, Grams",
    "gram_terms_backward, pairs",
)


def test_every_operator_is_named():
    assert set(operator_arguments()) == set(OPERATORS)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "backward" not in name])
def test_operators_are_well_registered(name):
    # In deterministic mode the gaps between what is packed are filled, and outputs are compared with them.
    torch.use_deterministic_algorithms(True)
    try:
        torch.library.opcheck(getattr(torch.ops.renyi_kd, name.partition(",")[0]), operator_arguments()[name])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "backward" in name])
def test_operators_of_the_backward_are_well_registered(name):
    # Their only derivative is a refusal, which the whole opcheck would run into.
    utils = ("test_schema", "test_faketensor")
    operator = getattr(torch.ops.renyi_kd, name.partition(",")[0])
    torch.library.opcheck(operator, operator_arguments()[name], test_utils=utils)


@pytest.mark.parametrize(
    ("function", "way_out"),
    [
        (lambda x, w: relation_scores(x, w, impl="triton"), "differentiate a textbook implementation instead"),
        (lambda x, _: batch_gram(x, impl="triton"), r"use gram_matrix\(features\) instead"),
        (
            lambda x, _: gram_moment([x.flatten(1)], [RBF], impl="triton"),
            r"use renyi_entropy\(gram_matrix\(features\)\)",
        ),
        (
            lambda x, _: (
                infosam_terms(
                    relation_module(6).to(DEVICE),
                    SAMFeatures(x.detach() + 1, torch.ones(3, 1, 6, device=DEVICE)),
                    SAMFeatures(x, torch.ones(3, 1, 6, device=DEVICE)),
                    impl="triton",
                ).loss
            ),
            "use a textbook implementation instead",
        ),
        *[
            (
                lambda x, _, form=form: (
                    gram_terms(
                        *relations(3, 20)[:2],
                        x.flatten(1),
                        x.flatten(1) + 1,
                        Objective(distillation=form),
                        impl="triton",
                    ).loss
                ),
                "differentiate entropies of gram_matrix",
            )
            for form in DISTILLATIONS
        ],
    ],
    ids=[
        "relation_scores",
        "batch_gram",
        "gram_moment",
        "feature_terms",
        *(f"gram_terms, {form}" for form in DISTILLATIONS),
    ],
)
def test_second_derivative_is_refused(function, way_out):
    x, directions = on_device(*inputs((3, 6, 4, 5)))
    x.requires_grad_()
    value = function(x, directions)
    with pytest.raises(NotImplementedError, match=rf"got a request for a second derivative; {way_out}"):
        # A constant upstream gradient needs no graph of its own: the one where a gradient penalty would vanish. The
        # loss refuses at once, an operator where its gradient is differentiated.
        torch.autograd.grad(value, x, torch.ones_like(value), create_graph=True)[0].square().sum().backward()


# What runs.


def test_what_runs_can_be_asked():
    (x,) = on_device(torch.ones(2))
    auto = dispatch.implementation(x)
    assert auto == (("reference", "the tensors are not on a GPU") if INTERPRETED else ("triton", ""))
    assert dispatch.implementation(x, impl="triton") == ("triton", "")
    assert dispatch.implementation(x, impl="reference") == ("reference", "impl='reference' asks for it")


def test_triton_is_not_loaded_where_nothing_runs_on_a_gpu():
    code = (
        "import sys, torch, renyi_kd; loss = renyi_kd.InfoSAMLoss(4); "
        "x = renyi_kd.SAMFeatures(torch.randn(2, 4, 2, 2), torch.randn(2, 1, 4)); "
        "torch.set_grad_enabled(False); loss(x, x); print('triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_fp64_is_for_the_reference():
    (x,) = on_device(torch.ones(2, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"got torch\.float64 \(the kernels take float16, bfloat16 and float32\); use"
    ):
        dispatch.resolve("triton", x)
    assert dispatch.resolve("auto", x) == "reference"


def test_an_explicit_choice_does_not_fall_back_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    teacher, student = sam_features(4, seed=1), in_training(sam_features(4, seed=3))
    loss = InfoSAMLoss(12, impl="triton")
    with pytest.raises(RuntimeError, match=r"impl='triton' must have what Triton needs, got tensors on cpu; use impl="):
        loss(teacher, student)


def tensor_on_a_gpu() -> Tensor:
    """Return a tensor that says so, whatever the machine has."""
    with FakeTensorMode():
        return torch.ones(2, device="cuda:0")


def import_triton_as(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every import of Triton fail with an error."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("triton"):
                raise error

    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


@pytest.mark.parametrize("error", [ImportError("no libtriton"), OSError("bad ELF")], ids=repr)
def test_a_broken_triton_is_named(error, monkeypatch):
    import_triton_as(error, monkeypatch)
    with pytest.raises(
        RuntimeError, match=rf"got a Triton that cannot be imported \({type(error).__name__}: {error}\)"
    ):
        dispatch.resolve("triton", torch.ones(2))
    assert dispatch.resolve("auto", torch.ones(2)) == "reference"
    assert "cannot be imported" in dispatch.implementation(tensor_on_a_gpu()).reason


def test_a_missing_triton_is_named_with_the_way_to_one(monkeypatch):
    import_triton_as(ModuleNotFoundError("No module named 'triton'", name="triton"), monkeypatch)
    with pytest.raises(
        RuntimeError, match=r"got no Triton \(torch's builds for GPUs bring it; .*pip install 'renyi-kd\["
    ):
        dispatch.resolve("triton", torch.ones(2))
    assert dispatch.resolve("auto", torch.ones(2)) == "reference"
    assert "no Triton" in dispatch.implementation(tensor_on_a_gpu()).reason


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.2.0")
    (x,) = on_device(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"got Triton 3\.2\.0 \(the kernels need 3\.6 here\); use impl='auto'"):
        dispatch.resolve("triton", x)


@pytest.mark.parametrize(
    ("capability", "version", "obstacle"),
    [
        ((7, 0), "3.9.0", "a GPU of compute capability 7.0, below 7.5"),
        ((8, 0), "3.6.0", ""),
        ((9, 0), "3.6.0", ""),
        ((10, 0), "3.6.0", "Triton 3.6.0 (the kernels need 3.7 here)"),
        ((12, 0), "3.7.0", ""),
    ],
)
def test_gpus_that_are_not_supported_are_named(capability, version, obstacle, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    assert dispatch.implementation(tensor_on_a_gpu()).reason == obstacle


def test_a_gpu_of_7_5_gets_the_kernels_by_an_explicit_choice_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    by_default = dispatch.implementation(tensor_on_a_gpu())
    assert by_default.name == "reference"
    assert by_default.reason == (
        "a GPU of compute capability 7.5, for which the kernels compile (impl='triton' takes them)"
    )
    assert dispatch.implementation(tensor_on_a_gpu(), impl="triton") == ("triton", "")


@pytest.mark.parametrize(
    ("call", "limit"),
    [
        (lambda ones: relation_scores(ones(1, 4097, 1, 1), ones(1, 1, 4097), impl="triton"), "4097 channels"),
        (
            lambda ones: gram_terms(*[ones(257, 257).double()] * 2, *[ones(257, 2)] * 2, Objective(), impl="triton"),
            "257 samples",
        ),
        (lambda ones: gram_moment([ones(2, 2)] * 5, [LINEAR] * 5, impl="triton"), "5 variables"),
    ],
    ids=["channels", "samples", "variables"],
)
def test_limits_of_the_kernels_are_named(call, limit):
    with pytest.raises(
        RuntimeError, match=rf"got {limit} \(the kernels take at most \d+\); use impl='auto', which takes"
    ):
        call(functools.partial(torch.ones, device=DEVICE))
