"""Numbers of tiles, in plain integers: on the host, Triton's own helpers cost over a microsecond each."""

from __future__ import annotations


def cdiv(size: int, tile: int) -> int:
    """Return how many tiles cover ``size``.

    >>> cdiv(17, 8)
    3

    """
    return -(-size // tile)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least ``size``, from 1 on.

    >>> [next_power_of_2(size) for size in (1, 2, 3, 256, 257)]
    [1, 2, 4, 256, 512]

    """
    return 1 << (size - 1).bit_length()
