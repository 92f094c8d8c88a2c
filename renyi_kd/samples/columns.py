"""The Gram matrix of the images of all processes, each of which has some channels of all images.

    G_ij = sum_p G^p_ij        G^p_ij = sum over the channels k of process p of <x_ik, x_jk>

An inner product is a sum over channels. So no process needs whole maps of the others: of n processes each sends every
other one an n-th of the channels of its own maps, and then sends and receives about as much as these, however many
processes there are.

The matrices ``G^p`` are small, but n of them are not: 64 of 256 images would be 32 MiB. So each process adds up a
stretch of their entries, in the order of the ranks, and sends its sums to all. Every entry is added once, and all
processes get the same bits. An ``all_reduce`` moves as many bytes and promises neither the order nor that: libraries
choose how they add by size and network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def channels_of_all(own: Tensor, n_images: Sequence[int], *, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Return this process's share of the channels, of the images of all processes in the order of their ranks.

    Args:
        own: ``[b, d, h, w]``, the maps of this process: b images, or none; any float dtype and strides, which need not
            be those of the others; d, h, w and dtype are.
        n_images: of every process.
        group: of the processes; None for the default one.

    Returns:
        ``[sum(n_images), k, h, w]``, contiguous, in the dtype of the maps and without gradient. k is d over the number
        of processes, rounded up or down; the first processes have those that are over. With more processes than
        channels some have none.

    Cost: one exchange, of as many bytes as the own maps have. Extra memory: a copy of these, and the result.

    """
    n_channels, (_, _, *size) = shares(own.shape[1], len(n_images)), own.shape
    n_pixels = size[0] * size[1]
    n_own = n_channels[distributed.get_rank(group)]
    n_sent = [len(own) * n * n_pixels for n in n_channels]
    n_received = [n * n_own * n_pixels for n in n_images]
    sent = own.new_empty(sum(n_sent))
    for place, part in zip(torch.split(sent, n_sent), torch.split(own.detach(), n_channels, 1), strict=True):
        place.view(part.shape).copy_(part)
    received = own.new_empty(sum(n_received))
    distributed.all_to_all_single(received, sent, n_received, n_sent, group=group)
    return received.view(sum(n_images), n_own, *size)


def shares(n: int, n_processes: int) -> list[int]:
    """Return how many of n things each process has: as many as the others, or one more."""
    least, over = divmod(n, n_processes)
    return [least + (rank < over) for rank in range(n_processes)]


def sum_of_parts(part: Tensor, *, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a matrix over all processes in the order of their ranks, bit for bit the same in each.

    Args:
        part: of this process; of one shape and dtype in all of them.
        group: of the processes; None for the default one.

    Cost: two exchanges, each of as many bytes as the matrix has. Extra memory: a few copies of it.

    """
    n_processes = distributed.get_world_size(group)
    n_entries = -(-part.numel() // n_processes)
    padded = torch.nn.functional.pad(part.flatten(), (0, n_processes * n_entries - part.numel()))
    of_all, whole = torch.empty_like(padded), torch.empty_like(padded)
    distributed.all_to_all_single(of_all, padded, group=group)
    own, *others = of_all.view(n_processes, n_entries)
    # One after the other: a sum over the dimension may add some entries in another order than their transposes.
    for other in others:
        own += other
    distributed.all_gather(list(whole.view(n_processes, n_entries)), own, group=group)
    return whole[: part.numel()].view(part.shape)
