"""Entropies: closed forms, the laws that hold for every Gram, witnesses of those that do not, and derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from renyi_kd import RBF, conditional_entropy, gram_matrix, joint_entropy, mutual_information, renyi_entropy
from tests.support import randn
from tests.support.kernels import value_and_gradients

ORDERS = [0.5, 1.0, 1 + 1e-9, 1 + 1e-4, 1.2, 2.0, 3.0, 50.0, math.inf]
ALPHAS = st.sampled_from(ORDERS) | st.floats(0.3, 8.0)
# Below order 1 a power makes rounding of the zero eigenvalues larger: (1e-15)^.3 is 3e-5.
NOISE = {"rel": 0, "abs": 2e-4}
ROUNDING = {"rel": 0, "abs": 1e-9}


def noise(alpha: float) -> dict[str, float]:
    return NOISE if alpha < 1 else ROUNDING


@st.composite
def grams(draw, n: int | None = None) -> Tensor:
    """Unit-diagonal Grams of n samples, with correlations of both signs, from full rank to a single repeated row."""
    n, d = n or draw(st.integers(1, 8)), draw(st.integers(1, 9))
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))).double()
    x[: draw(st.integers(1, n))] = x[0].clone()
    x = F.normalize(x, dim=-1)
    return x @ x.mT


@st.composite
def psd_matrices(draw, n: int | None = None) -> Tensor:
    """PSD matrices of any scale and diagonal, some samples zero, from full rank to a single repeated row."""
    gram = draw(grams(n))
    size = st.sampled_from([0.0, 0.1, 1.0, 3.0])
    sizes = torch.tensor([1.0, *(draw(size) for _ in range(len(gram) - 1))], dtype=torch.float64)
    return draw(st.sampled_from([1e-9, 1.0, 1e9])) * gram * sizes[:, None] * sizes


SAME_N = st.integers(1, 8)
PAIRS = SAME_N.flatmap(lambda n: st.tuples(grams(n), grams(n)))
TRIPLES = SAME_N.flatmap(lambda n: st.tuples(grams(n), grams(n), grams(n)))


def labels(*values: int) -> Tensor:
    """Return the 0/1 Gram of a labelling."""
    x = torch.tensor(values)
    return (x[:, None] == x).double()


def bits(function, *arguments: Tensor, alpha: float = 2.0) -> float:
    return function(*arguments, alpha=alpha).item()


# Closed forms.


@given(clusters=st.integers(1, 6), size=st.integers(1, 5), scale=st.floats(1e-6, 1e6), alpha=ALPHAS)
def test_equal_orthogonal_clusters_give_log2_of_their_number(clusters, size, scale, alpha):
    gram = scale * torch.block_diag(*[torch.ones(size, size, dtype=torch.float64)] * clusters)
    assert bits(renyi_entropy, gram, alpha=alpha) == pytest.approx(math.log2(clusters), **noise(alpha))


@pytest.mark.parametrize("alpha", ORDERS)
def test_two_unequal_clusters(alpha):
    p = (0.75, 0.25)
    if alpha == math.inf:
        expected = -math.log2(max(p))
    elif abs(alpha - 1) < 1e-8:
        expected = -sum(x * math.log2(x) for x in p)
    else:
        expected = math.log2(sum(x**alpha for x in p)) / (1 - alpha)
    # At alpha = 1 + 1e-4 the closed form itself loses four digits.
    assert bits(renyi_entropy, labels(0, 0, 1, 0), alpha=alpha) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.918296), (2.0, 0.847997), (math.inf, 0.584963)])
def test_known_values_of_two_to_one(alpha, expected):
    assert bits(renyi_entropy, labels(0, 0, 1), alpha=alpha) == pytest.approx(expected, abs=1e-6)


@given(n=st.integers(1, 9), scale=st.floats(1e-6, 1e6), alpha=ALPHAS)
def test_orthogonal_samples_give_log2_n(n, scale, alpha):
    assert bits(renyi_entropy, scale * torch.eye(n).double(), alpha=alpha) == pytest.approx(math.log2(n), **ROUNDING)


@given(n=st.integers(1, 8), seed=st.integers(0, 1000), alpha=ALPHAS)
def test_rank_one_gives_zero(n, seed, alpha):
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed)).double()
    assert bits(renyi_entropy, x @ x.mT, alpha=alpha) == pytest.approx(0.0, **noise(alpha))


# Laws of any PSD matrix.


@given(gram=psd_matrices(), alpha=ALPHAS)
def test_between_zero_and_log2_n(gram, alpha):
    assert -1e-9 <= bits(renyi_entropy, gram, alpha=alpha) <= math.log2(len(gram)) + 1e-9


@given(gram=psd_matrices(), alphas=st.tuples(ALPHAS, ALPHAS))
def test_does_not_increase_with_the_order(gram, alphas):
    low, high = sorted(alphas)
    # Near order 1, the rounding of log2 is divided by |1 - alpha|.
    assert bits(renyi_entropy, gram, alpha=low) >= bits(renyi_entropy, gram, alpha=high) - 1e-9


@given(gram=psd_matrices(), exponent=st.floats(-14, -2), sign=st.sampled_from([-1, 1]))
def test_continuous_at_order_one(gram, exponent, sign):
    step = sign * 10**exponent
    # The derivative at 1 is the variance of ln p over twice ln 2, below 10 for n <= 8.
    difference = bits(renyi_entropy, gram, alpha=1 + step) - bits(renyi_entropy, gram, alpha=1.0)
    assert abs(difference) <= 10 * abs(step) + 1e-12


@given(gram=psd_matrices(), side=st.sampled_from([0.9, 1.1]))
def test_continuous_where_the_formula_changes(gram, side):
    below, above = (bits(renyi_entropy, gram, alpha=side * (1 + e)) for e in (-1e-9, 1e-9))
    assert below == pytest.approx(above, abs=1e-7)


@given(gram=psd_matrices())
def test_min_entropy_bounds_order_two(gram):
    second, least = bits(renyi_entropy, gram, alpha=2.0), bits(renyi_entropy, gram, alpha=math.inf)
    assert least - 1e-9 <= second <= 2 * least + 1e-9


@given(gram=psd_matrices(), scale=st.floats(1e-30, 1e30), alpha=ALPHAS)
def test_invariant_to_scale(gram, scale, alpha):
    expected = bits(renyi_entropy, gram, alpha=alpha)
    assert bits(renyi_entropy, scale * gram, alpha=alpha) == pytest.approx(expected, **noise(alpha))


@given(gram=psd_matrices(), seed=st.integers(0, 1000), alpha=ALPHAS)
def test_invariant_to_permutation_and_rotation(gram, seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(gram), generator=generator)
    rotation = torch.linalg.qr(torch.randn(len(gram), len(gram), generator=generator).double()).Q
    expected = bits(renyi_entropy, gram, alpha=alpha)
    assert bits(renyi_entropy, gram[order][:, order], alpha=alpha) == pytest.approx(expected, **noise(alpha))
    assert bits(renyi_entropy, rotation @ gram @ rotation.mT, alpha=alpha) == pytest.approx(expected, **noise(alpha))


@given(a=psd_matrices(), b=psd_matrices(), alpha=ALPHAS)
def test_kronecker_product_adds(a, b, alpha):
    expected = bits(renyi_entropy, a, alpha=alpha) + bits(renyi_entropy, b, alpha=alpha)
    assert bits(renyi_entropy, torch.kron(a, b), alpha=alpha) == pytest.approx(expected, **noise(alpha))


@given(gram=psd_matrices())
def test_order_two_is_the_frobenius_norm_and_the_spectrum(gram):
    value = bits(renyi_entropy, gram)
    assert value == pytest.approx(-math.log2(gram.square().sum() / gram.trace() ** 2), **ROUNDING)
    spectrum = torch.linalg.eigvalsh(gram / gram.trace())
    assert value == pytest.approx(-math.log2(spectrum.square().sum()), **ROUNDING)


@given(gram=psd_matrices(), copies=st.integers(2, 3), alpha=ALPHAS)
def test_duplicating_the_batch_changes_nothing(gram, copies, alpha):
    expected = bits(renyi_entropy, gram, alpha=alpha)
    assert bits(renyi_entropy, gram.repeat(copies, copies), alpha=alpha) == pytest.approx(expected, **noise(alpha))


@given(pair=PAIRS, alpha=ALPHAS)
def test_leading_dimensions_are_a_batch(pair, alpha):
    a, b = pair
    stack, other = torch.stack([a, b, a, b, a, a]).view(3, 2, *a.shape), torch.stack([b, a])
    for function in (joint_entropy, conditional_entropy, mutual_information):
        values = function(stack, other, alpha=alpha)
        assert values.shape == (3, 2)
        for i, j in itertools.product(range(3), range(2)):
            expected = bits(function, stack[i, j], other[j], alpha=alpha)
            assert values[i, j].item() == pytest.approx(expected, **noise(alpha))
    assert renyi_entropy(stack, alpha)[2, 1].item() == pytest.approx(
        bits(renyi_entropy, a, alpha=alpha), **noise(alpha)
    )


# Laws of Grams with a constant diagonal.


@given(pair=PAIRS, alpha=ALPHAS, scale=st.sampled_from([1.0, 1e-3, 1e3]))
def test_joint_is_at_least_either_marginal(pair, alpha, scale):
    a, b = pair[0] * scale, pair[1]
    joint = bits(joint_entropy, a, b, alpha=alpha)
    assert joint >= max(bits(renyi_entropy, a, alpha=alpha), bits(renyi_entropy, b, alpha=alpha)) - 1e-9
    assert joint == pytest.approx(bits(joint_entropy, b, a, alpha=alpha), **ROUNDING)


@given(pair=PAIRS, alpha=ALPHAS)
def test_conditional_is_joint_less_condition_and_not_negative(pair, alpha):
    a, b = pair
    value = bits(conditional_entropy, a, b, alpha=alpha)
    assert value >= -1e-9
    expected = bits(joint_entropy, a, b, alpha=alpha) - bits(renyi_entropy, b, alpha=alpha)
    assert value == pytest.approx(expected, **ROUNDING)


@given(triple=TRIPLES, alpha=ALPHAS)
def test_triple_is_at_least_every_pair(triple, alpha):
    joint = bits(joint_entropy, *triple, alpha=alpha)
    for pair in itertools.combinations(triple, 2):
        assert joint >= bits(joint_entropy, *pair, alpha=alpha) - 1e-9


@given(pair=PAIRS, alpha=ALPHAS)
def test_information_is_at_most_either_entropy(pair, alpha):
    least = min(bits(renyi_entropy, gram, alpha=alpha) for gram in pair)
    assert bits(mutual_information, *pair, alpha=alpha) <= least + 1e-9


@given(gram=grams(), alpha=ALPHAS)
def test_information_with_the_identity_and_with_ones(gram, alpha):
    n = len(gram)
    entropy = bits(renyi_entropy, gram, alpha=alpha)
    with_identity = bits(mutual_information, gram, torch.eye(n).double(), alpha=alpha)
    assert with_identity == pytest.approx(entropy, **ROUNDING)
    with_ones = bits(mutual_information, gram, torch.ones(n, n).double(), alpha=alpha)
    assert with_ones == pytest.approx(0, **noise(alpha))


@given(pair=PAIRS)
def test_information_is_not_negative_at_order_one(pair):
    assert bits(mutual_information, *pair, alpha=1.0) >= -1e-9


@given(pair=PAIRS)
def test_information_of_order_two_is_a_ratio_of_moments(pair):
    a, b = (gram.square() for gram in pair)
    expected = math.log2((a * b).mean() / (a.mean() * b.mean()))
    assert bits(mutual_information, *pair) == pytest.approx(expected, **ROUNDING)
    assert bits(mutual_information, pair[0].abs(), pair[1]) == pytest.approx(expected, **ROUNDING)


@given(pair=PAIRS, alpha=ALPHAS, sample=st.integers(0, 7))
def test_flipping_the_sign_of_a_sample_changes_nothing(pair, alpha, sample):
    sign = torch.ones(len(pair[0])).double()
    sign[sample % len(sign)] = -1
    flipped = pair[0] * sign[:, None] * sign
    expected = bits(mutual_information, *pair, alpha=alpha)
    assert bits(mutual_information, flipped, pair[1], alpha=alpha) == pytest.approx(expected, **noise(alpha))


# What does not hold: witnesses, so that nobody clamps.

FIFTH, FOURTH, THIRD = labels(0, 0, 0, 0, 1), labels(0, 0, 0, 1, 0), labels(0, 0, 1, 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "exact", "rounded"),
    [
        (FIFTH, FOURTH, math.log2(0.44 / 0.68**2), -0.0716),
        (labels(0, 0, 0, 1), labels(0, 0, 1, 0), math.log2(0.96), -0.0589),
    ],
)
def test_information_of_order_two_may_be_negative(a, b, exact, rounded):
    assert bits(mutual_information, a, b) == pytest.approx(exact, abs=1e-12)
    assert bits(mutual_information, a, b) == pytest.approx(rounded, abs=5e-5)


def test_information_may_be_negative_for_rbf_and_non_negative_linear_kernels_of_three_samples():
    x, y = torch.tensor([[0.0], [0.5], [1.0]]).double(), torch.tensor([[1.0], [0.0], [1.0]]).double()
    rbf = [gram_matrix(v, RBF(1.0)) for v in (x, y)]
    assert bits(mutual_information, *rbf) == pytest.approx(-0.0131, abs=5e-5)
    x = torch.tensor([[1.0, 1.0], [1.0, 2.0], [0.0, 2.0]]).double()
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]).double()
    assert bits(mutual_information, gram_matrix(x), gram_matrix(y)) == pytest.approx(-0.0395, abs=5e-5)


def test_total_correlation_may_be_negative():
    total = sum(bits(renyi_entropy, gram) for gram in (FIFTH, FOURTH, THIRD))
    assert total - bits(joint_entropy, FIFTH, FOURTH, THIRD) == pytest.approx(-0.1673, abs=5e-5)


def test_processing_may_add_information():
    forgotten = torch.ones(5, 5).double()
    assert bits(mutual_information, FIFTH, FOURTH) < bits(mutual_information, FIFTH, forgotten) == 0


def test_information_is_not_monotone_in_the_order():
    falling = [bits(mutual_information, FIFTH, FOURTH, alpha=alpha) for alpha in (0.5, 1.0, 2.0, 5.0, math.inf)]
    assert falling == pytest.approx([0.2180, 0.0729, -0.0716, -0.1141, -0.0931], abs=5e-5)
    pair = labels(1, 1, 2, 1, 2), labels(2, 2, 2, 0, 0)
    assert [bits(mutual_information, *pair, alpha=alpha) for alpha in (1.0, 2.0)] == pytest.approx(
        [0.0200, 0.0503], abs=5e-5
    )


def test_joint_may_be_below_a_marginal_without_a_constant_diagonal():
    a, b = torch.eye(2).double(), torch.diag(torch.tensor([1.0, 0.001])).double()
    assert bits(renyi_entropy, a) == 1
    assert bits(joint_entropy, a, b) == pytest.approx(0.0029, abs=5e-5)
    assert bits(conditional_entropy, b, a) == pytest.approx(0.0029 - 1, abs=5e-5)


def test_duplicating_one_sample_changes_the_entropy():
    assert bits(renyi_entropy, labels(0, 0, 1)) < bits(renyi_entropy, labels(0, 1)) - 0.1


# Derivatives.

DIFFERENTIATED = {
    "renyi_entropy": lambda a, _, alpha: renyi_entropy(a, alpha),
    "joint_entropy": lambda a, b, alpha: joint_entropy(a, b, alpha=alpha),
    "triple": lambda a, b, alpha: joint_entropy(a, b, a, alpha=alpha),
    "conditional_entropy": conditional_entropy,
    "mutual_information": mutual_information,
}


@pytest.fixture(params=DIFFERENTIATED)
def function(request):
    return DIFFERENTIATED[request.param]


@pytest.fixture(params=[0.5, 1.0, 1.01, 2.0, 3.0])
def alpha(request):
    return request.param


def test_gradient_for_features_is_the_derivative(function, alpha):
    x, y = (torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda u, v: function(u @ u.mT, v @ v.mT, alpha), (x, y))


def test_gradient_for_the_gram_is_the_derivative(function, alpha):
    x, y = (torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(2))
    a, b = ((v @ v.mT).requires_grad_() for v in (x, y))
    assert torch.autograd.gradcheck(lambda u, v: function(u, v, alpha), (a, b))
    (gradient,) = torch.autograd.grad(function(a, b, alpha).sum(), a)
    assert torch.allclose(gradient, gradient.mT, rtol=1e-12, atol=1e-12)


def test_min_entropy_has_a_derivative():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: renyi_entropy(v @ v.mT, math.inf), (x,))


def test_second_derivative_of_order_two():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: renyi_entropy(v @ v.mT), (x,))


RANK_DEFICIENT = {
    "one direction": torch.ones(4, 1).double() @ torch.tensor([[1.0, 2.0, 0.5]]).double(),
    "duplicates": torch.tensor([[1.0, 2, 0], [1, 2, 0], [0, 1, 1], [0, 1, 1]]).double(),
    "n above d": torch.linspace(-1, 2, 8).double().view(4, 2),
    "a zero sample": torch.tensor([[0.0, 0, 0], [1, 2, 0], [0, 1, 1], [3, 1, 1]]).double(),
    "one sample": torch.tensor([[3.0, -1.0]]).double(),
    "orthonormal": torch.eye(4).double(),
}


@pytest.mark.parametrize("features", RANK_DEFICIENT.values(), ids=RANK_DEFICIENT)
def test_rank_deficient_grams_are_finite(features):
    orders, dtypes = (0.5, 1.0, 1.5, 2.0, 3.0, math.inf), (torch.float64, torch.float32)
    for (name, function), order, dtype in itertools.product(DIFFERENTIATED.items(), orders, dtypes):
        x = features.to(dtype, copy=True).requires_grad_()
        y = features.to(dtype).flip(0).clone().requires_grad_()
        value = function(x @ x.mT, y @ y.mT, order)
        assert value.isfinite(), (name, order, dtype)
        for gradient in torch.autograd.grad(value, (x, y), allow_unused=True):
            assert gradient is None or gradient.isfinite().all(), (name, order, dtype)


def test_zero_eigenvalues_count_as_zero():
    """Rounding noise of rank-one Grams would weigh sqrt(1e-16) each at order 1/2, and its gradient 1e8."""
    x = torch.ones(8, 1, dtype=torch.float64, requires_grad=True)
    value = renyi_entropy(x @ x.mT, 0.5)
    (gradient,) = torch.autograd.grad(value, x)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("gap", [1e-13, 1e-17])
def test_what_counts_as_zero_depends_on_the_samples_and_not_on_the_batch(gap):
    gram = torch.tensor([[1.0, 1.0 - 2 * gap], [1.0 - 2 * gap, 1.0]], dtype=torch.float64)
    alone = renyi_entropy(gram, 0.1).item()
    assert (alone > 0.01) == (gap > 1e-16)
    assert renyi_entropy(gram.expand(1000, 2, 2), 0.1)[-1].item() == pytest.approx(alone, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n_samples", "rank"), [(8, 1), (64, 8), (256, 16)])
@pytest.mark.parametrize("order", [0.05, 0.1, 0.3, 0.9])
def test_rounding_of_a_single_precision_gram_counts_as_zero(n_samples, rank, order):
    """In fp64 it would pass for n - r eigenvalues of 1e-8, which weigh as much as the others at order 0.1."""
    features = randn(n_samples, rank)
    (expected, exact), (value, gradient) = (
        value_and_gradients(lambda x: renyi_entropy(gram_matrix(x), order), features.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-7)
    joint = joint_entropy(*[gram_matrix(features)] * 2, alpha=order).item()
    assert joint == pytest.approx(joint_entropy(*[gram_matrix(features.double())] * 2, alpha=order).item(), abs=1e-4)


def test_rounding_of_a_half_precision_gram_counts_as_zero():
    gram = gram_matrix(randn(64, 8))
    expected = bits(renyi_entropy, gram, alpha=0.1)
    assert bits(renyi_entropy, gram.bfloat16(), alpha=0.1) == pytest.approx(expected, abs=0.01)


# Dtypes.


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtype_is_that_of_the_gram_but_at_least_fp32(order, given, returned):
    gram = torch.eye(3, dtype=given) + 0.25
    other = torch.ones(3, 3, dtype=given)
    for value in (
        renyi_entropy(gram, order),
        joint_entropy(gram, other, alpha=order),
        conditional_entropy(gram, other, order),
        mutual_information(gram, other, order),
    ):
        assert value.dtype == returned
    # .25 and 1.25 are exact in every dtype, so the value is that of fp64 rounded once.
    assert torch.equal(renyi_entropy(gram, order), renyi_entropy(gram.double(), order).to(returned))


def test_mixed_dtypes_promote():
    half, double = torch.eye(3, dtype=torch.float16), torch.eye(3, dtype=torch.float64)
    for function in (joint_entropy, conditional_entropy, mutual_information):
        assert function(half, double).dtype == function(double, half).dtype == torch.float64
        assert function(half, half.bfloat16()).dtype == torch.float32


def test_large_half_precision_grams_do_not_overflow():
    assert bits(renyi_entropy, 60000 * torch.eye(4, dtype=torch.float16)) == 2
    assert bits(joint_entropy, *[60000 * torch.eye(4, dtype=torch.float16)] * 3) == 2


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_autocast_changes_nothing(order):
    x = torch.randn(5, 3)
    gram = x @ x.mT
    expected = mutual_information(gram, gram, order)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mutual_information(gram, gram, order), expected)


# Refusals.


NOT_FINITE = {
    "all NaN": lambda gram: gram.fill_(math.nan),
    "one NaN": lambda gram: gram[0, 2].fill_(math.nan),
    "NaN on the diagonal": lambda gram: gram[1, 1].fill_(math.nan),
    "inf": lambda gram: gram[2, 0].fill_(math.inf),
    "inf on the diagonal": lambda gram: gram[1, 1].fill_(-math.inf),
    "trace zero": lambda gram: gram.fill_(0),
    "diagonal zero": lambda gram: gram.diagonal().fill_(0),
}


@pytest.mark.parametrize("alpha", [*ORDERS, 1.01])
def test_what_is_not_finite_is_nan_beside_others_that_are_right(alpha):
    """The spectrum of such a matrix is an error on the CPU; a GradScaler skips a step whose gradient is NaN."""
    good = gram_matrix(torch.tensor([[1.0, 0.3], [0.2, 1.0], [-0.4, 0.6]]).double())
    for name, spoil in NOT_FINITE.items():
        bad = good.clone()
        spoil(bad)
        batch = torch.stack([good, bad, good.flip(0, 1)]).requires_grad_()
        value = renyi_entropy(batch, alpha)
        assert value.isnan().tolist() == [False, True, False], name
        (gradient,) = torch.autograd.grad(value.sum(), batch)
        assert gradient[1].isnan().all(), name
        for index in (0, 2):
            alone = batch[index].detach().requires_grad_()
            expected = renyi_entropy(alone, alpha)
            assert value[index].item() == pytest.approx(expected.item(), rel=1e-12), name
            torch.testing.assert_close(gradient[index], torch.autograd.grad(expected, alone)[0], rtol=1e-9, atol=1e-12)
        assert mutual_information(bad, good, alpha).isnan(), name
        assert conditional_entropy(good, bad, alpha).isnan(), name


@pytest.mark.parametrize("order", [0, 0.0, -1.0, math.nan, -math.inf])
def test_order_must_be_positive(order):
    gram = torch.eye(3)
    for function, grams in (
        (renyi_entropy, [gram]),
        (joint_entropy, [gram]),
        (conditional_entropy, [gram, gram]),
        (mutual_information, [gram, gram]),
    ):
        message = rf"{function.__name__}: alpha must be a number above 0, got .*; 2 is the order"
        with pytest.raises(ValueError, match=message):
            function(*grams, alpha=order)


@pytest.mark.parametrize("gram", [torch.eye(3, dtype=torch.int64), torch.eye(3).bool(), torch.eye(3).to(torch.cfloat)])
def test_gram_must_be_floating_point(gram):
    fact = str(gram.dtype).replace(".", r"\.")
    with pytest.raises(TypeError, match=rf"renyi_entropy: gram must be a floating-point tensor, got {fact}; convert"):
        renyi_entropy(gram)
    with pytest.raises(TypeError, match=rf"joint_entropy: grams\[1\] must be a floating-point tensor, got {fact}"):
        joint_entropy(torch.eye(3), gram)
    with pytest.raises(TypeError, match="conditional_entropy: a must be a floating-point tensor"):
        conditional_entropy(gram, torch.eye(3))
    with pytest.raises(TypeError, match="mutual_information: b must be a floating-point tensor"):
        mutual_information(torch.eye(3), gram)


def test_gram_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"renyi_entropy: gram must be a floating-point tensor, got list"):
        renyi_entropy([[1.0]])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (4, 0, 0), (3, 3, 1)])
def test_gram_must_be_square(shape):
    fact = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"renyi_entropy: gram must have shape \[..., n, n\] with n >= 1, got {fact}"):
        renyi_entropy(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"joint_entropy: grams\[0\] must have shape .*, got {fact}; gram_matrix"):
        joint_entropy(torch.zeros(shape), torch.eye(3))
    with pytest.raises(ValueError, match=rf"conditional_entropy: b must have shape .*, got {fact}"):
        conditional_entropy(torch.eye(3), torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"mutual_information: b must have shape .*, got {fact}"):
        mutual_information(torch.eye(3), torch.zeros(shape))


def test_joint_needs_a_gram_and_one_number_of_samples():
    with pytest.raises(ValueError, match="joint_entropy: grams must hold at least one Gram matrix, got none; pass one"):
        joint_entropy()
    for function in (joint_entropy, conditional_entropy, mutual_information):
        message = rf"{function.__name__}: grams must share their samples, got shapes \[\(3, 3\), \(4, 4\)\]; compute"
        with pytest.raises(ValueError, match=message):
            function(torch.eye(3), torch.eye(4))
