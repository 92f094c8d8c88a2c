"""The kernels under a shadow of memory: in bounds, without races, after barriers, and of few bytes."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import get_args

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="pip install 'renyi-kd[triton]'")
import triton.language as tl  # noqa: E402

import renyi_kd.ops  # noqa: E402
from renyi_kd import RBF, Linear, Polynomial, SAMFeatures, infosam_terms  # noqa: E402
from renyi_kd.objective import Distillation  # noqa: E402
from renyi_kd.ops.batch_gram import batch_gram  # noqa: E402
from renyi_kd.ops.gram_moment import gram_moment  # noqa: E402
from renyi_kd.ops.relation_scores import relation_scores  # noqa: E402
from tests.support import randn, relation_module  # noqa: E402
from tests.support.kernels import LAYOUTS  # noqa: E402

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the shadow is one of the interpreter's memory", allow_module_level=True)
from tests.support.shadow import Watch, shadow  # noqa: E402

FORMS = get_args(Distillation)
# Samples, channels, height, width and tokens: around the edges of tiles, and where the number of samples changes them.
SHAPES = [(1, 3, 5, 7, 1), (2, 3, 5, 7, 1), (3, 11, 7, 5, 1), (4, 100, 3, 5, 1), (5, 17, 5, 7, 3), (9, 20, 3, 5, 1)]
SHAPES += [(17, 19, 3, 5, 1), pytest.param((65, 5, 1, 3, 1), marks=pytest.mark.long)]


def watched_step(
    shape: tuple[int, ...], form: Distillation, dtype: torch.dtype = torch.float32, layout: str = "channel-first"
) -> Watch:
    """Return what was seen of the loss, forward and backward."""
    samples, channels, height, width, tokens = shape
    relation = relation_module(channels)
    teacher, student = (
        SAMFeatures(
            LAYOUTS[layout](randn(samples, channels, height, width, seed=seed, dtype=dtype)),
            randn(samples, tokens, channels, seed=seed + 1, dtype=dtype),
        )
        for seed in (1, 3)
    )
    student = SAMFeatures(*(value.requires_grad_() for value in student[:2]))
    with shadow() as watch:
        loss = infosam_terms(relation, teacher, student, distillation=form, impl="triton").loss
        torch.autograd.grad(loss, [*student[:2], *relation.parameters()], torch.tensor(-1.7))
    assert watch.requested > 0
    return watch


@pytest.mark.parametrize("form", FORMS)
def test_no_fault_in_any_form(form):
    assert not watched_step((3, 20, 5, 9, 1), form).faults


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_fault_at_any_size(shape):
    # Of a single sample there is a loss in one form only.
    assert not watched_step(shape, "jensen_renyi" if shape[0] == 1 else "mutual_information").faults


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_fault_in_any_layout(layout):
    directions, offsets = randn(3, 2, 11, seed=2).requires_grad_(), randn(3, 2, seed=3).requires_grad_()
    x = LAYOUTS[layout](randn(3, 11, 7, 5))
    x = x if layout == "expanded" else x.detach().requires_grad_()
    with shadow() as watch:
        relation_scores(x, directions, offsets=offsets, impl="triton").sum().backward()
        gram = batch_gram(x, impl="triton")
        if gram.requires_grad:
            gram.sum().backward()
    assert not watch.faults
    if layout != "expanded":
        assert not watched_step((3, 11, 7, 5, 1), "mutual_information", torch.float16, layout).faults


def test_no_fault_where_a_program_has_several_tiles(monkeypatch):
    found = pkgutil.walk_packages(renyi_kd.ops.__path__, "renyi_kd.ops.")
    modules = [importlib.import_module(module.name) for module in found]
    limited = [module for module in modules if hasattr(module, "PROGRAMS")]
    assert limited
    for module in limited:
        monkeypatch.setattr(module, "PROGRAMS", 2)
    assert not watched_step((2, 130, 7, 11, 1), "mutual_information").faults


@pytest.mark.parametrize("kernels", [[Linear()], [RBF(1.5), Linear(), Polynomial(2, 0.5)]], ids=len)
def test_no_fault_in_a_moment(kernels):
    features = [randn(70, 9 + 7 * i, seed=i).requires_grad_() for i in range(len(kernels))]
    with shadow() as watch:
        gram_moment(features, kernels, impl="triton").backward()
    assert not watch.faults


# A map of the teacher is read once, one of the student twice, and its gradient is written: what comes on top is waste.
# Weights, and sums over programs, weigh more at this size than at that of a SAM.
@pytest.mark.parametrize(
    ("dtype", "layout", "most"), [(torch.float32, "channel-first", 2.1), (torch.float16, "channels-last", 2.9)], ids=str
)
def test_bytes_asked_for_are_few_times_those_of_four_maps(dtype, layout, most):
    shape = 4, 64, 16, 16
    watch = watched_step((*shape, 1), "mutual_information", dtype, layout)
    assert not watch.faults
    floor = 4 * torch.Size(shape).numel() * dtype.itemsize
    for kernel in watch.read:
        print(f"{kernel:<40} read {watch.read[kernel] / floor:.3f} written {watch.written[kernel] / floor:.3f}")
    print(f"{layout}, {dtype}: {watch.requested / floor:.3f} of four maps")
    assert watch.requested < most * floor


# What it must find.


@triton.jit
def _out_of_bounds_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + places, tl.load(x_ptr + places))


@triton.jit
def _unwritten_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + places, 1.0, mask=places != 3)
    tl.debug_barrier()
    tl.store(y_ptr + places, tl.load(x_ptr + places))


@triton.jit
def _two_writers_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(y_ptr + places, tl.load(x_ptr + places))


@triton.jit
def _reader_and_writer_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + own, tl.load(x_ptr + own) + tl.load(y_ptr + tl.arange(0, BLOCK)))


@triton.jit
def _no_barrier_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + places, tl.load(x_ptr + places))
    tl.store(x_ptr + places, tl.load(y_ptr + places))


FAULTS = {
    "is out of bounds": (_out_of_bounds_kernel, 15),
    "reads what nobody wrote": (_unwritten_kernel, 16),
    "writes in two programs to one place": (_two_writers_kernel, 16),
    "reads in one program what another writes": (_reader_and_writer_kernel, 16),
    "reads what it wrote without a barrier between": (_no_barrier_kernel, 16),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault):
    kernel, length = FAULTS[fault]
    # Side by side in one storage: what lies past the end of one is the other.
    memory = torch.arange(32.0)
    x, y = memory[:length], memory[16:]
    with shadow() as watch:
        if kernel is _unwritten_kernel:
            x = torch.empty(length)
        kernel[(2,)](x, y, BLOCK=8)
    assert list(watch.faults) == [f"{kernel.__name__} {fault}"]
    assert watch.read[kernel.__name__] >= 64


def test_elements_that_are_skipped_belong_to_nobody():
    x, y = torch.zeros(32)[::2], torch.zeros(16)
    with shadow() as watch:
        _out_of_bounds_kernel[(2,)](x, y, BLOCK=8)
    assert list(watch.faults) == ["_out_of_bounds_kernel is out of bounds"]


def test_results_are_those_without_a_shadow():
    x: Tensor = torch.arange(16.0)
    y = torch.zeros(16)
    with shadow() as watch:
        _out_of_bounds_kernel[(2,)](x, y, BLOCK=8)
    assert torch.equal(x, y)
    assert not watch.faults
    assert watch.read == watch.written == {"_out_of_bounds_kernel": 64}
