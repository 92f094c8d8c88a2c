"""Samples that lie in several processes: what these agree on, and how rows get from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class Shards(NamedTuple):
    """One set of samples, in the order of the ranks of the processes that hold them.

    Attributes:
        function: whose messages these are.
        group: of the processes.
        rank: of this process in the group.
        counts: samples of each process; some may have none.

    """

    function: str
    group: ProcessGroup
    rank: int
    counts: tuple[int, ...]

    @property
    def n_samples(self) -> int:
        """Of all processes together."""
        return sum(self.counts)

    @property
    def n_hops(self) -> int:
        """Steps of a ring after which every pair of processes has met."""
        return len(self.counts) // 2

    def total(self, own: Tensor) -> Tensor:
        """Return the sum over all processes, in the order of their ranks: bit for bit the same in each."""
        return self._of_all(own).sum(0)

    def every(self, step: int, own: Tensor) -> Tensor:
        """Return one of every ``step`` rows of all processes, beginning with the first, in at least fp32."""
        starts = [sum(self.counts[:rank]) for rank in range(len(self.counts))]
        kept = [range(-start % step, count, step) for start, count in zip(starts, self.counts, strict=True)]
        most = max(map(len, kept))
        # Under autocast a CPU joins no rows in float16.
        sent = own.new_zeros(most, own.shape[1], dtype=torch.promote_types(own.dtype, torch.float32))
        sent[: len(kept[self.rank])] = own[-starts[self.rank] % step :: step]
        return torch.cat([rows[: len(k)] for rows, k in zip(self._of_all(sent), kept, strict=True)])

    def _of_all(self, own: Tensor) -> Tensor:
        received = own.new_empty(len(self.counts), *own.shape)
        with _taking_part(self.function, "all processes of the group"):
            distributed.all_gather(list(received), own.contiguous(), group=self.group)
        return received

    def transfer(self, sent: Sequence[Tensor], to: int, source: int, n_rows: int) -> Transfer:
        """Begin to send rows to one process and to receive ``n_rows`` of the same kinds from another.

        Args:
            sent: contiguous; not to be changed before :meth:`Transfer.wait`.
            to: rank in the group, as that of ``source`` modulo the number of processes.
            source: that does the same at the same time.
            n_rows: which ``source`` sends.

        """
        to, source = (distributed.get_global_rank(self.group, rank % len(self.counts)) for rank in (to, source))
        partners = f"processes {to} and {source}" if to != source else f"process {to}"
        received = [rows.new_empty(n_rows, *rows.shape[1:]) for rows in sent]
        sends = [distributed.P2POp(distributed.isend, rows, to, self.group) for rows in sent if rows.numel()]
        receives = [distributed.P2POp(distributed.irecv, rows, source, self.group) for rows in received if rows.numel()]
        with _taking_part(self.function, partners):
            started = distributed.batch_isend_irecv([*sends, *receives]) if sends or receives else []
        return Transfer(self.function, partners, started, list(sent), received)


class Transfer(NamedTuple):
    """Rows on their way.

    Attributes:
        function: whose messages these are.
        partners: who receives and sends, in words.
        started: what to wait for.
        sent: which must live until then.
        received: which are whole from then on.

    """

    function: str
    partners: str
    started: Sequence[Work]
    sent: list[Tensor]
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        """Return the rows that were received.

        Raises:
            RuntimeError: a partner has stopped, or does not answer within the group's timeout.

        """
        with _taking_part(self.function, self.partners):
            for work in self.started:
                work.wait()
        return self.received


class Header(NamedTuple):
    """What a process tells the others before they begin.

    Attributes:
        n_samples: which it has.
        kind: what must be the same in all processes, in words.
        refusal: what it refuses, in words; empty if it does not.

    """

    n_samples: int
    kind: str
    refusal: str = ""


def agreed_shards(function: str, group: ProcessGroup, own: Header, device: torch.device) -> Shards:
    """Return the shards of processes whose samples are of one kind.

    Args:
        function: whose messages these are.
        group: all of whose processes call this.
        own: of this process; one that refuses its samples raises its own error afterwards.
        device: of the samples.

    Raises:
        ValueError: in every process, if kinds differ, another process refuses, or there is no sample in any.

    """
    headers: list[Header | None] = [None] * distributed.get_world_size(group)
    # NCCL takes the current device, which need not be that of the features.
    on_device = torch.cuda.device(device if device.type == "cuda" else -1)
    with on_device, _taking_part(function, "all processes of the group"):
        distributed.all_gather_object(headers, own, group=group)
    told = [header for header in headers if header is not None]
    ranks = distributed.get_process_group_ranks(group)
    for rank, header in zip(ranks, told, strict=True):
        if header.refusal and not own.refusal:
            raise ValueError(
                f"{function}: every process of the group must have features that fit, got none of process {rank}, "
                f"which raised: {header.refusal}"
            )
    for rank, header in zip(ranks, told, strict=True):
        if header.kind != told[0].kind and not own.refusal:
            raise ValueError(
                f"{function}: all processes of the group must call alike, got {told[0].kind} in process {ranks[0]} "
                f"and {header.kind} in process {rank}; use the same function, features of the same widths and "
                "dtypes, one kernel= and impl=, and gradients in all or in none"
            )
    shards = Shards(function, group, distributed.get_rank(group), tuple(header.n_samples for header in told))
    if not shards.n_samples and not own.refusal:
        raise ValueError(
            f"{function}: the processes of the group must have a sample together, got none in {len(ranks)} processes; "
            "give some of them features with n >= 1"
        )
    return shards


@contextmanager
def _taking_part(function: str, whom: str) -> Iterator[None]:
    """Say whom an exchange was with where it fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{function}: {whom} must take part in an exchange with this one, got {error}; see the error there, and "
            "call alike in all processes of the group, forward and backward"
        ) from error
