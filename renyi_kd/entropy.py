"""Matrix-based Rényi entropies: a Gram matrix in, bits out.

The entropy of order alpha of n samples is that of the spectrum of their trace-normalised Gram matrix
(Sanchez Giraldo, Rao & Principe 2015). The joint entropy of several variables is that of the Hadamard product of their
Grams (Yu et al. 2019). Everything is computed in fp64, whatever the dtype of the Gram; for a device without fp64 (MPS)
on the CPU, from where the result returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from renyi_kd.fp64 import in_fp64, no_numbers, out_of_fp64
from renyi_kd.magnitude import near_one

# Whole numbers above it are none of a tensor.
_LARGEST = 2**62


def renyi_entropy(gram: Tensor, alpha: float = 2.0) -> Tensor:
    r"""Return the Rényi entropy of order ``alpha``, in bits.

    With ``A = gram / tr(gram)`` and its eigenvalues l_i:  ``S_alpha(A) = log2(sum_i l_i^alpha) / (1 - alpha)``.
    alpha = 1 is the limit ``-sum_i l_i log2 l_i``, and alpha = inf the limit ``-log2 max_i l_i``. alpha = 2 needs no
    eigenvalues: ``-log2 ||A||_F^2``. The value is between 0 (all samples alike) and log2 n (all orthogonal), and does
    not increase with alpha. Eigenvalues below the rounding of the Gram's dtype count as zero, so rank-deficient Grams
    are fine at any order.

    Args:
        gram: ``[..., n, n]``, floating point, symmetric and positive semidefinite; any scale, any diagonal.
        alpha: order, in (0, inf].

    Returns:
        ``[...]`` in bits, in the dtype of ``gram``, but at least fp32. Differentiable any number of times at
        alpha = 2; elsewhere as often as ``torch.linalg.eigvalsh`` is. Of a matrix with NaN or inf, or of trace zero,
        value and gradient are NaN at every order. Those of the others in its batch are not touched.

    Raises:
        TypeError: ``gram`` is not a floating-point tensor.
        ValueError: ``gram`` is not square or has no samples, or ``alpha`` is not above 0.

    Cost: O(n^2) at alpha = 2, O(n^3) elsewhere; one fp64 copy of ``gram``.

    Source: Sanchez Giraldo, Rao & Principe, IEEE Trans. Inf. Theory 61 (2015): the matrix-based entropy of order alpha.

    >>> renyi_entropy(torch.eye(4)).item()
    2.0

    """
    _check("renyi_entropy", {"gram": gram}, alpha)
    return _entropy(gram, alpha=alpha)


def joint_entropy(*grams: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the joint Rényi entropy of several variables, in bits.

    ``S_alpha(A_1, ..., A_k) = S_alpha(A_1 o ... o A_k)``, the entropy of the Hadamard product of the Grams. With
    constant diagonals it is at least every marginal entropy; without, it need not be: A = I and B = diag(1, .001)
    give .0029 bits below the 1 bit of A. Normalise to a unit diagonal first (``gram_matrix`` does).

    Args:
        grams: one or more of ``[..., n, n]``, as for :func:`renyi_entropy`, of equal n.
        alpha: order, in (0, inf].

    Returns:
        ``[...]`` in bits; dtype and derivatives as :func:`renyi_entropy`.

    Raises:
        TypeError: a Gram is not a floating-point tensor.
        ValueError: there is no Gram, one is not square, their sizes differ, or ``alpha`` is not above 0.

    Cost: as :func:`renyi_entropy`, plus one product of n x n matrices per further variable.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019): the joint entropy of several variables.

    >>> joint_entropy(torch.eye(4), torch.ones(4, 4)).item()
    2.0

    """
    if not grams:
        raise ValueError("joint_entropy: grams must hold at least one Gram matrix, got none; pass one per variable")
    _check("joint_entropy", {f"grams[{index}]": gram for index, gram in enumerate(grams)}, alpha)
    return _entropy(*grams, alpha=alpha)


def conditional_entropy(a: Tensor, b: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the conditional Rényi entropy of ``a`` given ``b``, in bits.

    ``S_alpha(A | B) = S_alpha(A, B) - S_alpha(B)``; not negative for Grams with constant diagonals, at every order.

    Args:
        a: ``[..., n, n]``, as for :func:`renyi_entropy`.
        b: ``[..., n, n]``, over the same samples.
        alpha: order, in (0, inf].

    Returns:
        ``[...]`` in bits; dtype and derivatives as :func:`renyi_entropy`.

    Raises:
        TypeError: a Gram is not a floating-point tensor.
        ValueError: as :func:`joint_entropy`.

    Cost: two entropies.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019), from its joint entropy.

    >>> conditional_entropy(torch.eye(4), torch.ones(4, 4)).item()
    2.0

    """
    _check("conditional_entropy", {"a": a, "b": b}, alpha)
    return _entropy(a, b, alpha=alpha) - _entropy(b, alpha=alpha)


def mutual_information(a: Tensor, b: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the matrix-based Rényi mutual information of two variables, in bits.

    ``I_alpha(A; B) = S_alpha(A) + S_alpha(B) - S_alpha(A, B)``. For Grams with constant diagonals it is at most
    ``min(S(A), S(B))``, and ``I(A; A)`` is at most ``S(A)``. Only at alpha = 1 it cannot be negative. At alpha = 2
    the 0/1 Grams of the labels (0, 0, 0, 0, 1) and (0, 0, 0, 1, 0) give -.0716 bits. It obeys no data-processing
    inequality and is not monotone in alpha, so it is never clamped here.

    Args:
        a: ``[..., n, n]``, as for :func:`renyi_entropy`.
        b: ``[..., n, n]``, over the same samples.
        alpha: order, in (0, inf].

    Returns:
        ``[...]`` in bits; dtype and derivatives as :func:`renyi_entropy`.

    Raises:
        TypeError: a Gram is not a floating-point tensor.
        ValueError: as :func:`joint_entropy`.

    Cost: three entropies.

    Source: Yu et al., IEEE Trans. PAMI 42 (2019); at alpha = 2 the L_d of InfoSAM (2025) is its negative.

    >>> mutual_information(torch.eye(4), torch.eye(4)).item()
    2.0

    """
    _check("mutual_information", {"a": a, "b": b}, alpha)
    return _entropy(a, alpha=alpha) + _entropy(b, alpha=alpha) - _entropy(a, b, alpha=alpha)


def _entropy(*grams: Tensor, alpha: float) -> Tensor:
    device, dtype = grams[0].device, torch.promote_types(grams[0].dtype, torch.float32)
    # Products of huge or tiny ones would leave the range of fp64.
    product = near_one(in_fp64(grams[0]), (-2, -1))
    for gram in grams[1:]:
        product, dtype = product * near_one(in_fp64(gram), (-2, -1)), torch.promote_types(dtype, gram.dtype)
    normalised = product / product.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    # Entries are at most 1/n there, so rounding them moves no eigenvalue by more than half of it.
    rounding = sum(torch.finfo(gram.dtype).eps for gram in grams)
    return out_of_fp64(entropy_of_trace_one(normalised, alpha, rounding), device, dtype)


def entropy_of_trace_one(normalised: Tensor, alpha: float, rounding: float = 0.0) -> Tensor:
    """Return the entropy of order ``alpha`` of fp64 matrices ``[..., n, n]`` of trace one, as :func:`renyi_entropy`.

    Eigenvalues up to ``rounding``, or up to that of fp64, count as zero.
    """
    squares = normalised.square().sum((-2, -1))
    # 1, or NaN where anything is not finite: the gradient of a factor is NaN too, and a GradScaler skips the step.
    factor = squares.detach() * 0 + 1
    if alpha == 2:
        return -squares.log2() * factor
    # On a CPU eigvalsh raises for NaN, of which it is given none.
    finite = factor == 1
    stand_in = torch.eye(normalised.shape[-1], dtype=normalised.dtype, device=normalised.device)
    bits = _spectral_entropy(torch.where(finite[..., None, None], normalised, stand_in), alpha, rounding)
    return torch.where(finite, bits, (normalised * factor[..., None, None]).sum((-2, -1)))


def _spectral_entropy(normalised: Tensor, alpha: float, rounding: float) -> Tensor:
    # eigvalsh reads one triangle only; the mean of both makes its gradient that of the whole matrix.
    eigenvalues: Tensor = torch.linalg.eigvalsh((normalised + normalised.mT) / 2)
    negligible = eigenvalues <= max(rounding, normalised.shape[-1] * torch.finfo(torch.float64).eps)
    eigenvalues = eigenvalues.masked_fill(negligible, 0.0)
    eigenvalues = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    if alpha == math.inf:
        return -eigenvalues.amax(-1).log2()
    # The logarithm of 1 in place of 0 keeps the zero eigenvalues out of the gradient, where 0 * inf would be NaN.
    nats = eigenvalues.masked_fill(negligible, 1.0).log()
    if alpha == 1:
        return -(eigenvalues * nats).sum(-1) / math.log(2)
    if abs(alpha - 1) < 0.1:
        # sum l^alpha - 1 = sum l (l^(alpha - 1) - 1): no cancellation however close alpha is to 1.
        return (eigenvalues * ((alpha - 1) * nats).expm1()).sum(-1).log1p() / ((1 - alpha) * math.log(2))
    return (alpha * nats).masked_fill(negligible, -math.inf).logsumexp(-1) / ((1 - alpha) * math.log(2))


def check_alpha(function: str, alpha: float) -> None:
    """Raise unless ``alpha`` is an order of entropy; ``function`` begins the message."""
    if not isinstance(alpha, float | int) or not alpha > 0 or (isinstance(alpha, int) and alpha > _LARGEST):
        raise ValueError(
            f"{function}: alpha must be a number above 0, got {alpha!r:.50}; 2 is the order with a closed form"
        )


def _check(function: str, grams: Mapping[str, Tensor], alpha: float) -> None:
    for name, gram in grams.items():
        _check_gram(function, name, gram)
    shapes = [tuple(gram.shape) for gram in grams.values()]
    if len({n_samples for *_, n_samples in shapes}) > 1:
        raise ValueError(
            f"{function}: grams must share their samples, got shapes {shapes}; "
            "compute every Gram over the same samples in the same order"
        )
    check_alpha(function, alpha)


def _check_gram(function: str, name: str, gram: Tensor) -> None:
    fact = no_numbers(gram)
    if fact is not None:
        raise TypeError(f"{function}: {name} must be a floating-point tensor, got {fact}; convert it with .float()")
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(
            f"{function}: {name} must have shape [..., n, n] with n >= 1, got {tuple(gram.shape)}; "
            "gram_matrix(features) makes one from features [n, d]"
        )
