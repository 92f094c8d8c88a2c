"""How far a loss looks for samples beside those of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from renyi_kd.sam.features import SAMFeatures, images_of_pair
from renyi_kd.samples.agreement import meeting
from renyi_kd.samples.bank import SampleBank
from renyi_kd.samples.processes import gather_samples, n_processes
from renyi_kd.samples.samples import Join, Samples


class Scope(NamedTuple):
    """Which samples a loss goes over.

    Attributes:
        global_batch: whether those of all processes of the default group.
        bank: adds samples of earlier steps and keeps those of this one; None for none.

    """

    global_batch: bool = False
    bank: SampleBank | None = None

    @property
    def spans_processes(self) -> bool:
        """Whether there are other processes to exchange samples with."""
        return self.global_batch and n_processes() > 1

    def images(
        self, function: str, teacher: SAMFeatures, student: SAMFeatures, *, least: int, check_finite: bool
    ) -> list[int] | None:
        """Return what :func:`images_of_pair` does of enough samples.

        ``least`` is how many samples the loss needs, wherever they come from.
        """
        least = 1 if self.spans_processes or self.bank is not None else least
        return images_of_pair(function, teacher, student, least=least, check_finite=check_finite)

    def join(self, function: str, settings: Mapping[str, object], relation: nn.Module) -> Join | None:
        """Return what adds the samples of other processes and then those of earlier steps; None for the batch alone.

        ``settings`` of the loss and the weights of ``relation`` must be the same in all processes.
        """
        spans_processes, bank = self.spans_processes, self.bank
        if not spans_processes and bank is None:
            return None

        def join(samples: Samples) -> Samples:
            if spans_processes:
                with meeting(function):
                    samples = gather_samples(function, samples, settings, relation)
            return samples if bank is None else bank.join(samples)

        # Dynamo cannot trace the exchange, and would compile anew every step in which the bank grows. Not in eager
        # mode, as the name alone would import the compiler.
        return torch.compiler.disable(join) if torch.compiler.is_compiling() else join  # type: ignore[no-untyped-call]
