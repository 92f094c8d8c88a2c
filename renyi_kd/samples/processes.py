"""The samples of all processes, so that the loss of a batch which they share is that of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from renyi_kd.samples.agreement import exchange_headers
from renyi_kd.samples.columns import channels_of_all, sum_of_parts
from renyi_kd.samples.samples import Samples, images_of_parts


def n_processes(group: distributed.ProcessGroup | None = None) -> int:
    """Return how many processes of a group train together: of the default one 1 where none was set up."""
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def check_group(function: str, group: object) -> None:
    """Raise unless this process is one of a group; ``function`` begins the message.

    Raises:
        TypeError: it is no group.
        ValueError: it is one of other processes.

    """
    if group is None or (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        return
    # What new_group returns in the processes that are left out.
    if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{function}: process_group must hold the process that calls, got a group of others alone; compute the "
            "loss in the processes of the group and in no other"
        )
    raise TypeError(
        f"{function}: process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}; "
        "torch.distributed.new_group(ranks) makes one, and mesh.get_group() is that of a DeviceMesh"
    )


def gather_samples(
    function: str,
    own: Samples,
    settings: Mapping[str, object],
    relation: nn.Module,
    gram: Callable[[Tensor], Tensor] | None,
    *,
    least: int,
    group: distributed.ProcessGroup | None = None,
) -> Samples:
    """Return the samples of all processes in the order of their ranks, bit for bit the same in each.

    Each process gets the gradient of its own scores, times the number of processes. So where all of them compute one
    loss of all samples, and then average the gradients of their parameters as DDP and FSDP do, the average is the
    gradient of that loss.

    Args:
        function: whose messages these are.
        own: of this process. Numbers of images and samples may differ between processes, and be 0.
        settings: what must be the same in all processes beside the kind of the samples, by name.
        relation: the module whose weights must be the same, see :func:`exchange_headers`.
        gram: from maps to their inner products ``[b, b]`` in fp64. Each process then has some channels of the maps of
            all, and the samples bring their Gram matrix. None for whole maps, as those of later steps may need them.
        least: how many samples the loss needs.
        group: of the processes; None for the default one.

    Raises:
        ValueError: in every process, if shapes, dtypes, gradient modes, settings or weights differ, a process has
            raised before, or all together have too few.

    Cost: one exchange of sizes and image indices, then one each for tokens and scores, and for the maps one of whole
    maps, or three of as many bytes as the own maps and twice the Gram matrix. The first is PyTorch's exchange of
    objects: two small messages, for which the host waits. Where NCCL is the only backend it waits until the device has
    done what is queued, and then for a few short copies per process; with one for the CPU ("cpu:gloo,cuda:nccl") it
    waits for the other processes alone. Extra memory: twice the own maps; for whole maps those of all processes, twice
    where their numbers differ.

    """
    headers = exchange_headers(function, own, settings, relation, group=group)
    n_images = [header.n_images for header in headers]
    n_samples = [header.n_samples for header in headers]
    if sum(n_samples) < least:
        raise ValueError(
            f"{function}: the processes must have at least {least} samples (image, prompt) together, got "
            f"{sum(n_samples)}; skip the step in all of them, or use larger batches"
        )
    # Both relations in one exchange.
    scores: Tensor = _DifferentiableGather.apply(  # type: ignore[no-untyped-call]
        torch.stack([own.teacher_scores, own.student_scores], 1), n_samples, group
    )
    teacher_scores, student_scores = scores.unbind(1)
    if gram is None:
        image_features, image_gram = _gather(own.image_features, n_images, group), None
    else:
        image_features = channels_of_all(own.image_features, n_images, group=group)
        image_gram = sum_of_parts(_gram_of_any(image_features, gram), group=group)
    return Samples(
        image_features,
        images_of_parts([header.images for header in headers], n_images),
        _gather(own.mask_tokens, n_samples, group),
        teacher_scores,
        student_scores,
        None if own.weight is None else _gather(own.weight, n_samples, group),
        own.in_pairs,
        image_gram,
    )


def _gram_of_any(maps: Tensor, gram: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the inner products of maps that may have no channels, as where there are fewer than processes."""
    return gram(maps) if maps.shape[1] else maps.new_zeros(len(maps), len(maps), dtype=torch.float64)


def _gather(own: Tensor, counts: Sequence[int], group: distributed.ProcessGroup | None) -> Tensor:
    """Return the rows of all processes, of which each has its number; without gradient."""
    most = max(counts)
    # Every process must send as much, laid out alike.
    sent = own.contiguous()
    if len(own) < most:
        sent = own.new_zeros(most, *own.shape[1:])
        sent[: len(own)] = own
    received = own.new_empty(len(counts), *sent.shape)
    distributed.all_gather(list(received), sent, group=group)
    if min(counts) == most:
        return received.flatten(0, 1)
    return torch.cat([rows[:n] for rows, n in zip(received, counts, strict=True)])


class _DifferentiableGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: Sequence[int], group: distributed.ProcessGroup | None) -> Tensor:
        first = sum(counts[: distributed.get_rank(group)])
        ctx.own, ctx.n_processes = slice(first, first + len(own)), len(counts)
        return _gather(own, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.n_processes * grad[ctx.own], None, None
