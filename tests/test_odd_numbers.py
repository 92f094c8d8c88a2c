"""Entropies of numbers of any dtype, layout and magnitude: those of the formula in fp64, or a refusal that says why."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from renyi_kd import (
    RBF,
    SAMFeatures,
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    infosam_terms,
    joint_entropy,
    mutual_information,
    renyi_entropy,
)
from renyi_kd.magnitude import near_one
from tests.support import in_training, randn, relation_module, sam_features

X = randn(5, 3, dtype=torch.float64)
ENTROPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "renyi_entropy": renyi_entropy,
    "joint_entropy": lambda gram: joint_entropy(gram, gram),
    "mutual_information": lambda gram: mutual_information(gram, gram),
}
OF_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "gram_matrix": gram_matrix,
    "feature_entropy": feature_entropy,
    "feature_mutual_information": lambda x: feature_mutual_information(x, x),
}


def cosines(x: Tensor) -> Tensor:
    """Return the Gram matrix of directions, in fp64 and from rows that were brought to one length first."""
    rows = x.double() / x.double().abs().amax(-1, keepdim=True)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows @ rows.mT


def gaussians(x: Tensor) -> Tensor:
    """Return the Gram matrix of an RBF kernel of the median bandwidth, likewise."""
    x = x.double() / x.double().abs().max()
    squared = (x[:, None] - x).square().sum(-1)
    return (-squared / (2 * squared[torch.ones_like(squared).triu(1).bool()].median())).exp()


def entropy(gram: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the entropy by the formula, in fp64."""
    gram = gram.double() + gram.double().mT
    values = torch.linalg.eigvalsh(gram / gram.trace())
    values = values[values > 1e-12]
    if alpha == 1:
        return -(values * values.log2()).sum()
    if alpha == math.inf:
        return -values.max().log2()
    return torch.logsumexp(alpha * values.log(), 0) / math.log(2) / (1 - alpha)


# magnitudes


@pytest.mark.parametrize("exponent", [-320, -310, -200, -100, 100, 200, 300, 307])
def test_the_scale_of_a_gram_does_not_matter(exponent):
    gram = torch.eye(4, dtype=torch.float64) * 10.0**exponent
    for alpha in (0.5, 1.0, 2.0, 3.0, math.inf):
        assert renyi_entropy(gram, alpha).item() == pytest.approx(2)
        assert joint_entropy(gram, gram, gram, alpha=alpha).item() == pytest.approx(2)
        assert mutual_information(gram, gram, alpha=alpha).item() == pytest.approx(2)


SCALES = [(torch.float32, e) for e in (-44, -38, -30, -20, 15, 25, 38)] + [
    (torch.bfloat16, e) for e in (-40, -30, 25, 38)
]
SCALES += [(torch.float64, e) for e in (-310, -200, -160, 150, 200, 307)]


@pytest.mark.parametrize(("dtype", "exponent"), SCALES)
def test_the_length_of_samples_does_not_matter_to_their_directions(dtype, exponent):
    x = (X * 10.0**exponent).to(dtype)
    assert x.isfinite().all()
    expected = cosines(x)
    digits = 1e-5 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(gram_matrix(x).double(), expected, rtol=0, atol=digits)
    assert feature_entropy(x).item() == pytest.approx(entropy(expected).item(), abs=digits)
    assert feature_mutual_information(x, x).item() == pytest.approx(
        (2 * entropy(expected) - entropy(expected.square())).item(), abs=2 * digits
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_may_have_a_length_of_its_own(dtype):
    lengths = torch.tensor([1e-37, 1e37, 1.0, 1e-20, 1e20], dtype=torch.float64)
    x = (X * lengths[:, None]).to(dtype)
    expected = cosines(X.to(dtype))
    torch.testing.assert_close(gram_matrix(x).double(), expected, rtol=0, atol=1e-5)
    assert feature_entropy(x).item() == pytest.approx(entropy(expected).item(), abs=1e-5)


@pytest.mark.parametrize(("dtype", "exponent"), SCALES)
def test_the_scale_of_samples_does_not_matter_to_the_median_bandwidth(dtype, exponent):
    x = (X * 10.0**exponent).to(dtype)
    expected = gaussians(x)
    digits = 1e-4 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(gram_matrix(x, "rbf").double(), expected, rtol=0, atol=digits)
    if abs(exponent) < 150:
        assert feature_entropy(x, kernel="rbf").item() == pytest.approx(entropy(expected).item(), abs=digits)
    else:
        with pytest.raises(ValueError, match=r"RBF: bandwidth must be above 0 .*, got .* between 1e-150 and 1e150"):
            feature_entropy(x, kernel="rbf")


def test_gradients_of_huge_and_tiny_samples_are_those_of_the_formula():
    for exponent in (-160, -30, 30, 150):
        x = (X * 10.0**exponent).requires_grad_()
        plain = X.clone().requires_grad_()
        for function in (feature_entropy, lambda x: renyi_entropy(gram_matrix(x))):
            (scaled,) = torch.autograd.grad(function(x), x)
            (expected,) = torch.autograd.grad(function(plain), plain)
            torch.testing.assert_close(scaled * 10.0**exponent, expected)


def test_numbers_of_an_ordinary_magnitude_are_not_touched():
    for scale in (1e-12, 1.0, 1e12):
        x = X * scale
        assert torch.equal(gram_matrix(x, lambda x: x @ x.mT), gram_matrix(x))


@pytest.mark.parametrize(
    "bandwidth",
    [1e-300, 1e-150, 1e150, 1e300, math.inf, 10**400, -1.0, 0, math.nan, None],
    ids=lambda value: repr(value)[:9],
)
def test_a_bandwidth_whose_square_is_no_number_is_refused(bandwidth):
    with pytest.raises(
        ValueError, match=r"RBF: bandwidth must be above 0 or 'median', got .* between 1e-150 and 1e150"
    ):
        RBF(bandwidth)


@pytest.mark.parametrize("bandwidth", [1e-149, 1e-30, 1e-3, 1e3, 1e30, 1e149])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_other_bandwidth_is_that_of_the_formula(bandwidth, dtype):
    x = X.to(dtype)
    distances = (x.double()[:, None] - x.double()).norm(dim=-1) / bandwidth
    expected = (-distances.clamp_max(1e10).square() / 2).exp()
    torch.testing.assert_close(gram_matrix(x, RBF(bandwidth)).double(), expected, rtol=0, atol=1e-6)
    found = feature_entropy(x, kernel=RBF(bandwidth)).item()
    assert found == pytest.approx(entropy(expected).item(), abs=1e-6)


# orders


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-8, 0.5, 1, 2 + 1e-9, 3, 100, 10**6, 2**62, 1e300, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_every_order_is_that_of_the_formula(alpha, dtype):
    gram = (X @ X.mT).to(dtype)
    assert renyi_entropy(gram, alpha).item() == pytest.approx(
        entropy(gram, float(alpha)).item(), abs=2e-3 if dtype == torch.float16 else 1e-6
    )


@pytest.mark.parametrize(
    "alpha",
    [0, -1, -math.inf, math.nan, "2", None, 2 + 0j, torch.tensor(2.0), 2**63, 10**400, [2]],
    ids=lambda value: repr(value)[:9],
)
def test_what_is_no_order_is_refused(alpha):
    with pytest.raises(ValueError, match=r"renyi_entropy: alpha must be a number above 0, got .*; 2 is the order"):
        renyi_entropy(torch.eye(3), alpha)


# dtypes and layouts

NO_NUMBERS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "fp8": (lambda x: x.to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
    "the other fp8": (lambda x: x.to(torch.float8_e5m2), r"torch\.float8_e5m2"),
    "sparse": (Tensor.to_sparse, r"one in torch\.sparse_coo, which \.to_dense\(\) changes"),
    "rows of sparse": (Tensor.to_sparse_csr, r"one in torch\.sparse_csr, which"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), "one in"),
    "an array": (lambda x: x.numpy(), "ndarray"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize(("change", "fact"), NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("name", [*ENTROPIES, *OF_FEATURES])
def test_what_there_is_no_arithmetic_of_is_refused(name, change, fact):
    value = change(torch.eye(3) + 1)
    with pytest.raises(TypeError, match=rf"{name}: .* must be a floating-point tensor, got {fact}.*; convert"):
        {**ENTROPIES, **OF_FEATURES}[name](value)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x * math.nan], -1)[..., 0],
    "a negative view": lambda x: torch.complex(x, -x).conj().imag,
    "a part of complex": lambda x: torch.complex(x, x).real,
    "flipped": lambda x: x.flip(0).flip(0),
    "a subclass": lambda x: x.as_subclass(type("Own", (Tensor,), {})),
    "a leaf": lambda x: x.clone().requires_grad_(),
    "a batch": lambda x: x[None].expand(3, *x.shape)[1],
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_changes_nothing(change):
    gram = X @ X.mT
    for function in ENTROPIES.values():
        torch.testing.assert_close(function(change(gram)).detach().as_subclass(Tensor), function(gram))
    for function in OF_FEATURES.values():
        torch.testing.assert_close(function(change(X)).detach().as_subclass(Tensor), function(X))


def test_rows_that_lie_in_one_place_are_one_sample():
    same = X[:1].expand(5, 3)
    torch.testing.assert_close(gram_matrix(same), torch.ones(5, 5, dtype=torch.float64))
    assert feature_entropy(same).item() == pytest.approx(0, abs=1e-12)


def test_a_batch_of_none_has_no_entropies():
    assert renyi_entropy(torch.zeros(0, 3, 3)).shape == renyi_entropy(torch.zeros(2, 0, 3, 3), 1.0).shape[1:] == (0,)
    assert gram_matrix(torch.zeros(0, 3, 2)).shape == (0, 3, 3)
    assert gram_matrix(torch.zeros(0, 3, 2), "rbf").shape == (0, 3, 3)


@pytest.mark.parametrize("member", ["image_features", "mask_tokens"])
@pytest.mark.parametrize("change", [lambda x: x.to(torch.float8_e4m3fn), Tensor.to_sparse], ids=["fp8", "sparse"])
def test_features_of_a_model_need_arithmetic_too(member, change):
    teacher, student = sam_features(seed=0), in_training(sam_features(seed=1))
    odd: SAMFeatures = teacher._replace(**{member: change(getattr(teacher, member))})
    with pytest.raises(TypeError, match=rf"teacher\.{member} must be a floating-point tensor, got "):
        infosam_terms(relation_module(), odd, student)


# whatever may be


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    n, d = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    x = randn(n, d, seed=draw(st.integers(0, 999)), dtype=torch.float64)
    smallest, largest = math.log10(torch.finfo(dtype).tiny) + 1, math.log10(torch.finfo(dtype).max) - 2
    lengths = draw(st.lists(st.floats(smallest, largest), min_size=n, max_size=n))
    x = (x.sign() * x.abs().clamp(0.1, 5) * 10 ** torch.tensor(lengths, dtype=torch.float64)[:, None]).to(dtype)
    return draw(st.sampled_from([*LAYOUTS.values()][:5]))(x) if dtype in (torch.float32, torch.float64) else x


def law(x: Tensor, alpha: float) -> None:
    expected = cosines(x)
    digits = 1e-11 if x.dtype == torch.float64 else 1e-5
    found = gram_matrix(x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=digits)
    assert renyi_entropy(found, 2.0).item() == pytest.approx(entropy(expected).item(), abs=10 * digits)
    assert renyi_entropy(found, alpha).item() == pytest.approx(entropy(found, alpha).item(), abs=1e-5)
    assert feature_entropy(x).item() == pytest.approx(entropy(expected).item(), abs=10 * digits)


ORDERS = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 50.0, math.inf])


@given(rows(), ORDERS)
@settings(max_examples=40)
def test_any_samples(x, alpha):
    law(x, alpha)


@pytest.mark.long
@given(rows(), ORDERS)
@settings(max_examples=4000)
def test_any_samples_in_thousands(x, alpha):
    law(x, alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-125, -80, -41, -39, 0, 39, 41, 62, 80, 120])
def test_a_part_is_scaled_by_a_power_of_two_where_it_is_huge_or_tiny(dtype, exponent):
    ordinary = torch.tensor([1.5, -1.25, 0.0], dtype=dtype)
    x = torch.stack([ordinary, 2.0**exponent * ordinary])
    scaled = near_one(x, -1)
    assert torch.equal(scaled[0], ordinary)
    assert torch.equal(scaled[1], x[1] if abs(exponent) < 40 else ordinary)
    together = near_one(x, (-2, -1))
    assert torch.equal(together, x if abs(exponent) < 40 or exponent < 0 else x / 2.0**exponent)
