"""Gram matrices: closed forms, the unit diagonal, samples without direction, derivatives and refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from renyi_kd import RBF, Linear, Polynomial, feature_entropy, gram_matrix, renyi_entropy
from renyi_kd.gram import unit_diagonal
from tests.support import randn
from tests.support.clusters import FAR, clusters, differences
from tests.support.kernels import value_and_gradients
from tests.support.tolerance import assert_close_on_scale


def laplace(x):
    # The root has no derivative at zero: keep the diagonal out of it.
    squared = (x[..., :, None, :] - x[..., None, :, :]).square().sum(-1)
    same = squared == 0
    return (-squared.masked_fill(same, 1).sqrt().masked_fill(same, 0)).exp()


KERNELS = {
    "linear": {"kernel": "linear"},
    "rbf median": {"kernel": "rbf"},
    "rbf": {"kernel": RBF(0.7)},
    "polynomial": {"kernel": "polynomial"},
    "cubic": {"kernel": Polynomial(3, 0.5)},
    "homogeneous": {"kernel": Polynomial(offset=0)},
    "callable": {"kernel": laplace},
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def matrix(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def column(*values: float) -> torch.Tensor:
    return matrix(values).mT


# Closed forms.


def test_linear_is_the_cosine():
    gram = gram_matrix(matrix((3, 4), (8, 6), (-4, 3)))
    torch.testing.assert_close(gram, matrix((1, 0.96, 0), (0.96, 1, -0.28), (0, -0.28, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [2, 2.0])
def test_rbf_of_a_given_bandwidth(bandwidth):
    gram = gram_matrix(column(0, 1, 3), RBF(bandwidth))
    a, b, c = (math.exp(-squared / 8) for squared in (1, 9, 4))
    torch.testing.assert_close(gram, matrix((1, a, b), (a, 1, c), (b, c, 1)), rtol=1e-12, atol=0)


def test_rbf_of_the_median_bandwidth():
    """Squared distances 1, 9 and 4: the median is 4."""
    torch.testing.assert_close(
        gram_matrix(column(0, 1, 3), "rbf"), gram_matrix(column(0, 1, 3), RBF(2)), rtol=1e-12, atol=0
    )


def test_median_is_the_lower_one_of_an_even_number():
    """Points 0, 1, 3, 7: squared distances 1, 4, 9, 16, 36, 49."""
    x = column(3, 0, 7, 1)
    torch.testing.assert_close(gram_matrix(x, "rbf"), gram_matrix(x, RBF(3)), rtol=1e-12, atol=0)


def test_median_is_taken_per_batch_entry():
    x = torch.stack([column(0, 1, 3), 10 * column(0, 1, 3)])
    gram = gram_matrix(x, "rbf")
    torch.testing.assert_close(gram[0], gram[1], rtol=1e-12, atol=0)


def test_polynomial():
    """(x y + 2)^3 of 1 and 2: 27, 64 and 216."""
    gram = gram_matrix(column(1, 2), Polynomial(degree=3, offset=2))
    expected = 64 / math.sqrt(27 * 216)
    torch.testing.assert_close(gram, matrix((1, expected), (expected, 1)), rtol=1e-12, atol=0)


def test_polynomial_defaults_are_quadratic_with_offset_one():
    x = randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        gram_matrix(x, "polynomial"), gram_matrix(x, Polynomial(degree=2, offset=1.0)), rtol=0, atol=0
    )
    cosines = gram_matrix(x, Polynomial(degree=1, offset=0))
    torch.testing.assert_close(cosines, gram_matrix(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "length"),
    [
        (Polynomial(4), 8e3),
        (Polynomial(6), 8e2),
        (Polynomial(3), 8e4),
        (Polynomial(), 1e10),
        (Polynomial(3, 0.0), 1e-9),
        (Polynomial(2, 0.0), 1e25),
    ],
    ids=str,
)
def test_polynomial_of_long_and_short_samples(kernel, length):
    """A power of lengths that fp32 has may lie beyond its range, and the gradient of its root sooner."""
    x = length * randn(5, 4)
    for function in (lambda x: gram_matrix(x, kernel), lambda x: feature_entropy(x, kernel=kernel)):
        actual, expected = (value_and_gradients(function, x.to(dtype)) for dtype in (torch.float32, torch.float64))
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        assert_close_on_scale(actual[1], expected[1], name="gradient", rtol=1e-5)


def test_callable_is_normalised():
    gram = gram_matrix(column(1, 2, 4), lambda x: 5 + x @ x.mT)
    expected = 7 / math.sqrt(54)
    torch.testing.assert_close(gram[:2, :2], matrix((1, expected), (expected, 1)), rtol=1e-12, atol=0)


def test_callable_gets_fp32_of_half_precision():
    seen = []
    gram_matrix(torch.ones(2, 3, dtype=torch.float16), lambda x: (seen.append(x.dtype), x @ x.mT)[1])
    assert seen == [torch.float32]


# Laws of every kernel.

FEATURES = st.builds(
    lambda n, d, seed, scale, repeats: scale * randn(n, d, seed=seed, dtype=torch.float64)[[0] * repeats + [*range(n)]],
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-2, 1.0, 1e2]),
    st.integers(0, 3),
)


@pytest.mark.parametrize("name", KERNELS)
@given(features=FEATURES)
def test_unit_diagonal_symmetric_and_positive_semidefinite(name, features):
    gram = gram_matrix(features, **KERNELS[name])
    assert torch.equal(gram.diagonal(), torch.ones_like(gram.diagonal()))
    torch.testing.assert_close(gram, gram.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(gram).min() > -1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_diagonal_is_exactly_one_in_every_dtype(kernel, dtype):
    gram = gram_matrix(randn(33, 7, dtype=dtype), **kernel)
    assert torch.equal(gram.diagonal(), torch.ones_like(gram.diagonal()))
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(features=FEATURES, scale=st.floats(1e-3, 1e3))
def test_linear_is_invariant_to_the_scale_of_each_sample(features, scale):
    scales = torch.linspace(1, scale, len(features), dtype=torch.float64)[:, None]
    torch.testing.assert_close(gram_matrix(features * scales), gram_matrix(features), rtol=0, atol=1e-12)


@given(features=FEATURES, shift=st.floats(-10, 10), scale=st.floats(1e-3, 1e3))
def test_median_rbf_is_invariant_to_scale_and_translation(features, shift, scale):
    moved = (features + shift * features.abs().max()) * scale
    # Distances of exactly zero may become rounding; the median bandwidth makes that visible only where all are zero.
    if features.unique(dim=0).shape[0] == len(features):
        torch.testing.assert_close(gram_matrix(moved, "rbf"), gram_matrix(features, "rbf"), rtol=0, atol=1e-6)


def test_rbf_far_from_the_origin_keeps_its_distances():
    x = randn(5, 3)
    x = (x * 64).round() / 64
    near, far = gram_matrix(x, RBF(1.0)), gram_matrix(x + 1024, RBF(1.0))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("apart", "dtype", "tight"), FAR.values(), ids=FAR)
def test_rbf_of_tight_clusters_far_apart(apart, dtype, tight):
    """``|x|^2 + |y|^2 - 2 x . y`` in the dtype of the features leaves rounding alone of a distance within a cluster."""
    x = clusters(apart, dtype, tight).requires_grad_()
    if apart < 1 and dtype == torch.float32:
        x = (x.detach() + 100).requires_grad_()
    gram = gram_matrix(x, RBF(tight))
    exact = x.detach().double().requires_grad_()
    expected = (-differences(exact) / (2 * tight**2)).exp()
    torch.testing.assert_close(gram.double(), expected, rtol=0, atol=1e-6)
    assert renyi_entropy(gram).item() == pytest.approx(renyi_entropy(expected).item(), abs=1e-6)
    weights = randn(8, 8, seed=1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((gram * weights).sum(), x)
    (target,) = torch.autograd.grad((expected * weights).sum(), exact)
    error = (gradient.double() - target).abs().max() / target.abs().max()
    assert error < max(4 * torch.finfo(dtype).eps, 1e-6)


def test_rbf_of_the_median_of_a_tight_cluster_beside_a_far_sample():
    x = clusters(0, torch.float32)
    x[7] = 1e5
    squared = differences(x)
    median = squared[torch.ones(8, 8).triu(1).bool()].median()
    expected = (-squared / (2 * median)).exp()
    torch.testing.assert_close(gram_matrix(x, "rbf").double(), expected, rtol=0, atol=1e-6)


def test_leading_dimensions_are_a_batch(kernel):
    features = randn(3, 2, 5, 4, dtype=torch.float64)
    gram = gram_matrix(features, **kernel)
    assert gram.shape == (3, 2, 5, 5)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(gram[i, j], gram_matrix(features[i, j], **kernel), rtol=1e-10, atol=1e-12)


def test_autocast_changes_nothing(kernel):
    features = randn(5, 6)
    expected = gram_matrix(features, **kernel)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_matrix(features, **kernel), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32(kernel, dtype):
    features = randn(5, 6, dtype=dtype)
    torch.testing.assert_close(gram_matrix(features, **kernel), gram_matrix(features.float(), **kernel), rtol=0, atol=0)


def test_large_half_precision_does_not_overflow():
    gram = gram_matrix(torch.tensor([[60000.0, 0], [60000, 60000]], dtype=torch.float16))
    assert gram[0, 1].item() == pytest.approx(math.sqrt(0.5), rel=1e-6)


# Samples without direction, duplicates, single samples, NaN.


def test_zero_sample_is_orthogonal_to_all_and_has_no_gradient():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [0.0, 0.0]]).double().requires_grad_()
    gram = gram_matrix(x)
    expected = torch.eye(4).double()
    expected[1, 2] = expected[2, 1] = 0.8
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((gram * randn(4, 4, dtype=torch.float64)).sum(), x)
    assert torch.equal(gradient[[0, 3]], torch.zeros(2, 2).double())
    assert gradient.isfinite().all()
    assert (gradient[[1, 2]] != 0).any()


def test_zero_sample_of_a_raw_gram_has_no_gradient():
    raw = torch.tensor([[0.0, 0.0], [0.0, 4.0]]).double().requires_grad_()
    gram = unit_diagonal(raw)
    assert torch.equal(gram, torch.eye(2).double())
    (gradient,) = torch.autograd.grad((gram * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum(), raw)
    assert torch.equal(gradient, torch.zeros(2, 2).double())


@pytest.mark.parametrize("name", ["rbf median", "rbf", "polynomial", "callable"])
def test_zero_sample_is_a_point_like_any_other_for_other_kernels(name):
    gram = gram_matrix(torch.tensor([[0.0, 0.0], [0.1, 0.2], [0.2, 0.1]]).double(), **KERNELS[name])
    assert (gram[0, 1:] > 0.1).all()


def test_single_sample(kernel):
    x = randn(1, 4, dtype=torch.float64).requires_grad_()
    gram = gram_matrix(x, **kernel)
    assert torch.equal(gram, torch.ones(1, 1).double())
    (gradient,) = torch.autograd.grad(gram.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 1, 4)])
@pytest.mark.parametrize("kernel", ["linear", "rbf", "polynomial"])
def test_batches_of_nothing_and_of_single_samples(kernel, shape):
    assert gram_matrix(torch.randn(shape), kernel).equal(torch.ones(*shape[:-1], shape[-2]))


def test_kernels_are_values():
    for kernel, other in ((RBF(2.0), RBF(3.0)), (Polynomial(3), Polynomial(3, 2.0)), (Linear(), RBF())):
        assert {kernel: 1}[dataclasses.replace(kernel)] == 1
        assert kernel != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        RBF().bandwidth = -1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        Polynomial().degree = 0


def test_duplicates_are_alike_and_have_finite_gradients(kernel):
    x = randn(1, 4, dtype=torch.float64).expand(5, 4).clone().requires_grad_()
    gram = gram_matrix(x, **kernel)
    torch.testing.assert_close(gram, torch.ones(5, 5).double(), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((gram * randn(5, 5, dtype=torch.float64)).sum(), x)
    assert gradient.isfinite().all()


def test_median_of_zero_counts_as_bandwidth_one():
    """Four alike and one apart: six of the ten distances are zero."""
    x = column(0, 0, 0, 0, 1.5)
    torch.testing.assert_close(gram_matrix(x, "rbf"), gram_matrix(x, RBF(1.0)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate(kernel, bad):
    x = randn(4, 3, dtype=torch.float64)
    x[2, 1] = bad
    x[0] = 0
    gram = gram_matrix(x, **kernel)
    others = [0, 1, 3]
    if bad == bad and kernel["kernel"] is laplace:
        # At infinite distance this kernel is 0, with itself (inf - inf) NaN.
        assert gram[2, 2].isnan()
        return
    assert gram[2].isnan().all()
    assert gram[:, 2].isnan().all()
    if kernel["kernel"] == "linear" or isinstance(kernel["kernel"], Polynomial):
        assert gram[others][:, others].isfinite().all()


# Derivatives.


def test_gradient_is_the_derivative(kernel):
    x = randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: gram_matrix(v, **kernel), (x,))


def test_second_derivative(kernel):
    x = randn(3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: gram_matrix(v, **kernel), (x,))


# Refusals.


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_features_must_be_floating_point(dtype):
    with pytest.raises(TypeError, match=rf"gram_matrix: features must be a floating-point tensor, got {dtype}; conv"):
        gram_matrix(torch.ones(3, 2).to(dtype))


def test_features_must_be_a_tensor():
    with pytest.raises(TypeError, match="gram_matrix: features must be a floating-point tensor, got list; convert"):
        gram_matrix([[1.0, 2.0]])


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (3, 0), (2, 0, 3)])
def test_features_must_have_samples_and_channels(shape):
    fact = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ValueError, match=rf"features must have shape \[..., n, d\] with n, d >= 1, got {fact}; flatten"
    ):
        gram_matrix(torch.ones(shape))


@pytest.mark.parametrize("kernel", ["gaussian", "", None, 3])
def test_kernel_must_be_known(kernel):
    with pytest.raises(
        ValueError, match=r"kernel must be 'linear', 'rbf' or 'polynomial', or one of .*, got .*; pass a"
    ):
        gram_matrix(torch.ones(3, 2), kernel)


def test_callable_must_return_a_gram():
    with pytest.raises(
        ValueError, match=r"gram_matrix: kernel must return shape \(3, 3\), got \(3,\); it is called with"
    ):
        gram_matrix(torch.ones(3, 2), lambda x: x.sum(-1))
    with pytest.raises(ValueError, match=r"gram_matrix: kernel must return shape \(5, 3, 3\), got \(3, 3\)"):
        gram_matrix(torch.ones(5, 3, 2), lambda x: x[0] @ x[0].mT)


@pytest.mark.parametrize("bandwidth", [0, 0.0, -1.0, math.nan, "mean", None])
def test_bandwidth_must_be_positive(bandwidth):
    with pytest.raises(ValueError, match=r"RBF: bandwidth must be above 0 or 'median', got .*; 'median' takes"):
        RBF(bandwidth)


@pytest.mark.parametrize(("degree", "offset"), [(0, 1.0), (-2, 1.0), (2, -0.5), (2.5, 1.0), (True, 1.0), (2, math.nan)])
def test_polynomial_must_be_positive_semidefinite(degree, offset):
    rule = "degree must be a whole number of at least 1 and offset at least 0"
    with pytest.raises(ValueError, match=rf"Polynomial: {rule}, got {degree} and {offset}"):
        Polynomial(degree, offset)
