"""How far a loss looks for samples beside those of its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from renyi_kd.sam.features import SAMFeatures, images_of_pair
from renyi_kd.samples.agreement import meeting
from renyi_kd.samples.bank import SampleBank
from renyi_kd.samples.processes import gather_samples, n_processes
from renyi_kd.samples.samples import Join, Samples


class Scope(NamedTuple):
    """Which samples a loss goes over.

    Attributes:
        global_batch: whether those of all processes of the group.
        bank: adds samples of earlier steps and keeps those of this one; None for none.
        group: of the processes that train together; None for the default one.

    """

    global_batch: bool = False
    bank: SampleBank | None = None
    group: distributed.ProcessGroup | None = None

    @property
    def spans_processes(self) -> bool:
        """Whether there are other processes to exchange samples with."""
        return self.global_batch and n_processes(self.group) > 1

    @property
    def joins(self) -> bool:
        """Whether there are samples beside those of the batch."""
        return self.spans_processes or self.bank is not None

    def images(
        self, function: str, teacher: SAMFeatures, student: SAMFeatures, *, least: int, check_finite: bool
    ) -> list[int] | None:
        """Return what :func:`images_of_pair` does of enough samples.

        ``least`` is how many samples the loss needs, wherever they come from.
        """
        # Those of all processes are counted when they are together.
        least = 0 if self.spans_processes else 1 if self.bank is not None else least
        return images_of_pair(function, teacher, student, least=least, check_finite=check_finite)

    def join(
        self,
        function: str,
        settings: Mapping[str, object],
        relation: nn.Module,
        gram: Callable[[Tensor], Tensor],
        *,
        least: int,
    ) -> Join:
        """Return what adds the samples of other processes and then those of earlier steps.

        Args:
            function: whose messages there are.
            settings: of the loss, which must be the same in all processes.
            relation: the module whose weights must be the same.
            gram: from maps to their inner products ``[b, b]`` in fp64.
            least: how many samples the loss needs, wherever they come from.

        """
        spans_processes, bank, group = self.spans_processes, self.bank, self.group

        def join(samples: Samples) -> Samples:
            if spans_processes:
                # Kept maps are whole: one process may write them into a checkpoint that all of them read.
                gram_of_parts, n_needed = (gram, least) if bank is None else (None, 1)
                with meeting(function, group=group):
                    samples = gather_samples(
                        function, samples, settings, relation, gram_of_parts, least=n_needed, group=group
                    )
            return samples if bank is None else bank.join(samples)

        # Dynamo cannot trace the exchange, and would compile anew every step in which the bank grows. Not in eager
        # mode, as the name alone would import the compiler.
        return torch.compiler.disable(join) if torch.compiler.is_compiling() else join  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        # PyTorch copies no group. A copy of the loss trains with the same processes.
        return self._replace(bank=copy.deepcopy(self.bank, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError(
                "InfoSAMLoss: process_group must be None in what is pickled, got a group, which is known in this "
                "program alone; save infosam_loss.state_dict() instead"
            )
        return Scope, tuple(self)
