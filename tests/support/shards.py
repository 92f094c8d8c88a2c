"""Four processes over gloo that hold samples together; each saves what it found of their entropies.

    python -m tests.support.shards FOLDER RANK

Every check is run once here, for starting the processes takes longer than all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, distributed, nn

import renyi_kd
from renyi_kd import RBF, Linear, Polynomial, feature_entropy
from renyi_kd.ops.gram_moment import reference, ring
from tests.support import randn
from tests.support.kernels import value_and_gradients
from tests.support.memory import LargestNewTensor
from tests.support.started import run_processes

N_PROCESSES = 4
# By number of processes; none but the last begins with process 0.
MEMBERS = {2: [1, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3]}
KERNELS = {"linear": Linear(), "rbf": RBF(1.5), "median": RBF(), "cubic": Polynomial(3, 0.5)}
# Of a whole number of them, every third is taken: 4,103 samples are twice 2,048 and a few.
MANY = [1500, 0, 2600, 3]
LONG, WIDE, TILE_BYTES = 500, 100, 40_000


class Case(NamedTuple):
    """What the entropy of samples in several processes is taken of.

    Attributes:
        function: its name.
        counts: samples of each process.
        kernels: of each variable, by name.
        seed: of the features.

    """

    function: str
    counts: Sequence[int]
    kernels: Sequence[str]
    seed: int

    def features(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return those of all samples, of which two are alike and one is zero."""
        features = [
            0.4 + randn(sum(self.counts), 3 + 2 * k, seed=self.seed + k, dtype=dtype) for k in range(len(self.kernels))
        ]
        if sum(self.counts) > 4:
            features[0][-1] = features[0][0]
            features[0][2] = 0
        return features

    def computed(self, features: Sequence[Tensor], group: Any = None) -> list[Tensor]:
        """Return the value and the gradients."""
        kernels = [KERNELS[name] for name in self.kernels]
        return value_and_gradients(getattr(renyi_kd, self.function), *features, kernel=kernels, process_group=group)


def run_checks(folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Run all checks in four processes and return what each of them saved."""
    torch.save([tuple(case) for case in cases], folder / "cases.pt")
    return run_processes(__name__, folder, N_PROCESSES)


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_PROCESSES)
    groups = {n: distributed.new_group(members) for n, members in MEMBERS.items()}
    found: dict[str, Any] = {"cases": [case_of(rank, Case(*case), groups) for case in torch.load(folder / "cases.pt")]}
    for check in CHECKS:
        found[check.__name__] = said(check, rank)
    found["refusals"] = {name: said(call, rank) for name, call in REFUSALS.items()}
    found["a_process_that_leaves"] = said(lambda r: a_process_that_leaves(r, folder, found), rank)
    torch.save(found, folder / f"{rank}.pt")
    # No farewell to a process that has left.
    os._exit(0)


def said(check: Callable[[int], Any], rank: int) -> Any:
    """Return what a check returns, or the message of its error."""
    try:
        return check(rank)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def case_of(rank: int, case: Case, groups: dict[int, Any]) -> list[Tensor] | None:
    """Return what a process gets for its part; nothing for one that is not asked."""
    members = MEMBERS[len(case.counts)]
    if rank not in members:
        return None
    own = [x.split(list(case.counts))[members.index(rank)] for x in case.features()]
    return case.computed(own, groups[len(members)])


def own_part(rank: int, case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [x.split(list(case.counts))[rank] for x in case.features(dtype)]


SMALL = Case("feature_entropy", [5, 0, 9, 3], ["median", "linear"], seed=3)


def low_precision(rank: int) -> Any:
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            found[str(dtype)] = SMALL.computed(own_part(rank, SMALL, dtype), distributed.group.WORLD)
    return found


def median_of_many(rank: int) -> Any:
    x = randn(sum(MANY), 2).split(MANY)[rank]
    return feature_entropy(x, kernel="rbf", process_group=distributed.group.WORLD)


def averaged_parameters(rank: int) -> Any:
    """Return the gradient of a layer, averaged as DDP does, whose outputs on all samples make the entropy."""
    model = layer()
    x = randn(12, 3, seed=5).split([2, 4, 1, 5])[rank]
    feature_entropy(model(x), kernel=RBF(1.5), process_group=distributed.group.WORLD).backward()
    distributed.all_reduce(model.weight.grad)
    return model.weight.grad / N_PROCESSES


def layer() -> nn.Linear:
    model = nn.Linear(3, 4)
    model.weight.data = randn(4, 3, seed=6)
    model.bias.data = randn(4, seed=7)
    return model


def memory_and_bytes(rank: int) -> Any:
    """Return the largest new tensor, and the bytes that arrive in the forward and in both passes."""
    x = randn(LONG, WIDE, seed=rank).requires_grad_()
    arrived = []
    start = distributed.batch_isend_irecv

    def counted(operations: list[distributed.P2POp]) -> Any:
        arrived.append(sum(op.tensor.nbytes for op in operations if op.op is distributed.irecv))
        return start(operations)

    with (
        mock.patch.object(distributed, "batch_isend_irecv", counted),
        mock.patch.object(reference, "BLOCK_ELEMENTS", TILE_BYTES // 4),
        LargestNewTensor() as largest,
    ):
        value = feature_entropy(x, process_group=distributed.group.WORLD)
        of_forward = sum(arrived)
        torch.autograd.grad(value, x)
    return [largest.bytes, of_forward, sum(arrived)]


def second_derivative(rank: int) -> Any:
    x = randn(3, 2, seed=rank).requires_grad_()
    try:
        torch.autograd.grad(feature_entropy(x, process_group=distributed.group.WORLD), x, create_graph=True)
    except NotImplementedError as error:
        return str(error)


CHECKS = [low_precision, median_of_many, averaged_parameters, memory_and_bytes, second_derivative]


def refusal(*, name: str = "feature_entropy", other: str = "feature_entropy", **of_one: Any) -> Callable[[int], Any]:
    """Return a call of all processes that is another in process 1."""

    def call(rank: int) -> Any:
        settings: dict[str, Any] = {"n": 3, "d": 2, "dtype": torch.float32, "kernel": "linear", "variables": 2}
        settings.update(gradient=False, impl="auto")
        if rank == 1:
            settings.update(of_one)
        shape, dtype = (settings["n"], settings["d"]), settings["dtype"]
        features = [torch.ones(shape, dtype=dtype) for _ in range(settings["variables"])]
        if settings["gradient"]:
            features[0].requires_grad_()
        function = getattr(renyi_kd, other if rank == 1 else name)
        return function(
            *features, kernel=settings["kernel"], impl=settings["impl"], process_group=distributed.group.WORLD
        )

    return call


def no_sample_in_any(_rank: int) -> Any:
    return feature_entropy(torch.ones(0, 2), process_group=distributed.group.WORLD)


def kernels_of_one_process(_rank: int) -> Any:
    return feature_entropy(torch.ones(3, 2), impl="triton", process_group=distributed.group.WORLD)


REFUSALS = {
    "width": refusal(d=3),
    "dtype": refusal(dtype=torch.float64),
    "kernel": refusal(kernel=RBF(2.0)),
    "number of variables": refusal(variables=3),
    "function": refusal(other="feature_mutual_information"),
    "gradient": refusal(gradient=True),
    "impl": refusal(impl="reference"),
    "one that refuses": refusal(dtype=torch.int64),
    "no sample": no_sample_in_any,
    "triton": kernels_of_one_process,
}


def a_process_that_leaves(rank: int, folder: Path, found: dict[str, Any]) -> Any:
    """Let process 2 leave after all have agreed, before any row is exchanged."""

    def leave(*_: Any) -> None:
        torch.save(found, folder / f"{rank}.pt")
        os._exit(0)

    if rank == 2:
        with mock.patch.object(ring, "gram_moment", leave):
            feature_entropy(torch.ones(3, 2), process_group=distributed.group.WORLD)
    return feature_entropy(torch.ones(3, 2), process_group=distributed.group.WORLD)


if __name__ == "__main__":
    main()
