"""What every test needs: reproducible random numbers, one thread, and real SAMs with tiny random weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

# Before PyTorch is imported, and inherited by the processes that tests start: the tensors are so small that a second
# thread only waits, for long when the machine has other work.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

# Before Triton is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.support.interpreter import make_types_when_needed, patch_once_a_launch

        patch_once_a_launch()
        make_types_when_needed()

from benchmarks.torchvision_compat import ensure_importable

ensure_importable()

hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("reproducible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: several workers are to end together.
    items.sort(key=lambda item: not {"slow", "long"} & {mark.name for mark in item.iter_markers()})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what tests compiled: a frame that is compiled again meets the hooks that were set since."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
