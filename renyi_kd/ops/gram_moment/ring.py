r"""The moment of samples that lie in several processes, whose features travel round a ring.

Each process has rows of its own, of which no other number than theirs need be the same. A hop hands the visiting rows
to the next process. At hop h those of the process h ranks before meet the own ones. The pair of two processes is the
same from both sides, so that half of the hops do: ``P // 2`` of P processes. Of an even number the last hop would bring
each pair together twice, and each of the two processes takes half of it. So all do the same work, ``n^2 / (2 P)`` pairs
with equal shards.

The gradient makes the same hops. What the visitors get travels with them, and from the last host home in one step.
Memory of a process: its rows, two visitors, and in the gradient as much again. It receives ``P // 2`` times the rows of
others, in the gradient also their gradients. The next visitors travel while the present ones are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from renyi_kd.fp64 import fp64_device, has_fp64
from renyi_kd.gram import RBF, KnownKernel
from renyi_kd.ops.autograd import refuse_second_derivative
from renyi_kd.ops.gram_moment import reference
from renyi_kd.ops.gram_moment.shards import Shards


def gram_moment(features: Sequence[Tensor], kernels: Sequence[KnownKernel], shards: Shards) -> Tensor:
    """Return what :func:`reference.gram_moment` does of the samples of all processes, bit for bit alike in each.

    The gradient of each process's features is that of its samples, times the number of processes; it must be asked for
    in all of them or in none.

    Args:
        features: of this process, one ``[n_r, d_k]`` per variable, floating point; n_r may be 0.
        kernels: as there.
        shards: whose the samples are.

    Returns:
        ``[]`` in fp64. First derivatives.

    Raises:
        NotImplementedError: a second derivative is asked for.
        RuntimeError: another process has stopped, or does not answer within the group's timeout.

    """
    if not has_fp64(features[0].device):
        # Where no process group has a backend either.
        features = [x.to(fp64_device(x.device)) for x in features]
    moment: Tensor = _RingMoment.apply(shards, tuple(kernels), *features)  # type: ignore[no-untyped-call]
    return moment


class _RingMoment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, kernels: tuple[KnownKernel, ...], *features: Tensor) -> Tensor:
        ctx.shards, ctx.kernels = shards, kernels
        ctx.save_for_backward(*features)
        with torch.autocast(features[0].device.type, enabled=False):
            centres = ctx.centres = _centres(shards, kernels, features)
            own = _prepared(features, kernels, centres)
            moment = torch.zeros((), dtype=torch.float64, device=features[0].device)
            for hop, visiting in _visits(shards, features):
                if hop == 0:
                    moment += reference.moment_of_pairs(own, own)
                else:
                    rows, cols = share(shards, hop)
                    visitors = _prepared(visiting, kernels, centres)
                    moment += reference.moment_of_pairs(_part(own, rows), _part(visitors, cols))
            return shards.total(moment) + shards.n_samples

    @staticmethod
    def backward(ctx: Any, grad_moment: Tensor) -> tuple[Tensor | None, ...]:
        shards: Shards = ctx.shards
        refuse_second_derivative(shards.function, "use renyi_entropy(gram_matrix(features)) instead")
        features, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with torch.autocast(features[0].device.type, enabled=False):
            own = _prepared(features, ctx.kernels, ctx.centres)
            gradients = reference.no_gradients(own, needed)
            travelling: list[Tensor] = []
            for hop, visiting in _visits(shards, features):
                if hop == 0:
                    reference.add_gradients_of_pairs(own, gradients, own, gradients)
                    continue
                rows, cols = share(shards, hop)
                visitors = _prepared(visiting, ctx.kernels, ctx.centres)
                theirs = reference.no_gradients(visitors, needed)
                reference.add_gradients_of_pairs(
                    _part(own, rows), gradients.part(rows), _part(visitors, cols), theirs.part(cols)
                )
                found = _needed(reference.take_own_parts(visitors, theirs))
                _add(found, travelling)
                travelling = _handed_on(shards, hop, found)
            of_rows = reference.take_own_parts(own, gradients)
            _add(_needed(of_rows), travelling)
            return None, None, *reference.features_gradients(of_rows, len(shards.counts) * grad_moment, features)


def _visits(shards: Shards, features: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield at hop h the features of the process h ranks before, first the own ones; the next ones are on their way."""
    visiting: Sequence[Tensor] = [x.detach().contiguous() for x in features]
    for hop in range(shards.n_hops):
        before = shards.rank - hop - 1
        transfer = shards.transfer(visiting, shards.rank + 1, shards.rank - 1, shards.counts[before])
        yield hop, visiting
        visiting = transfer.wait()
    yield shards.n_hops, visiting


def share(shards: Shards, hop: int) -> tuple[slice, slice]:
    """Return which of the own rows meet which of the visitors at a hop."""
    everything = slice(None)
    if 2 * hop < len(shards.counts):
        return everything, everything
    # The visitors' process has the own rows as its visitors: the lower half of the lower one's rows stays at home.
    if shards.rank < hop:
        return slice(shards.counts[shards.rank] // 2), everything
    return everything, slice(shards.counts[shards.rank - hop] // 2, None)


def _handed_on(shards: Shards, hop: int, found: list[Tensor]) -> list[Tensor]:
    """Send the gradients of visitors after them, or home after the last hop; return those that come in their place."""
    if hop < shards.n_hops:
        to, source, whose = shards.rank + 1, shards.rank - 1, shards.rank - hop - 1
    else:
        to, source, whose = shards.rank - hop, shards.rank + hop, shards.rank
    return shards.transfer(found, to, source, shards.counts[whose]).wait()


def _centres(shards: Shards, kernels: Sequence[KnownKernel], features: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of all samples of every RBF variable, in fp64."""
    centres: list[Tensor | None] = []
    for x, kernel in zip(features, kernels, strict=True):
        mean = shards.total(x.sum(0, dtype=torch.float64)) / shards.n_samples if isinstance(kernel, RBF) else None
        centres.append(mean)
    return centres


def _prepared(
    features: Sequence[Tensor], kernels: Sequence[KnownKernel], centres: Sequence[Tensor | None]
) -> list[reference.Variable]:
    return [reference.prepare(*of_variable) for of_variable in zip(features, kernels, centres, strict=True)]


def _part(variables: Sequence[reference.Variable], samples: slice) -> list[reference.Variable]:
    return [variable.part(samples) for variable in variables]


def _needed(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad for grad in gradients if grad is not None]


def _add(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to gradients those of the same rows that others have found, if any have."""
    for grad, other in zip(gradients, others, strict=bool(others)):
        grad += other
