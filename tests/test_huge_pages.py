"""The advice to take huge pages: for large fresh tensors on the CPU, whole pages only, and never more than advice."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from renyi_kd.ops import huge_pages
from renyi_kd.ops.huge_pages import advise_huge_pages
from renyi_kd.ops.relation_scores import relation_scores

LARGE = huge_pages._MIN_BYTES


@pytest.fixture
def advice(monkeypatch):
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *arguments: given.append(arguments) or 0)
    return given


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such advice")
def test_large_tensors_get_it_for_their_whole_pages(advice):
    tensor = torch.empty(LARGE + 3, dtype=torch.uint8)
    assert advise_huge_pages(tensor) is tensor
    ((start, length, kind),) = advice
    assert kind == mmap.MADV_HUGEPAGE
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    end = tensor.data_ptr() + tensor.nbytes
    assert tensor.data_ptr() <= start < tensor.data_ptr() + mmap.PAGESIZE
    assert end - mmap.PAGESIZE < start + length <= end


def test_small_tensors_and_other_devices_get_none(advice):
    advise_huge_pages(torch.empty(LARGE - 1, dtype=torch.uint8))
    advise_huge_pages(torch.empty(2 * LARGE, dtype=torch.uint8, device="meta"))
    assert advice == []


def test_a_system_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(huge_pages, "_madvise", huge_pages._madvise.__wrapped__)
    assert huge_pages._madvise() is None
    advise_huge_pages(torch.empty(LARGE, dtype=torch.uint8)).fill_(1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_gradient_of_a_large_map_is_advised_and_whole(layout, advice):
    channels = LARGE // 4 // (64 * 64)
    x = torch.randn(1, channels, 64, 64).contiguous(memory_format=layout).requires_grad_()
    relation_scores(x, torch.randn(1, 1, channels)).square().mean().backward()
    assert len(advice) == 1
    assert x.grad.isfinite().all()
    assert x.grad.abs().amax((0, 2, 3)).min() > 0
