"""What processes tell one another before they exchange samples, so that all go on or all stop.

Each writes the number of its exchange into the store of the process group before it takes part. Where one fails, those
that are left read there who is missing, and name it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import distributed, nn

from renyi_kd.sam.memory import version
from renyi_kd.samples.samples import Samples

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Of an exchange that failed: how long the late are waited for, before they are named with the lost; in seconds.
_PATIENCE = 2.0
# How often the weights of a module are compared, as each time the host waits for the device.
_COMPARED_WEIGHTS = 3

# How many exchanges this process has begun in a group, and the last that came to its end.
_begun: WeakKeyDictionary[distributed.ProcessGroup, int] = WeakKeyDictionary()
_ended: WeakKeyDictionary[distributed.ProcessGroup, int] = WeakKeyDictionary()
# Of a module whose weights were compared: how often, their version then, and the number of their bits; None at the end.
_compared: WeakKeyDictionary[nn.Module, tuple[int, int, str | None]] = WeakKeyDictionary()


class Header(NamedTuple):
    """What the processes tell one another of a step.

    Attributes:
        alike: what must be the same in all processes that have it, by name.
        n_images: of this process.
        n_samples: likewise.
        images: the image of each sample; None when sample i belongs to image i.

    """

    alike: Mapping[str, object]
    n_images: int = 0
    n_samples: int = 0
    images: Sequence[int] | None = None


def exchange_headers(
    function: str,
    own: Samples,
    settings: Mapping[str, object],
    relation: nn.Module,
    *,
    group: distributed.ProcessGroup | None = None,
) -> list[Header]:
    """Return the headers of all processes of a group, which must be alike; within a :func:`meeting`.

    Args:
        function: whose messages these are.
        own: samples of this process.
        settings: what must be the same in all processes beside the kind of the samples, by name.
        relation: the module whose weights must be the same: those of the first step, and after the first two changes.
        group: of the processes; None for the default one.

    Raises:
        ValueError: in every process, if shapes, dtypes, gradient modes, settings or weights differ, or a process has
            raised before it came here, see :func:`telling_of_errors`.

    """
    maps, tokens = own.image_features, own.mask_tokens
    alike: dict[str, object] = {
        "maps": list(maps.shape[1:]),
        "tokens": list(tokens.shape[1:]),
        "dtype of maps": maps.dtype,
        "dtype of tokens": tokens.dtype,
        "dtype of scores": own.teacher_scores.dtype,
        "gradients": "on" if torch.is_grad_enabled() else "off",
        "sample_weight": "none" if own.weight is None else "given",
        **settings,
    }
    weights = _weights_to_compare(relation)
    if weights is not None:
        alike["checksum of the relation module"] = weights
    return _exchange(function, Header(alike, len(maps), len(tokens), own.images), maps.device, group)


def agree(
    function: str,
    settings: Mapping[str, object],
    device: torch.device,
    *,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Raise in every process, as :func:`exchange_headers` does, unless all have these settings."""
    with meeting(function, group=group):
        _exchange(function, Header(settings), device, group)


@contextmanager
def meeting(function: str, *, group: distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Take part in an exchange; where it fails, raise with the processes that are missing.

    That is after the timeout of the group at the latest, where the backend raises then as gloo does, and at once where
    it tells of a lost connection. It is two seconds more if there are processes that neither fail nor seem to be lost.

    Args:
        function: whose message it is.
        group: of the processes; None for the default one.

    Raises:
        RuntimeError: a process has died, hangs, or does something else.

    Cost: writing a number into the group's store, without an answer.

    """
    of_all = _group(group)
    rank, store = distributed.get_rank(of_all), _store(of_all)
    number = _begun[of_all] = _begun.get(of_all, 0) + 1
    try:
        if store is not None:
            store.set(f"renyi_kd/begun/{rank}", str(number))
            if number == 1:
                store.set(f"renyi_kd/failed/{rank}", "0")
        yield
        _ended[of_all] = number
    except RuntimeError as error:
        # Those of memory and the like are this process's own.
        if type(error) is not RuntimeError and not isinstance(error, distributed.DistError):
            raise
        said = re.sub(r"^\[[^]]*\.\w+:\d+\] ", "", str(error)).partition(". ")[0].partition("\n")[0]
        raise RuntimeError(
            f"{function}: every process must take part in an exchange of the loss, got {_missing(of_all, number)} "
            f"({said}); see what that process said last, and let every process call the loss equally often"
        ) from error


@contextmanager
def telling_of_errors(
    device: torch.device, *, exchanges: bool = True, group: distributed.ProcessGroup | None = None
) -> Iterator[None]:
    """Let the other processes hear of an error, before this one raises it.

    Args:
        device: of the features.
        exchanges: whether the others wait in :func:`exchange_headers` or :func:`agree`, which then raise at once. Else,
            and where this process has begun an exchange of its own before, they read the error when theirs fails.
        group: of the processes; None for the default one.

    """
    of_all = _group(group)
    before = _begun.get(of_all, 0)
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        # In a compiled loss this is traced, as no exchange can be. To import the compiler is no matter now.
        tell = torch.compiler.disable(_tell)  # type: ignore[no-untyped-call]
        tell(said, device, of_all, exchanges=exchanges and _begun.get(of_all, 0) == before)
        raise


def _tell(said: str, device: torch.device, of_all: distributed.ProcessGroup, *, exchanges: bool) -> None:
    """Tell the others of an error in an exchange, or leave it where they look; not of one that all of them have had."""
    begun, ended = _begun.get(of_all, 0), _ended.get(of_all, 0)
    # They fail by themselves where they cannot be told.
    with suppress(RuntimeError):
        store = _store(of_all)
        if exchanges:
            with meeting("telling of it", group=of_all):
                _all_gather(said, device, of_all)
        elif begun == ended and store is not None:
            store.set(f"renyi_kd/error/{distributed.get_rank(of_all)}", f"{begun} {said}")


def _exchange(function: str, own: Header, device: torch.device, group: distributed.ProcessGroup | None) -> list[Header]:
    """Return what every process has sent, if it is alike."""
    of_all = _group(group)
    received = _all_gather(own, device, of_all)
    errors = {rank: each for rank, each in enumerate(received) if isinstance(each, str)}
    if errors:
        said = ", and ".join(f"{_processes([rank], of_all)}, which raised {error}" for rank, error in errors.items())
        raise ValueError(f"{function}: every process must have features that fit, got none of {said}; see its error")
    headers = [each for each in received if isinstance(each, Header)]
    differences = []
    for name in dict.fromkeys(name for header in headers for name in header.alike):
        ranks: dict[str, list[int]] = {}
        for rank, header in enumerate(headers):
            if name in header.alike:
                ranks.setdefault(str(header.alike[name]), []).append(rank)
        if len(ranks) > 1:
            values = (f"{value} in {_processes(those, of_all)}" for value, those in ranks.items())
            differences.append(f"{name}: {' and '.join(values)}")
    if differences:
        raise ValueError(
            f"{function}: features and settings must be of one kind in all processes, got {', '.join(differences)}; "
            "use one image size, one autocast and one set of arguments, gradients and sample_weight in all or in none, "
            "and wrap the loss like the model"
        )
    return headers


def _all_gather(own: Header | str, device: torch.device, of_all: distributed.ProcessGroup) -> list[Header | str]:
    received: list[Header | str] = [""] * distributed.get_world_size(of_all)
    # NCCL takes the current device, which need not be that of the features.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        distributed.all_gather_object(received, own, group=of_all)
    return received


def _weights_to_compare(relation: nn.Module) -> str | None:
    """Return a number of all bits of the weights; None once they have changed often enough since the first step."""
    n_compared, before, compared = _compared.get(relation, (0, -1, None))
    if n_compared and compared is None:
        return None
    weights = list(relation.parameters())
    now = sum(map(version, weights))
    if now == before:
        # Again, as they may have changed elsewhere.
        return compared
    if n_compared == _COMPARED_WEIGHTS:
        _compared[relation] = n_compared, now, None
        return None
    # Odd factors, so that no single bit changes unseen; whole numbers, whose sum is the same in any order.
    bits = torch.cat([weight.detach().flatten().view(torch.int16) for weight in weights]).long()
    number = (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum().item()
    compared = f"{int(number) % 2**64:016x}"
    _compared[relation] = n_compared + 1, now, compared
    return compared


def _missing(of_all: distributed.ProcessGroup, number: int) -> str:
    """Return which processes an exchange failed for, in words."""
    own = distributed.get_rank(of_all)
    others = [rank for rank in range(distributed.get_world_size(of_all)) if rank != own]
    store, until = _store(of_all), time.monotonic() + _PATIENCE
    if store is None:
        return "an error, without a store in which the processes could say who is missing"
    late, silent, errors = others, others, ""
    try:
        while True:
            late = [
                rank for rank, begun in zip(others, _numbers(store, "begun", others), strict=True) if begun < number
            ]
            errors = "".join(map(partial(_error_of, store, of_all), late))
            # Only now, as the process that keeps the store may end once all have told.
            store.set(f"renyi_kd/failed/{own}", str(number))
            failed = zip(others, _numbers(store, "failed", others), strict=True)
            silent = [rank for rank, last in failed if last < number and rank not in late]
            if (not silent and len(late) < 2) or time.monotonic() > until:
                break
            time.sleep(0.02)
    except RuntimeError:
        if silent is others and (not late or late is others):
            return "no answer from the store of the process group, which most often lives in process 0"
    if late:
        return f"nothing from {_processes(late, of_all)}, which died, hangs or does something else{errors}"
    if silent:
        return f"no end of it from {_processes(silent, of_all)}, which died or hangs in it"
    return "an error in each of them"


def _numbers(store: Store, what: str, ranks: Sequence[int]) -> list[int]:
    """Return the last exchange that each process has begun, or that failed for it."""
    keys = [f"renyi_kd/{what}/{rank}" for rank in ranks]
    if store.check(keys):
        return list(map(int, store.multi_get(keys)))
    return [int(store.get(key)) if store.check([key]) else 0 for key in keys]


def _error_of(store: Store, of_all: distributed.ProcessGroup, rank: int) -> str:
    """Return what a process raised, unless it has begun an exchange since."""
    key = f"renyi_kd/error/{rank}"
    if not store.check([key]):
        return ""
    begun, _, error = store.get(key).decode().partition(" ")
    return f"; {_processes([rank], of_all)} raised {error}" if [int(begun)] == _numbers(store, "begun", [rank]) else ""


def _processes(ranks: Sequence[int], of_all: distributed.ProcessGroup) -> str:
    """Name processes as all of the program do, whatever their rank in the group."""
    shown = [str(distributed.get_global_rank(of_all, rank)) for rank in ranks[:8]]
    if len(ranks) > 8:
        shown.append(f"{len(ranks) - 8} others")
    return f"process {shown[0]}" if len(shown) == 1 else f"processes {', '.join(shown[:-1])} and {shown[-1]}"


def _group(group: distributed.ProcessGroup | None) -> distributed.ProcessGroup:
    found = distributed.group.WORLD if group is None else group
    assert found is not None
    return found


def _store(group: distributed.ProcessGroup) -> Store | None:
    """Return the store of a group; MPI has none."""
    # By this name in every version from 2.7 on.
    store: Store | None = distributed.distributed_c10d._get_process_group_store(group)
    return store
