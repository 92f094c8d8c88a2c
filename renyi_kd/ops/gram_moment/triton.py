r"""Second moment of a Hadamard product of up to four Grams: tiles of them live in registers alone.

The formulas are the reference's. A program of the forward multiplies one tile of every Gram in the lower triangle and
writes one partial sum; a program of the backward walks along one block of rows, makes the tiles again and multiplies
them with the rows of one variable. Partial sums are added in fp64, without atomics: results repeat bit for bit. Extra
memory: one number per tile, and per variable two per sample.

fp16, bf16 and fp32, any strides; products of fp32 on tensor cores in three parts, exact to fp32. RBF distances are
expanded from them, unlike the reference's: :class:`RBF` says how far that carries. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.gram import RBF, KnownKernel, Polynomial
from renyi_kd.ops import gpu
from renyi_kd.ops.autograd import second_derivative_refusal
from renyi_kd.ops.launches import launcher
from renyi_kd.ops.tiles import cdiv

# Not measured on a GPU yet: among the largest tiles that spill on no target.
FORWARD_BLOCKS = {"BLOCK_N": 64, "BLOCK_D": 16}
BACKWARD_BLOCKS = {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_OUT": 128}
BACKWARD_THREADS = 256
# Of samples that are brought to fp64 at a time.
PREPARED_ELEMENTS = 2**20
_LINEAR, _POLYNOMIAL, _RBF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _products(
    x_ptr, mean_ptr, rows, cols, n_samples, n_features, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the [BLOCK_N, BLOCK_N] inner products of rows and columns, less their mean if CENTRED."""
    tile = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(0, n_features, BLOCK_D):
        features = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        in_d = features < n_features
        left_inside = (rows < n_samples)[:, None] & in_d[None, :]
        right_inside = (cols < n_samples)[None, :] & in_d[:, None]
        left = tl.load(x_ptr + rows[:, None] * stride_n + features[None, :] * stride_d, mask=left_inside, other=0.0)
        right = tl.load(x_ptr + cols[None, :] * stride_n + features[:, None] * stride_d, mask=right_inside, other=0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + features, mask=in_d, other=0.0)
            left = tl.where(left_inside, left.to(tl.float32) - mean[None, :], 0.0)
            right = tl.where(right_inside, right.to(tl.float32) - mean[:, None], 0.0)
        tile = tl.dot(left, right, tile, input_precision=PRECISION)
    return tile


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    power = tl.full(base.shape, 1.0, tl.float32)
    for _ in tl.static_range(EXPONENT):
        power *= base
    return power


@triton.jit
def _kernel_tile(
    x_ptr, mean_ptr, norms_ptr, inverse_ptr, rows, cols, n_samples, n_features, stride_n, stride_d, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, DEGREE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile of a Gram with unit diagonal, and K dK/d(x_i . x_j) of it; both 0 past the end, on no diagonal."""
    product = _products(
        x_ptr, mean_ptr, rows, cols, n_samples, n_features, stride_n, stride_d,
        BLOCK_N, BLOCK_D, KIND == _RBF, PRECISION,
    )  # fmt: skip
    apart = (rows[:, None] != cols[None, :]) & (rows < n_samples)[:, None] & (cols < n_samples)[None, :]
    row_norms = tl.load(norms_ptr + rows, mask=rows < n_samples, other=0.0)
    col_norms = tl.load(norms_ptr + cols, mask=cols < n_samples, other=0.0)
    if KIND == _RBF:
        distances = row_norms[:, None] + col_norms[None, :] - 2.0 * product
        # Not tl.maximum, which makes 0 of NaN.
        distances = tl.where(distances < 0.0, 0.0, distances)
        values = tl.where(apart, tl.exp(-0.5 / (scale * scale) * distances), 0.0)
        slopes = values * values / (scale * scale)
    else:
        row_scales = tl.load(inverse_ptr + rows, mask=rows < n_samples, other=0.0)
        col_scales = tl.load(inverse_ptr + cols, mask=cols < n_samples, other=0.0)
        scales = tl.where(apart, row_scales[:, None] * col_scales[None, :], 0.0)
        if KIND == _LINEAR:
            values = product * scales
            slopes = values * scales
        else:
            cosines = (product + scale) * scales
            lower = _power(cosines, DEGREE - 1)
            values = lower * cosines
            slopes = DEGREE * values * lower * scales
    return values, slopes


@triton.jit
def _gram_moment_fwd_kernel(
    x_ptrs, mean_ptrs, norms_ptrs, inverse_ptrs, dims, strides_n, strides_d, scales,
    partial_ptr, n_samples,
    KINDS: tl.constexpr, DEGREES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the sum of squares of one tile; those above the diagonal are counted with those below."""
    row_block = tl.program_id(0)
    col_block = tl.program_id(1)
    if col_block > row_block:
        return
    rows = (row_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = (col_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    squares = tl.full((BLOCK_N, BLOCK_N), 1.0, tl.float32)
    for k in tl.static_range(len(KINDS)):
        values, _ = _kernel_tile(
            x_ptrs[k], mean_ptrs[k], norms_ptrs[k], inverse_ptrs[k], rows, cols, n_samples,
            dims[k], strides_n[k], strides_d[k], scales[k], BLOCK_N, BLOCK_D, KINDS[k], DEGREES[k], PRECISION,
        )  # fmt: skip
        squares *= values * values
    weight = tl.where(row_block == col_block, 1.0, 2.0)
    tl.store(
        partial_ptr + row_block.to(tl.int64) * tl.num_programs(1) + col_block, weight * tl.sum(tl.sum(squares, 1), 0)
    )


@triton.jit
def _gram_moment_bwd_kernel(
    x_ptrs, mean_ptrs, norms_ptrs, inverse_ptrs, dims, strides_n, strides_d, scales,
    grad_moment_ptr, grad_x_ptr, grad_stride_n, grad_stride_d, n_samples,
    KINDS: tl.constexpr, DEGREES: tl.constexpr, WHICH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block of rows and features of variable WHICH."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    features = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    in_d = features < dims[WHICH]
    grad = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    row_sums = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_OUT,), tl.float32)
    if KINDS[WHICH] == _RBF:
        mean = tl.load(mean_ptrs[WHICH] + features, mask=in_d, other=0.0)
    for block in range(tl.cdiv(n_samples, BLOCK_N)):
        cols = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        others = tl.full((BLOCK_N, BLOCK_N), 1.0, tl.float32)
        for k in tl.static_range(len(KINDS)):
            if k != WHICH:
                values, _ = _kernel_tile(
                    x_ptrs[k], mean_ptrs[k], norms_ptrs[k], inverse_ptrs[k], rows, cols, n_samples,
                    dims[k], strides_n[k], strides_d[k], scales[k], BLOCK_N, BLOCK_D, KINDS[k], DEGREES[k], PRECISION,
                )  # fmt: skip
                others *= values * values
        values, slopes = _kernel_tile(
            x_ptrs[WHICH], mean_ptrs[WHICH], norms_ptrs[WHICH], inverse_ptrs[WHICH], rows, cols, n_samples,
            dims[WHICH], strides_n[WHICH], strides_d[WHICH], scales[WHICH],
            BLOCK_N, BLOCK_D, KINDS[WHICH], DEGREES[WHICH], PRECISION,
        )  # fmt: skip
        row_sums += tl.sum(values * values * others, 1)
        inside = (cols < n_samples)[:, None] & in_d[None, :]
        x = tl.load(
            x_ptrs[WHICH] + cols[:, None] * strides_n[WHICH] + features[None, :] * strides_d[WHICH],
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
        x = tl.where(inside, x - mean[None, :], 0.0)
        grad = tl.dot(slopes * others, x, grad, input_precision=PRECISION)
    inside = (rows < n_samples)[:, None] & in_d[None, :]
    x = tl.load(
        x_ptrs[WHICH] + rows[:, None] * strides_n[WHICH] + features[None, :] * strides_d[WHICH],
        mask=inside, other=0.0,
    ).to(tl.float32) - mean[None, :]  # fmt: skip
    if KINDS[WHICH] == _RBF:
        own = row_sums / (scales[WHICH] * scales[WHICH])
    elif KINDS[WHICH] == _LINEAR:
        inverse = tl.load(inverse_ptrs[WHICH] + rows, mask=rows < n_samples, other=0.0)
        own = row_sums * inverse * inverse
    else:
        norms = tl.load(norms_ptrs[WHICH] + rows, mask=rows < n_samples, other=0.0)
        diagonal = norms + scales[WHICH]
        own = tl.where(diagonal == 0, 0.0, DEGREES[WHICH] * row_sums / tl.where(diagonal == 0, 1.0, diagonal))
    grad = 4.0 * tl.load(grad_moment_ptr).to(tl.float32) * (grad - own[:, None] * x)
    tl.store(
        grad_x_ptr + rows[:, None] * grad_stride_n + features[None, :] * grad_stride_d,
        grad.to(grad_x_ptr.dtype.element_ty), mask=inside,
    )  # fmt: skip


def _prepare(x: Tensor, kind: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of the samples (0 unless RBF), their squared norms, and what scales the diagonal to 1."""
    mean = x.new_zeros(x.shape[1], dtype=torch.float32)
    if kind == _RBF.value:
        mean = x.mean(0, dtype=torch.float32)
        norms = _squared_norms(x, mean).float()
        return mean, norms, norms
    norms = _squared_norms(x)
    diagonal = norms + scale if kind == _POLYNOMIAL.value else norms
    return mean, norms.float(), torch.where(diagonal == 0, 0.0, diagonal.rsqrt()).float()


def _squared_norms(x: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return those of samples, less their mean if it is given, in fp64.

    Rounding of what scales the samples would be that of the kernel times its degree.
    """
    # By blocks: to centre all at once, or to bring them to another dtype, copies the features.
    blocks = x.split(max(1, PREPARED_ELEMENTS // x.shape[1]))
    rows = blocks if mean is None else (block.float() - mean for block in blocks)
    return torch.cat([torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in rows]).square()


def _arguments(
    features: Sequence[Tensor], kinds: Sequence[int], scales: Sequence[float], degrees: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what both kernels take of the variables, and their constants."""
    means, norms, inverses = zip(*map(_prepare, features, kinds, scales), strict=True)
    arguments = {
        "x_ptrs": tuple(features),
        "mean_ptrs": means,
        "norms_ptrs": norms,
        "inverse_ptrs": inverses,
        "dims": tuple(x.shape[1] for x in features),
        "strides_n": tuple(x.stride(0) for x in features),
        "strides_d": tuple(x.stride(1) for x in features),
        "scales": tuple(scales),
    }
    constants = {
        "KINDS": tuple(kinds),
        "DEGREES": tuple(degrees),
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
    }
    return arguments, constants


@torch.library.custom_op("renyi_kd::gram_moment", mutates_args=(), schema=(
    "(Tensor[] features, int[] kinds, float[] scales, int[] degrees) -> Tensor"
))  # fmt: skip
def _forward(
    features: Sequence[Tensor], kinds: Sequence[int], scales: Sequence[float], degrees: Sequence[int]
) -> Tensor:
    arguments, constants = _arguments(features, kinds, scales, degrees)
    n_samples = len(features[0])
    n_blocks = cdiv(n_samples, FORWARD_BLOCKS["BLOCK_N"])
    # Zeros, as the tiles above the diagonal write nothing.
    partial = torch.zeros(n_blocks, n_blocks, dtype=torch.float32, device=features[0].device)
    with torch.cuda.device_of(features[0]):
        launcher(_gram_moment_fwd_kernel, (n_blocks, n_blocks))(
            **arguments, partial_ptr=partial, n_samples=n_samples, **constants, **FORWARD_BLOCKS, num_warps=8
        )
    # What every sample is to itself is 1, and was left out of the tiles: no rounding there.
    return partial.sum(dtype=torch.float64) + n_samples


@_forward.register_fake
def _(features: Sequence[Tensor], *_: object) -> Tensor:
    return features[0].new_empty((), dtype=torch.float64)


@torch.library.custom_op("renyi_kd::gram_moment_backward", mutates_args=(), schema=(
    "(Tensor[] features, Tensor grad_moment, int[] kinds, float[] scales, int[] degrees, int which) -> Tensor"
))  # fmt: skip
def _backward(
    features: Sequence[Tensor],
    grad_moment: Tensor,
    kinds: Sequence[int],
    scales: Sequence[float],
    degrees: Sequence[int],
    which: int,
) -> Tensor:
    arguments, constants = _arguments(features, kinds, scales, degrees)
    n_samples, n_features = features[which].shape
    grad = torch.empty_like(features[which])
    grid = cdiv(n_samples, BACKWARD_BLOCKS["BLOCK_N"]), cdiv(n_features, BACKWARD_BLOCKS["BLOCK_OUT"])
    with torch.cuda.device_of(grad):
        launcher(_gram_moment_bwd_kernel, grid)(
            **arguments, grad_moment_ptr=grad_moment, grad_x_ptr=grad, grad_stride_n=grad.stride(0),
            grad_stride_d=grad.stride(1), n_samples=n_samples, **constants, WHICH=which, **BACKWARD_BLOCKS,
            num_warps=BACKWARD_THREADS // gpu.warp_size(grad.device), num_stages=1,
        )  # fmt: skip
    return grad


@_backward.register_fake
def _(features: Sequence[Tensor], *rest: Any) -> Tensor:
    *_, which = rest
    return torch.empty_like(features[which])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.kinds, ctx.scales, ctx.degrees = inputs
    ctx.save_for_backward(*features)


def _differentiate(ctx: Any, grad_moment: Tensor) -> tuple[list[Tensor | None], None, None, None]:
    features = list(ctx.saved_tensors)
    grads = [
        torch.ops.renyi_kd.gram_moment_backward(features, grad_moment, ctx.kinds, ctx.scales, ctx.degrees, which)
        if needed
        else None
        for which, needed in enumerate(ctx.needs_input_grad[0])
    ]
    return grads, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(
    second_derivative_refusal("gram_moment", "use renyi_entropy(gram_matrix(features)) instead")
)


def gram_moment(features: Sequence[Tensor], kernels: Sequence[KnownKernel]) -> Tensor:
    """Return what the reference does."""
    kinds, scales, degrees = zip(*map(_numbers, kernels), strict=True)
    moment: Tensor = torch.ops.renyi_kd.gram_moment(list(features), kinds, scales, degrees)
    return moment


def _numbers(kernel: KnownKernel) -> tuple[int, float, int]:
    """Return kind, scale and degree: an operator's schema has no values of our own."""
    if isinstance(kernel, RBF):
        return _RBF.value, float(kernel.bandwidth), 1
    if isinstance(kernel, Polynomial):
        return _POLYNOMIAL.value, float(kernel.offset), kernel.degree
    return _LINEAR.value, 0.0, 1
