"""Products of few rows with each other on tensor cores, for what reads them in tiles ``[BLOCK_L, BLOCK_B, BLOCK_K]``.

A tile holds, of BLOCK_B rows, BLOCK_L runs of BLOCK_K neighbours. Matrices of tensor cores have 16 rows. Of fewer rows
several runs stand below each other, and only the blocks on the diagonal count. Of up to 16 rows every warp has a matrix
of its own, so that none splits or loads what another does.

fp32 is split into two numbers of 11 bits, x = h + l, once. As a Gram is symmetric, x x' = h h' + (h l') + (h l')' takes
two products; l l' is below fp32's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from renyi_kd.ops import gpu

MAX_ROWS = 64
# Elements of a tile, and of those the ones side by side in memory, chosen so that nothing spills on any target; not
# measured on a GPU yet.
ELEMENTS, RUN = 4096, 32
# The same where every product takes registers.
SMALL_ELEMENTS, SMALL_RUN = 1024, 16
NUM_WARPS = 8
# Of a tile. A training whose batches vary compiles each of them once.
_ROWS = (4, 16, MAX_ROWS)
# Rows of the smallest matrix that tensor cores multiply.
_MATRIX_ROWS = 16


def tile_of_rows(n_rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the sizes of a tile, how many matrices it is (0: one of all warps), and whether fp32 is split."""
    block_b = next(rows for rows in _ROWS if rows >= n_rows)
    tensor_cores = gpu.has_tensor_cores(device)
    run, elements = (RUN, ELEMENTS) if tensor_cores else (SMALL_RUN, SMALL_ELEMENTS)
    is_batched = block_b <= _MATRIX_ROWS
    return {
        "BLOCK_L": NUM_WARPS * _MATRIX_ROWS // block_b if is_batched else max(1, elements // (run * block_b)),
        "BLOCK_B": block_b,
        "BLOCK_K": run,
        "BATCH": NUM_WARPS if is_batched else 0,
        "SPLIT": dtype == torch.float32 and tensor_cores,
        "num_warps": NUM_WARPS,
    }


@triton.jit
def _to_11_bits(x):
    """Round fp32 to what tensor cores take of it."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def no_products(BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr, BATCH: tl.constexpr):
    """Return the zero of the products h h', or of h l'."""
    if BATCH > 0:
        products = tl.zeros((BATCH, BLOCK_L * BLOCK_B // BATCH, BLOCK_L * BLOCK_B // BATCH), tl.float32)
    else:
        products = tl.zeros((BLOCK_B, BLOCK_B), tl.float32)
    return products


@triton.jit
def add_products(x, high_products, mixed_products, BATCH: tl.constexpr, SPLIT: tl.constexpr):
    """Add those of a tile; of what is not split there are no mixed ones."""
    BLOCK_L: tl.constexpr = x.shape[0]
    BLOCK_B: tl.constexpr = x.shape[1]
    BLOCK_K: tl.constexpr = x.shape[2]
    TRANSPOSED: tl.constexpr = (0, 2, 1) if BATCH > 0 else (1, 0)
    if BATCH > 0:
        rows = tl.reshape(x, (BATCH, BLOCK_L * BLOCK_B // BATCH, BLOCK_K))
    else:
        rows = tl.reshape(tl.permute(x, (1, 0, 2)), (BLOCK_B, BLOCK_L * BLOCK_K))
    if SPLIT:
        high = _to_11_bits(rows)
        low = _to_11_bits(rows - high)
        high_products = tl.dot(high, tl.permute(high, TRANSPOSED), high_products, input_precision="tf32")
        mixed_products = tl.dot(high, tl.permute(low, TRANSPOSED), mixed_products, input_precision="tf32")
    else:
        high_products = tl.dot(rows, tl.permute(rows, TRANSPOSED), high_products, input_precision="ieee")
    return high_products, mixed_products


@triton.jit
def gram_of_products(high_products, mixed_products, BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr, BATCH: tl.constexpr):
    """Return the products of the rows ``[BLOCK_B, BLOCK_B]``."""
    if BATCH > 0:
        BELOW: tl.constexpr = BLOCK_L // BATCH
        gram = high_products + mixed_products + tl.permute(mixed_products, (0, 2, 1))
        gram = tl.reshape(tl.sum(gram, 0), (BELOW, BLOCK_B, BELOW, BLOCK_B))
        below = tl.arange(0, BELOW)
        same = below[:, None, None, None] == below[None, None, :, None]
        gram = tl.sum(tl.sum(tl.where(same, gram, 0.0), 2), 0)
    else:
        gram = high_products + mixed_products + tl.trans(mixed_products)
    return gram
