"""How the pixels of a map lie in memory, and how wide an access may be."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from renyi_kd.ops.pixels import Pixels, pixels_of

WHOLE = torch.zeros(2, 3, 4, 6)
WIDE = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (WHOLE, Pixels(3, 8, 6, (72, 24, 6, 1), False, 8, True)),
        (WHOLE.to(memory_format=torch.channels_last), Pixels(3, 8, 6, (72, 1, 18, 3), True, 1, True)),
        (WIDE[..., :6], Pixels(3, 8, 6, (96, 32, 8, 1), False, 8, False)),
        (WIDE[..., :2], Pixels(1, 8, 2, (96, 32, 8, 1), False, 8, False)),
        (WIDE[:, :, :2, :6], Pixels(3, 4, 6, (96, 32, 8, 1), False, 8, False)),
        (WIDE[:, :, :1, :6], Pixels(3, 2, 6, (96, 32, 8, 1), False, 16, True)),
        # The next column is the next row.
        (WIDE[..., 2:3], Pixels(1, 4, 1, (96, 32, 8, 8), False, 16, True)),
        (torch.zeros(1, 3, 5, 5).expand(2, 3, 5, 5), Pixels(25, 1, 5, (0, 25, 5, 1), False, 1, True)),
        (torch.zeros(1, 32, 8, 8).expand(2, 32, 8, 8), Pixels(4, 16, 8, (0, 64, 8, 1), False, 16, True)),
        (
            torch.zeros(2, 32, 8, 8).to(memory_format=torch.channels_last),
            Pixels(4, 16, 8, (2048, 1, 256, 32), True, 16, True),
        ),
        (
            torch.zeros(2, 4, 8, 9).to(memory_format=torch.channels_last)[..., :8],
            Pixels(4, 16, 8, (288, 1, 36, 4), True, 4, False),
        ),
    ],
    ids=lambda value: "" if isinstance(value, Pixels) else str(tuple(value.stride())),
)
def test_pixels_of_maps(x, expected):
    assert pixels_of(x) == expected
