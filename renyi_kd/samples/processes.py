"""The samples of all processes, so that the loss of a batch which they share is that of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from renyi_kd.samples.samples import Samples, images_of_parts

# By their place in the header, which is of numbers.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def n_processes() -> int:
    """Return how many processes train together: 1 where no process group was set up."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_samples(function: str, own: Samples) -> Samples:
    """Return the samples of all processes in the order of their ranks, bit for bit the same in each.

    Each process gets the gradient of its own scores, times the number of processes. So where all of them compute one
    loss of all samples, and then average the gradients of their parameters as DDP and FSDP do, the average is the
    gradient of that loss.

    Args:
        function: whose messages these are.
        own: of this process. Numbers of images and samples may differ between processes.

    Raises:
        ValueError: in every process, if shapes, dtypes or gradient modes differ, or a process has called
            :func:`announce_refusal` instead.

    Cost: one exchange of sizes, for which the host waits, a second where an image has not one sample; then one each for
    maps, tokens and scores. Extra memory: the teacher's maps of all processes, twice where their numbers differ.

    """
    device = own.image_features.device
    headers = _gather_headers(_header(own), device)
    _check_alike(function, headers)
    n_images = [header.n_images for header in headers]
    n_samples = [header.n_samples for header in headers]
    images: list[list[int] | None] = [None] * len(headers)
    if any(header.has_index for header in headers):
        index = torch.tensor(range(len(own.mask_tokens)) if own.images is None else own.images, device=device)
        of_all = _gather(index, n_samples).cpu()
        images = [of_process.tolist() for of_process in torch.split(of_all, n_samples)]
    # Both relations in one exchange.
    scores: Tensor = _OfAll.apply(  # type: ignore[no-untyped-call]
        torch.stack([own.teacher_scores, own.student_scores], 1), n_samples
    )
    return Samples(
        _gather(own.image_features, n_images),
        images_of_parts(images, n_images),
        _gather(own.mask_tokens, n_samples),
        *scores.unbind(1),
    )


def announce_refusal(device: torch.device) -> None:
    """Let the other processes' :func:`gather_samples` raise: this one has no samples for it, and raises itself."""
    _gather_headers(_Header._make([0] * len(_Header._fields)), device)


class _Header(NamedTuple):
    """What the processes tell one another of their samples; without images, that there is none of them."""

    n_images: int
    n_samples: int
    has_index: int
    with_gradient: int
    n_channels: int
    height: int
    width: int
    n_tokens: int
    map_dtype: int
    token_dtype: int
    score_dtype: int

    def kind(self) -> str:
        """Return what must be the same in all processes."""
        dtypes = (_DTYPES[number] for number in (self.map_dtype, self.token_dtype, self.score_dtype))
        return (
            f"maps [{self.n_channels}, {self.height}, {self.width}], {self.n_tokens} tokens, "
            f"{', '.join(map(str, dtypes))}, {'with' if self.with_gradient else 'without'} gradient"
        )


def _header(own: Samples) -> _Header:
    n_images, n_channels, height, width = own.image_features.shape
    n_samples, n_tokens, _ = own.mask_tokens.shape
    return _Header(
        n_images,
        n_samples,
        own.images is not None,
        torch.is_grad_enabled(),
        n_channels,
        height,
        width,
        n_tokens,
        map_dtype=_DTYPES.index(own.image_features.dtype),
        token_dtype=_DTYPES.index(own.mask_tokens.dtype),
        score_dtype=_DTYPES.index(own.teacher_scores.dtype),
    )


def _gather_headers(own: _Header, device: torch.device) -> list[_Header]:
    rows = _gather(torch.tensor([own], device=device), [1] * n_processes())
    return [_Header._make(row) for row in rows.tolist()]


def _check_alike(function: str, headers: Sequence[_Header]) -> None:
    refused = [rank for rank, header in enumerate(headers) if not header.n_images]
    if refused:
        raise ValueError(
            f"{function}: every process must have features that fit under global_batch, got none of process "
            f"{refused[0]}; see the error that it raised"
        )
    for rank, header in enumerate(headers):
        if header.kind() != headers[0].kind():
            raise ValueError(
                f"{function}: features must be of one kind in all processes under global_batch, got "
                f"{headers[0].kind()} in process 0 and {header.kind()} in process {rank}; use one image size, one "
                "token=, one autocast, and gradients in all or in none"
            )


def _gather(own: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all processes, of which each has its number; without gradient."""
    most = max(counts)
    # Every process must send as much, laid out alike.
    sent = own.contiguous()
    if len(own) < most:
        sent = own.new_zeros(most, *own.shape[1:])
        sent[: len(own)] = own
    received = own.new_empty(len(counts), *sent.shape)
    distributed.all_gather(list(received), sent)
    if min(counts) == most:
        return received.flatten(0, 1)
    return torch.cat([rows[:n] for rows, n in zip(received, counts, strict=True)])


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: Sequence[int]) -> Tensor:
        first = sum(counts[: distributed.get_rank()])
        ctx.own, ctx.n_processes = slice(first, first + len(own)), len(counts)
        return _gather(own, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.n_processes * grad[ctx.own], None
