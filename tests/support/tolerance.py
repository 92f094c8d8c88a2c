"""Error budgets derived from data, so that no test of a kernel owns a tolerance."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, eager: Tensor, exact: Tensor, *, name: str, slack: float = 2.0) -> None:
    """Assert ``|actual - exact|max <= slack (|eager - exact|max + eps * max|exact|)``.

    Args:
        actual: what is tested; eps is that of its dtype.
        eager: what plain PyTorch gives for the same inputs at the same dtype.
        exact: the fp64 result for the same inputs, after they were rounded to that dtype.
        name: of the quantity, for the message.
        slack: how much worse than plain PyTorch is still good.

    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, f"{name}: the exact value is in {exact.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    scale = exact.abs().max().item()
    assert scale > 0, f"{name}: the exact value is zero everywhere, so the comparison proves nothing"
    allowed = slack * ((eager.double() - exact).abs().max().item() + torch.finfo(actual.dtype).eps * scale)
    error = (actual.double() - exact).abs()
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error[worst].item() <= allowed, (
        f"{name}: error {error[worst].item():.3e} > budget {allowed:.3e} at {worst}: "
        f"got {actual[worst].item():.9g}, exact {exact[worst].item():.9g}, scale {scale:.3g}"
    )


def assert_close_on_scale(actual: Tensor, expected: Tensor, *, name: str, rtol: float, scale: float = 0.0) -> None:
    """Assert ``|actual - expected|max <= rtol max(max|expected|, scale)``."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = rtol * max(expected.abs().max().item(), scale)
    assert allowed > 0, f"{name}: the expected value is zero everywhere, so the comparison proves nothing"
    error = (actual.double() - expected.double()).abs()
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error[worst].item() <= allowed, (
        f"{name}: error {error[worst].item():.3e} > {allowed:.3e} at {worst}: "
        f"got {actual[worst].item():.9g}, expected {expected[worst].item():.9g}"
    )
