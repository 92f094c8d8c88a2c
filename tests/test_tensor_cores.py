"""What multiplies matrices, with the products of a GPU's tensor cores: within what these must cost, and no more."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU has its own tensor cores", allow_module_level=True)
from triton._C.libtriton import ir

from renyi_kd import Linear, RelationModule, SAMFeatures, infosam_terms, joint_entropy, renyi_entropy
from renyi_kd.gram import unit_diagonal
from renyi_kd.ops import row_products
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.batch_gram import triton as batch_gram_triton
from renyi_kd.ops.gram_moment import gram_moment
from tests.support import randn, relation_module
from tests.support.tensor_cores import allowance, multiply, tensor_cores

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_products_of_ones_are_counts():
    for dtype in DTYPES:
        assert torch.equal(
            multiply(torch.ones(3, 40, dtype=dtype), torch.ones(40, 2, dtype=dtype)), torch.full((3, 2), 40.0)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_cut_and_within_the_allowance(dtype):
    a, b = (1 + 0.1 * randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(5, 2048), (2048, 5)]))
    error = multiply(a, b).double() - a.double() @ b.double()
    magnitudes = a.double().abs() @ b.double().abs()
    # Of positive terms all are cut in one direction.
    assert (error < 0).all()
    assert 2.0**-24 < (error.abs() / magnitudes).max() < allowance(2048)


def magnitudes(rows: Tensor) -> Tensor:
    rows = rows.double().abs()
    return rows @ rows.mT


@pytest.mark.parametrize("n_rows", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(n_rows, dtype):
    rows = (0.3 + randn(n_rows, 700, dtype=dtype)).requires_grad_()
    upstream = randn(n_rows, n_rows, seed=3, dtype=torch.float64)
    with tensor_cores() as lengths:
        gram = batch_gram(rows, impl="triton")
        (gradient,) = torch.autograd.grad(gram, rows, upstream)
    assert lengths
    exact = rows.detach().double()
    assert ((gram - exact @ exact.mT).abs() <= allowance(700) * magnitudes(exact)).all()
    mix = upstream + upstream.mT
    # What is added for the gradient are as many terms as there are rows, in fp32; then it is rounded.
    allowed = allowance(n_rows) * mix.abs() @ exact.abs() + torch.finfo(dtype).eps * (mix @ exact).abs()
    assert ((gradient.double() - mix @ exact).abs() <= allowed + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("n_samples", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moment(n_samples, dtype):
    x = (0.4 + randn(n_samples, 70, dtype=dtype)).requires_grad_()
    with tensor_cores() as lengths:
        moment = gram_moment([x], [Linear()], impl="triton")
        (gradient,) = torch.autograd.grad(moment, x)
    assert lengths
    exact = x.detach().double().requires_grad_()
    of_exact = gram_moment([exact], [Linear()], impl="reference")
    (exact_gradient,) = torch.autograd.grad(of_exact, exact)
    unit = torch.nn.functional.normalize(exact.detach(), dim=1)
    gram = unit @ unit.mT
    # Of an entry of the Gram, magnitudes at most 1, and of its two norms.
    of_entry = 2 * allowance(70)
    assert (moment - of_exact).abs() <= 2 * of_entry * gram.abs().sum() + 2.0**-22 * of_exact
    # The gradient of the squares is 4 times Gram times unit rows, without its part along the row, by the norm.
    of_rows = 4 * (allowance(n_samples) * gram.abs() + of_entry) @ unit.abs()
    allowed = of_rows.norm(dim=1) / exact.detach().norm(dim=1)
    error = (gradient.double() - exact_gradient).abs().amax(1)
    assert (error <= allowed + torch.finfo(dtype).eps * exact_gradient.abs().amax(1)).all()


@pytest.mark.parametrize("n_samples", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compression_of_the_loss(n_samples, dtype):
    """How many samples there are decides whether the images are multiplied on tensor cores at all."""
    relation = relation_module(20)
    wide = copy.deepcopy(relation).double()
    teacher, student = (
        SAMFeatures(0.5 + randn(n_samples, 20, 4, 6, seed=seed, dtype=dtype), randn(n_samples, 1, 20, seed=seed + 1))
        for seed in (1, 3)
    )
    teacher, student = (SAMFeatures(maps, tokens.to(dtype)) for maps, tokens, _ in (teacher, student))

    def compression(relation: RelationModule, impl: str, *features: SAMFeatures) -> Tensor:
        with torch.no_grad():
            return infosam_terms(relation, *features, impl=impl).compression.double()

    in_fp64 = [SAMFeatures(maps.double(), tokens.double()) for maps, tokens, _ in (teacher, student)]
    exact, eager = compression(wide, "reference", *in_fp64), compression(relation, "reference", teacher, student)
    with tensor_cores():
        actual = compression(relation, "triton", teacher, student)
    rows = teacher.image_features.double().flatten(1)
    gram = (rows @ rows.mT).requires_grad_()
    scores = wide(*in_fp64[0]).detach().flatten(1)
    tokens = in_fp64[0].mask_tokens.flatten(1)
    images, prompts, relations = map(unit_diagonal, (gram, tokens @ tokens.mT, scores @ scores.mT))
    of_grams = renyi_entropy(relations) - joint_entropy(images, prompts, relations)
    (slope,) = torch.autograd.grad(of_grams, gram)
    assert of_grams.item() == pytest.approx(exact.item(), rel=1e-9)
    of_products = (slope.abs() * allowance(rows.shape[1]) * magnitudes(rows)).sum()
    # Beside the products there is what plain PyTorch rounds in fp32.
    of_rest = 2 * ((eager - exact).abs() + torch.finfo(torch.float32).eps * exact.abs())
    assert (actual - exact).abs() <= of_products + of_rest


def test_products_in_tf32_would_be_found(monkeypatch):
    # The kernel splits fp32 by itself.
    tile = row_products.tile_of_rows
    monkeypatch.setattr(batch_gram_triton, "tile_of_rows", lambda *args: {**tile(*args), "SPLIT": False})
    # Of long rows the errors of either sign would cancel.
    rows = 0.3 + randn(3, 16)
    with tensor_cores(ir.INPUT_PRECISION.TF32):
        gram = batch_gram(rows, impl="triton")
    exact = rows.double() @ rows.double().mT
    assert ((gram - exact).abs() > allowance(16) * magnitudes(rows)).any()
