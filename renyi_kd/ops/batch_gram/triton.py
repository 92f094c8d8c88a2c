r"""Inner products of few, very long rows in one read, and their gradient in one read and one write.

    G_ij = sum_k x_ik x_jk        dx_i = sum_j (dG_ij + dG_ji) x_j

Two stages: every program multiplies a stretch of all rows with itself and writes one matrix of partial sums in fp32;
these are summed in fp64. No atomics, so results repeat bit for bit. Extra memory: the partial sums, at most about
``PROGRAMS`` s x s matrices of up to 64 rows, fewer of more.

fp16, bf16 and fp32; rows that are dense in any order of their dimensions are read as they lie, others are copied.
First derivatives only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.ops import gpu
from renyi_kd.ops.autograd import second_derivative_refusal
from renyi_kd.ops.launches import device_of, launcher
from renyi_kd.ops.row_products import (
    MAX_ROWS,
    add_products,
    gram_of_products,
    no_products,
    tile_of_rows,
)
from renyi_kd.ops.tiles import cdiv

# Of more rows than a program takes at once: blocks of them, and columns at a time. Not measured on a GPU yet.
BLOCK_S, BLOCK_K = 64, 32
BACKWARD_BLOCKS = {"BLOCK_S": 16, "BLOCK_K": 128}
NUM_WARPS = 4
# Of a block with itself, and of pairs of blocks.
PROGRAMS = 256


@triton.jit(do_not_specialize=["n_rows", "n_steps"])
def _batch_gram_fwd_kernel(
    x_ptr, partial_ptr, n_rows, n_columns, n_steps, x_stride_s,
    BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BATCH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write the products of all rows over n_steps stretches of columns."""
    program = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_B)
    in_s = rows < n_rows
    high = no_products(BLOCK_L, BLOCK_B, BATCH)
    mixed = no_products(BLOCK_L, BLOCK_B, BATCH)
    inner = tl.arange(0, BLOCK_L)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    for step in range(n_steps):
        columns = (program * n_steps + step) * (BLOCK_L * BLOCK_K) + inner
        x = tl.load(
            x_ptr + rows.to(tl.int64)[None, :, None] * x_stride_s + columns,
            mask=in_s[None, :, None] & (columns < n_columns), other=0.0,
        )  # fmt: skip
        high, mixed = add_products(x, high, mixed, BATCH, SPLIT)
    gram = gram_of_products(high, mixed, BLOCK_L, BLOCK_B, BATCH)
    others = tl.arange(0, BLOCK_B)
    tl.store(
        partial_ptr + (program * n_rows + rows[:, None]) * n_rows + others[None, :], gram,
        mask=in_s[:, None] & (others < n_rows)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_steps"])
def _batch_gram_of_blocks_fwd_kernel(
    x_ptr, partial_ptr, n_rows, n_columns, n_steps, x_stride_s,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the products of two blocks of rows over n_steps blocks of columns."""
    split = tl.program_id(1).to(tl.int64)
    n_blocks = tl.cdiv(n_rows, BLOCK_S)
    rows = (tl.program_id(0) // n_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    others = (tl.program_id(0) % n_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    products = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
    for step in range(n_steps):
        columns = (split * n_steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = columns < n_columns
        left = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * x_stride_s + columns[None, :],
            mask=(rows < n_rows)[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            x_ptr + others.to(tl.int64)[None, :] * x_stride_s + columns[:, None],
            mask=(others < n_rows)[None, :] & in_k[:, None], other=0.0,
        )  # fmt: skip
        products = tl.dot(left, right, products, input_precision=PRECISION)
    tl.store(
        partial_ptr + (split * n_rows + rows[:, None]) * n_rows + others[None, :], products,
        mask=(rows < n_rows)[:, None] & (others < n_rows)[None, :],
    )  # fmt: skip


@triton.jit
def _batch_gram_bwd_kernel(
    x_ptr, grad_gram_ptr, grad_x_ptr, n_rows, n_columns, x_stride_s, grad_stride_s,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block of rows over one block of columns."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = (tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    in_k = columns < n_columns
    in_s = rows < n_rows
    grad = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    for j in range(n_rows):
        weights = tl.load(grad_gram_ptr + rows * n_rows + j, mask=in_s, other=0.0)
        weights += tl.load(grad_gram_ptr + j * n_rows + rows, mask=in_s, other=0.0)
        x = tl.load(x_ptr + tl.cast(j, tl.int64) * x_stride_s + columns, mask=in_k, other=0.0)
        grad += weights.to(tl.float32)[:, None] * x.to(tl.float32)[None, :]
    tl.store(
        grad_x_ptr + rows[:, None] * grad_stride_s + columns[None, :], grad.to(grad_x_ptr.dtype.element_ty),
        mask=in_s[:, None] & in_k[None, :],
    )  # fmt: skip


def launch_forward(rows: Tensor) -> Tensor:
    """Return partial Grams ``[parts, s, s]`` in fp32, by one launch."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    n_rows, n_columns = rows.shape
    is_whole = n_rows <= MAX_ROWS
    tile = tile_of_rows(min(n_rows, MAX_ROWS), rows.dtype, device_of(rows))
    n_blocks = 1 if is_whole else cdiv(n_rows, BLOCK_S)
    n_tiles = cdiv(n_columns, tile["BLOCK_L"] * tile["BLOCK_K"] if is_whole else BLOCK_K)
    n_steps = cdiv(n_tiles, max(1, PROGRAMS // n_blocks**2))
    n_splits = cdiv(n_tiles, n_steps)
    partial = torch.empty(n_splits, n_rows, n_rows, dtype=torch.float32, device=rows.device)
    arguments = rows, partial, n_rows, n_columns, n_steps, rows.stride(0)
    with torch.cuda.device_of(rows):
        if is_whole:
            launcher(_batch_gram_fwd_kernel, (n_splits,))(*arguments, **tile)
        else:
            launcher(_batch_gram_of_blocks_fwd_kernel, (n_blocks * n_blocks, n_splits))(
                *arguments, BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K, num_warps=2 * NUM_WARPS,
                PRECISION="tf32x3" if gpu.has_tensor_cores(device_of(rows)) else "ieee",
            )  # fmt: skip
    return partial


@torch.library.custom_op("renyi_kd::batch_gram", mutates_args=())
def _forward(rows: Tensor) -> Tensor:
    return launch_forward(rows).sum(0, dtype=torch.float64)


@_forward.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(len(rows), len(rows), dtype=torch.float64)


@torch.library.custom_op("renyi_kd::batch_gram_backward", mutates_args=())
def _backward(rows: Tensor, grad_gram: Tensor) -> Tensor:
    rows = rows.contiguous()
    grad_rows = torch.empty_like(rows)
    n_rows, n_columns = rows.shape
    grid = cdiv(n_columns, BACKWARD_BLOCKS["BLOCK_K"]), cdiv(n_rows, BACKWARD_BLOCKS["BLOCK_S"])
    with torch.cuda.device_of(rows):
        launcher(_batch_gram_bwd_kernel, grid)(
            rows, grad_gram, grad_rows, n_rows, n_columns, rows.stride(0), grad_rows.stride(0),
            **BACKWARD_BLOCKS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_rows


@_backward.register_fake
def _(rows: Tensor, grad_gram: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_gram: Tensor) -> Tensor:
    (rows,) = ctx.saved_tensors
    grad_rows: Tensor = torch.ops.renyi_kd.batch_gram_backward(rows, grad_gram.contiguous())
    return grad_rows


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(second_derivative_refusal("batch_gram", "use gram_matrix(features) instead"))


def flat(rows: Tensor) -> Tensor:
    """Return the rows ``[s, -1]`` as they lie: an inner product does not depend on the order of what it sums."""
    order = sorted(range(1, rows.ndim), key=rows.stride, reverse=True)
    return rows.permute(0, *order).flatten(1)


def batch_gram(rows: Tensor) -> Tensor:
    """Return what the reference does."""
    gram: Tensor = torch.ops.renyi_kd.batch_gram(flat(rows))
    return gram
