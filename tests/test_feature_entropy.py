"""Entropies straight from features: closed forms, the Gram matrices' values, gradients, memory, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from renyi_kd import gram_matrix, joint_entropy, mutual_information, mutual_information_of, renyi_entropy_of
from renyi_kd.feature_entropy import median_distance
from renyi_kd.ops.gram_moment import SampleKernel, gram_moment, reference
from tests.support import randn
from tests.support.tolerance import assert_close_on_scale
from tests.test_kernels import LargestNewTensor

KERNELS = [
    ["linear"],
    ["rbf"],
    ["polynomial"],
    ["rbf", "linear"],
    ["linear", "linear", "linear"],
    ["polynomial", "rbf", "linear"],
    ["linear", "rbf", "polynomial", "rbf"],
]
OPTIONS = {"bandwidth": 1.5, "degree": 3, "offset": 0.5}


@pytest.fixture(params=["one block", "ragged blocks"])
def blocks(request, monkeypatch):
    if request.param == "ragged blocks":
        monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 100)


def variables(n_samples: int, n_variables: int, dtype=torch.float64) -> list[Tensor]:
    """Return features with a shared mean, of which two samples are alike and one is zero."""
    features = [0.4 + randn(n_samples, 5 + 3 * k, seed=k, dtype=dtype) for k in range(n_variables)]
    if n_samples > 4:
        features[0][1] = features[0][0]
        features[0][3] = 0
    return features


def from_grams(*features: Tensor, kernel: list[str]) -> Tensor:
    return joint_entropy(*[gram_matrix(x, name, **OPTIONS) for x, name in zip(features, kernel, strict=True)])


def value_and_gradients(function, features: list[Tensor], **keywords) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in features]
    value = function(*leaves, **keywords)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, -1.7))]


# Closed forms and laws.


@pytest.mark.parametrize("n", [1, 2, 7])
def test_orthogonal_and_equal_samples(n, blocks):
    assert renyi_entropy_of(torch.eye(n)).item() == pytest.approx(math.log2(n))
    assert renyi_entropy_of(torch.ones(n, 3)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information_of(torch.eye(n), torch.eye(n)).item() == pytest.approx(math.log2(n))


def test_equal_clusters(blocks):
    assert renyi_entropy_of(torch.eye(4).repeat_interleave(5, 0)).item() == pytest.approx(2)


def test_the_moment_counts_pairs():
    assert gram_moment([torch.eye(5)], [SampleKernel("linear")]).item() == 5
    assert gram_moment([torch.ones(5, 2)], [SampleKernel("linear")]).item() == pytest.approx(25)


@given(st.integers(2, 12), st.sampled_from(KERNELS), st.integers(0, 2**31))
def test_joint_is_not_below_any_variable_and_within_bounds(n, kernel, seed):
    features = [randn(n, 4, seed=seed + k, dtype=torch.float64) for k in range(len(kernel))]
    joint = renyi_entropy_of(*features, kernel=kernel, **OPTIONS).item()
    for x, name in zip(features, kernel, strict=True):
        assert -1e-12 <= renyi_entropy_of(x, kernel=name, **OPTIONS).item() <= joint + 1e-12
    assert joint <= math.log2(n) + 1e-12


# The same as the Gram matrices.


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("n", [2, 9, 31])
def test_value_and_gradients_are_those_of_the_grams(kernel, n, blocks):
    features = variables(n, len(kernel))
    actual = value_and_gradients(renyi_entropy_of, features, kernel=kernel, **OPTIONS)
    expected = value_and_gradients(from_grams, features, kernel=kernel)
    scale = max(gradient.abs().max().item() for gradient in expected[1:])
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-12)
    for name, a, e in zip(range(len(kernel)), actual[1:], expected[1:], strict=True):
        assert_close_on_scale(a, e, name=str(name), rtol=1e-11, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_summed_in_fp32(dtype, blocks):
    features = variables(31, 2, dtype)
    actual = value_and_gradients(renyi_entropy_of, features, kernel=["rbf", "linear"], **OPTIONS)
    exact = value_and_gradients(from_grams, [x.double() for x in features], kernel=["rbf", "linear"])
    assert actual[0].dtype == torch.float32
    assert actual[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
    for name, a, e in zip("ab", actual[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        assert_close_on_scale(a, e, name=name, rtol=2 * torch.finfo(dtype).eps + 2e-6)


def test_far_from_the_origin_rbf_keeps_its_digits(blocks):
    x = randn(20, 6, dtype=torch.float64)
    near, far = (renyi_entropy_of((x + shift).float(), kernel="rbf", bandwidth=2.0) for shift in (0, 100))
    assert far.item() == pytest.approx(near.item(), rel=1e-4)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_gradient_is_the_derivative(kernel, blocks):
    features = [x.requires_grad_() for x in variables(6, len(kernel))]
    features[0] = (features[0] + randn(6, 5, seed=9, dtype=torch.float64)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: renyi_entropy_of(*x, kernel=kernel, **OPTIONS), features)


def test_gradient_only_where_it_is_needed():
    a, b = variables(9, 2)
    both = value_and_gradients(renyi_entropy_of, [a, b])
    leaf = b.clone().requires_grad_()
    value = renyi_entropy_of(a, leaf)
    assert torch.equal(torch.autograd.grad(value, leaf, torch.full_like(value, -1.7))[0], both[2])


def test_mutual_information_is_that_of_the_grams():
    a, b = variables(12, 2)
    expected = mutual_information(gram_matrix(a, "rbf", bandwidth=1.5), gram_matrix(b))
    actual = mutual_information_of(a, b, kernel=["rbf", "linear"], bandwidth=1.5)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)


def test_median_bandwidth_is_that_of_the_gram_matrix():
    (x,) = variables(30, 1)
    assert renyi_entropy_of(x, kernel="rbf").item() == pytest.approx(from_median(x), rel=1e-12)
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
        torch.autograd.grad(renyi_entropy_of(x), x, create_graph=True)


# Memory.


def test_no_matrix_of_all_pairs_is_made():
    """16,000 samples: a Gram takes 1 GB."""
    a, b = randn(16000, 2).requires_grad_(), randn(16000, 3).requires_grad_()
    with LargestNewTensor() as largest:
        torch.autograd.grad(renyi_entropy_of(a, b), [a, b])
    assert largest.bytes <= 4 * reference._BLOCK_ELEMENTS


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
            r"kernel must be one name or one per variable, got 2 for 1 variables; give as many",
        ),
        ((torch.ones(2, 2),), {"kernel": "cosine"}, ValueError, r"must be 'linear', .* got 'cosine'; for any other"),
        ((torch.ones(2, 2),), {"kernel": "rbf", "bandwidth": 0}, ValueError, r"bandwidth must be above 0 .* got 0;"),
        ((torch.ones(2, 2),), {"kernel": "rbf", "bandwidth": "mean"}, ValueError, r"bandwidth .* got 'mean'; 'median'"),
        ((torch.ones(2, 2),), {"kernel": "polynomial", "degree": 0}, ValueError, r"degree must be .* got 0 and 1.0;"),
        ((torch.ones(2, 2),), {"kernel": "polynomial", "offset": -1}, ValueError, r"offset at least 0, got 2 and -1;"),
        ((torch.ones(2, 2),), {"impl": "cuda"}, ValueError, r"impl must be one of .* got 'cuda'; 'auto' is always"),
    ],
)  # fmt: skip
def test_refusals(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        renyi_entropy_of(*arguments, **keywords)


def test_mutual_information_names_itself():
    with pytest.raises(
        TypeError, match=r"mutual_information_of: features\[1\] must be a floating-point tensor, got NoneType"
    ):
        mutual_information_of(torch.ones(2, 2), None)
