"""Entropies straight from features: closed forms, the Gram matrices' values, gradients, memory, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from renyi_kd import (
    RBF,
    Linear,
    Polynomial,
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    joint_entropy,
    mutual_information,
)
from renyi_kd.feature_entropy import median_distance
from renyi_kd.ops.gram_moment import gram_moment, reference
from tests.support import randn
from tests.support.clusters import FAR, clusters, differences
from tests.support.kernels import value_and_gradients
from tests.support.memory import LargestNewTensor
from tests.support.tolerance import assert_close_on_scale

NARROW, CUBIC = RBF(1.5), Polynomial(3, 0.5)
KERNELS = [
    [Linear()],
    [NARROW],
    [CUBIC],
    [NARROW, Linear()],
    [Linear(), Linear(), Linear()],
    [CUBIC, NARROW, Linear()],
    [Linear(), NARROW, CUBIC, NARROW],
]


@pytest.fixture(params=["one block", "ragged blocks"])
def blocks(request, monkeypatch):
    if request.param == "ragged blocks":
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 100)


def variables(n_samples: int, n_variables: int, dtype=torch.float64) -> list[Tensor]:
    """Return features with a shared mean, of which two samples are alike and one is zero."""
    features = [0.4 + randn(n_samples, 5 + 3 * k, seed=k, dtype=dtype) for k in range(n_variables)]
    if n_samples > 4:
        features[0][1] = features[0][0]
        features[0][3] = 0
    return features


def from_grams(*features: Tensor, kernel: list) -> Tensor:
    return joint_entropy(*[gram_matrix(x, name) for x, name in zip(features, kernel, strict=True)])


# Closed forms and laws.


@pytest.mark.parametrize("n", [1, 2, 7])
def test_orthogonal_and_equal_samples(n, blocks):
    assert feature_entropy(torch.eye(n)).item() == pytest.approx(math.log2(n))
    assert feature_entropy(torch.ones(n, 3)).item() == pytest.approx(0, abs=1e-6)
    assert feature_mutual_information(torch.eye(n), torch.eye(n)).item() == pytest.approx(math.log2(n))


def test_equal_clusters(blocks):
    assert feature_entropy(torch.eye(4).repeat_interleave(5, 0)).item() == pytest.approx(2)


def test_the_moment_counts_pairs():
    assert gram_moment([torch.eye(5)], [Linear()]).item() == 5
    assert gram_moment([torch.ones(5, 2)], [Linear()]).item() == pytest.approx(25)


@given(st.integers(2, 12), st.sampled_from(KERNELS), st.integers(0, 2**31))
def test_joint_is_not_below_any_variable_and_within_bounds(n, kernel, seed):
    features = [randn(n, 4, seed=seed + k, dtype=torch.float64) for k in range(len(kernel))]
    joint = feature_entropy(*features, kernel=kernel).item()
    for x, name in zip(features, kernel, strict=True):
        assert -1e-12 <= feature_entropy(x, kernel=name).item() <= joint + 1e-12
    assert joint <= math.log2(n) + 1e-12


# The same as the Gram matrices.


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_value_and_gradients_are_those_of_the_grams(kernel, blocks):
    for n in (2, 9, 31):
        features = variables(n, len(kernel))
        actual = value_and_gradients(feature_entropy, *features, kernel=kernel)
        expected = value_and_gradients(from_grams, *features, kernel=kernel)
        scale = max(gradient.abs().max().item() for gradient in expected[1:])
        assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-12), n
        for index, (a, e) in enumerate(zip(actual[1:], expected[1:], strict=True)):
            assert_close_on_scale(a, e, name=f"gradient of variable {index}, n = {n}", rtol=1e-11, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_summed_in_fp32(dtype, blocks):
    features = variables(31, 2, dtype)
    actual = value_and_gradients(feature_entropy, *features, kernel=[NARROW, "linear"])
    exact = value_and_gradients(from_grams, *[x.double() for x in features], kernel=[NARROW, "linear"])
    assert actual[0].dtype == torch.float32
    assert actual[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
    for name, a, e in zip("ab", actual[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        assert_close_on_scale(a, e, name=name, rtol=2 * torch.finfo(dtype).eps + 2e-6)


def test_far_from_the_origin_rbf_keeps_its_digits(blocks):
    x = randn(20, 6, dtype=torch.float64)
    near, far = (feature_entropy((x + shift).float(), kernel=RBF(2.0)) for shift in (0, 100))
    assert far.item() == pytest.approx(near.item(), rel=1e-4)


@pytest.mark.parametrize(("apart", "dtype", "tight"), FAR.values(), ids=FAR)
def test_rbf_of_tight_clusters_far_apart(apart, dtype, tight, blocks):
    x, other = clusters(apart, dtype, tight), randn(8, 4, seed=7, dtype=dtype)
    for kernel, features in (([RBF(tight)], [x]), ([RBF(tight), Linear()], [x, other])):
        actual = value_and_gradients(feature_entropy, *features, kernel=kernel)

        def textbook(x, *others):
            gram = (-differences(x) / (2 * tight**2)).exp()
            return joint_entropy(gram, *map(gram_matrix, others))

        expected = value_and_gradients(textbook, *[f.double() for f in features])
        assert actual[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
        for a, e in zip(actual[1:], expected[1:], strict=True):
            assert_close_on_scale(a, e, name="gradient", rtol=max(4 * torch.finfo(dtype).eps, 1e-5))


@pytest.mark.parametrize("kernel", ["linear", "rbf", "polynomial", RBF(1.0)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_nan(kernel, bad):
    x = randn(9, 4)
    x[3, 1] = bad
    value, gradient = value_and_gradients(feature_entropy, x, kernel=kernel)
    assert value.isnan()
    assert gradient.isnan().any()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_gradient_is_the_derivative(kernel, blocks):
    features = [x.requires_grad_() for x in variables(6, len(kernel))]
    features[0] = (features[0] + randn(6, 5, seed=9, dtype=torch.float64)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: feature_entropy(*x, kernel=kernel), features)


def test_gradient_only_where_it_is_needed():
    a, b = variables(9, 2)
    both = value_and_gradients(feature_entropy, a, b)
    leaf = b.clone().requires_grad_()
    value = feature_entropy(a, leaf)
    assert torch.equal(torch.autograd.grad(value, leaf, randn(seed=99, dtype=value.dtype))[0], both[2])


def test_mutual_information_is_that_of_the_grams():
    a, b = variables(12, 2)
    expected = mutual_information(gram_matrix(a, NARROW), gram_matrix(b))
    actual = feature_mutual_information(a, b, kernel=[NARROW, "linear"])
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)


def test_median_bandwidth_is_that_of_the_gram_matrix():
    (x,) = variables(30, 1)
    assert feature_entropy(x, kernel="rbf").item() == pytest.approx(from_median(x), rel=1e-12)
    assert median_distance(torch.ones(4, 2)) == 1
    assert median_distance(torch.ones(1, 2)) == 1
    # Of many samples a part, in order: the first of every three.
    many = randn(3 * 2048, 3)
    assert median_distance(many) == median_distance(many[::3].contiguous())


def from_median(x: Tensor) -> float:
    return joint_entropy(gram_matrix(x, "rbf")).item()


def test_second_derivative_is_refused():
    (x,) = variables(6, 1)
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"request for a second derivative; use renyi_entropy\(gram_matrix"):
        torch.autograd.grad(feature_entropy(x), x, create_graph=True)


# Memory.


def test_no_matrix_of_all_pairs_is_made():
    """16,000 samples: a Gram takes 1 GB."""
    a, b = randn(16000, 2).requires_grad_(), randn(16000, 3).requires_grad_()
    with LargestNewTensor() as largest:
        torch.autograd.grad(feature_entropy(a, b), [a, b])
    assert largest.bytes <= 4 * reference.BLOCK_ELEMENTS


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((), {}, ValueError, r"features must hold at least one variable, got none; pass one tensor"),
        (([[1.0]],), {}, TypeError, r"features\[0\] must be a floating-point tensor, got list; convert with"),
        ((torch.ones(2, 2).int(),), {}, TypeError, r"features\[0\] must be a floating-point tensor, got torch.int32;"),
        ((torch.ones(2, 2), torch.ones(2)), {}, ValueError, r"features\[1\] must have shape \[n, d\] .* got \(2,\);"),
        ((torch.ones(0, 2),), {}, ValueError, r"features\[0\] must have shape \[n, d\] with n, d >= 1, got \(0, 2\);"),
        (
            (torch.ones(2, 2), torch.ones(3, 2)), {}, ValueError,
            r"features must share samples and device, got 3 on cpu beside 2 on cpu; pass every variable",
        ),
        (
            (torch.ones(2, 2),), {"kernel": ["linear", "rbf"]}, ValueError,
            r"kernel must be one or one per variable, got 2 for 1 variables; give as many",
        ),
        ((torch.ones(2, 2),), {"kernel": "cosine"}, ValueError, r"must be 'linear', .* got 'cosine'; for any other"),
        ((torch.ones(2, 2),), {"kernel": torch.exp}, ValueError, r"must be 'linear', .*; for any other kernel use"),
        ((torch.ones(2, 2),), {"impl": "cuda"}, ValueError, r"impl must be one of .* got 'cuda'; 'auto' is always"),
    ],
)  # fmt: skip
def test_refusals(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        feature_entropy(*arguments, **keywords)
    if len(arguments) == 2 and keywords == {}:
        with pytest.raises(error, match=f"feature_mutual_information: {message}"):
            feature_mutual_information(*arguments)


def test_mutual_information_names_itself():
    with pytest.raises(
        TypeError, match=r"feature_mutual_information: features\[1\] must be a floating-point tensor, got NoneType"
    ):
        feature_mutual_information(torch.ones(2, 2), None)
