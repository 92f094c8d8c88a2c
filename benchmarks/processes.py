"""Bytes that a process sends and receives in a step of the loss over all processes, counted, and the time with gloo.

    python -m benchmarks.processes --out benchmarks

Processes of one machine make steps over gloo. What each gives to a collective and gets from it is counted as the
tensors are: all that goes to another process or comes from one, whatever way a library takes. The count must be that of
a formula, which tells what more processes would exchange. Once the teacher's whole maps are exchanged, as with a bank,
and once channels of them. Appends to results/processes.csv and replaces assets/processes.png.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from torch import Tensor, distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.files import whole_file
from renyi_kd import Objective, RelationModule
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.feature_terms import Pair, feature_terms
from renyi_kd.samples.processes import gather_samples
from renyi_kd.samples.samples import Join, Samples

PROGRAM = "benchmarks.processes"
Exchange = Literal["whole maps", "channels"]
# Numbers of processes of the picture, and those of the table beyond the ones that run.
MOST_PROCESSES, BEYOND = 64, (8, 16, 32, 64)
SCORE_BYTES, GRAM_BYTES = 4, 8
COLOURS = {"whole maps": "#9A3B8F", "channels": "#0072B2"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What runs, and where the rows and the picture go.

    Attributes:
        out: folder of results/processes.csv and assets/processes.png.
        processes: how many run together, one number after the other.
        images: of each process, with one prompt each.
        channels: of the maps.
        side: pixels of a side of the maps.
        trials: steps of each kind, of which the least time counts.

    """

    out: Path
    processes: tuple[int, ...] = (2, 3, 4)
    images: int = 4
    channels: int = 256
    side: int = 64
    trials: int = 30


class Batch(NamedTuple):
    """What the processes have in a step.

    Attributes:
        images: of each process.
        samples: of each process.
        channels: of a map.
        pixels: of a map.
        tokens: of a sample.
        element_bytes: of a number in maps and tokens; scores have 4 bytes, or 8 where these have.

    """

    images: tuple[int, ...]
    samples: tuple[int, ...]
    channels: int
    pixels: int
    tokens: int = 1
    element_bytes: int = 4


class Bytes(NamedTuple):
    """What a process gives to the others and gets from them."""

    sent: int = 0
    received: int = 0


def traffic(batch: Batch, rank: int, exchange: Exchange) -> dict[str, Bytes]:
    """Return what a process exchanges in a step by what it is, without the headers that go before.

    With b_p images and s_p samples of process p of n, B and s in all, d channels of which it has k, and m bytes in a
    channel of a map:

        channels: (B - b) k m received, b (d - k) m sent, and for the Gram matrix 2 (n - 1) ceil(B^2 / n) 8 each way
        whole maps: (n - 1) max(b_p) d m each way

    Scores and tokens of all go to all, as many rows from each process as the largest has.
    """
    n = len(batch.images)

    def gathered(counts: Sequence[int], row_bytes: int) -> Bytes:
        each_way = (n - 1) * max(counts) * row_bytes
        return Bytes(each_way, each_way)

    score_bytes = max(SCORE_BYTES, batch.element_bytes)
    channel_bytes = batch.pixels * batch.element_bytes
    found = {
        "scores": gathered(batch.samples, 2 * batch.tokens * batch.pixels * score_bytes),
        "tokens": gathered(batch.samples, batch.tokens * batch.channels * batch.element_bytes),
    }
    if exchange == "whole maps":
        return {"maps": gathered(batch.images, batch.channels * channel_bytes), **found}
    every, over = divmod(batch.channels, n)
    n_all, n_own, n_channels = sum(batch.images), batch.images[rank], every + (rank < over)
    stretches = 2 * (n - 1) * math.ceil(n_all**2 / n) * GRAM_BYTES
    return {
        "maps": Bytes(
            n_own * (batch.channels - n_channels) * channel_bytes, (n_all - n_own) * n_channels * channel_bytes
        ),
        "Gram matrix": Bytes(stretches, stretches),
        **found,
    }


def total(parts: dict[str, Bytes]) -> Bytes:
    """Return the sum of what is exchanged."""
    return Bytes(*(sum(column) for column in zip(*parts.values(), strict=True)))


class CountedTraffic(TorchDispatchMode):
    """Counts the tensors of collectives, of floating-point numbers and of headers each for itself.

    Attributes:
        numbers: what went each way as floating-point numbers: maps, tokens, scores and Gram matrices.
        headers: what went as anything else: numbers of samples and what must be alike.
        collectives: how often the processes met.
        messages: how many tensors were sent to one other process each.

    """

    def __init__(self, rank: int, n_processes: int) -> None:
        super().__init__()
        self.rank, self.n_processes = rank, n_processes
        self.numbers, self.headers = Bytes(), Bytes()
        self.collectives = self.messages = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and "barrier" not in func.name():
            self._count(func.name(), args)
        return result

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "c10d::allgather_":
            (from_all,), (to_all,) = args[:2]
            sent = [to_all.nbytes] * len(from_all)
            received = [part.nbytes for part in from_all]
        elif name == "c10d::alltoall_base_":
            from_all, to_all, _, *splits = args[:5]
            received, sent = (
                [n * each.element_size() for n in counts or [each.numel() // self.n_processes] * self.n_processes]
                for each, counts in zip((from_all, to_all), splits, strict=True)
            )
        else:
            raise RuntimeError(f"{PROGRAM}: collectives must be those that are counted, got {name}; count it too")
        sent[self.rank] = received[self.rank] = 0
        before = self.numbers if to_all.is_floating_point() else self.headers
        after = Bytes(before.sent + sum(sent), before.received + sum(received))
        if to_all.is_floating_point():
            self.numbers = after
        else:
            self.headers = after
        self.collectives += 1
        self.messages += sum(n > 0 for n in sent)


def join_by(exchange: Exchange, relation: RelationModule) -> Join:
    """Return what adds the samples of all processes to those of one."""

    def join(samples: Samples) -> Samples:
        gram = batch_gram if exchange == "channels" else None
        return gather_samples(PROGRAM, samples, {}, relation, gram, least=2)

    return join


def step_of(options: Options, rank: int) -> Callable[[Exchange | None], Tensor]:
    """Return a step of the loss of a process, forward and backward, by an exchange or, by None, of its own samples."""
    generator = torch.Generator().manual_seed(rank)
    shapes = (options.images, options.channels, options.side, options.side), (options.images, 1, options.channels)
    features = [torch.randn(shape, generator=generator) for shape in (*shapes, *shapes)]
    pair = Pair(*features[:2], *(value.requires_grad_() for value in features[2:]))
    relation = RelationModule(options.channels)

    def step(exchange: Exchange | None) -> Tensor:
        join = None if exchange is None else join_by(exchange, relation)
        loss = feature_terms(pair, relation.value(pair.student_tokens), Objective(), join=join).loss
        loss.backward()
        return loss.detach()

    return step


def process(rank: int, n_processes: int, options: Options, folder: str) -> None:
    """Count and time the steps of one of several processes, and save what was found."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_processes)
    step = step_of(options, rank)
    found: list[dict[str, Any]] = []
    losses = []
    for exchange in get_args(Exchange):
        with CountedTraffic(rank, n_processes) as counted:
            losses.append(step(exchange))
        found.append(
            {
                "exchange": exchange,
                "collectives": counted.collectives,
                "messages": counted.messages,
                **{f"{way}_bytes": getattr(counted.numbers, way) for way in Bytes._fields},
                **{f"header_{way}_bytes": getattr(counted.headers, way) for way in Bytes._fields},
            }
        )
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    kinds: tuple[Exchange | None, ...] = (None, *get_args(Exchange))
    least = dict.fromkeys(kinds, math.inf)
    for _ in range(options.trials):
        for kind in kinds:
            distributed.barrier()
            start = time.perf_counter()
            step(kind)
            least[kind] = min(least[kind], time.perf_counter() - start)
    for row in found:
        row["time_ratio"] = least[row["exchange"]] / least[None]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def rows_of(n_processes: int, options: Options) -> list[dict[str, object]]:
    """Return what the process that exchanges most has exchanged, by exchange.

    Raises:
        RuntimeError: a count is not that of the formula.

    """
    n_images = (options.images,) * n_processes
    batch = Batch(n_images, n_images, options.channels, options.side**2)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (n_processes, options, folder), nprocs=n_processes)
        of_ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(n_processes)]
    rows: list[dict[str, object]] = []
    for of_exchange in zip(*of_ranks, strict=True):
        for rank, row in enumerate(of_exchange):
            expected = total(traffic(batch, rank, row["exchange"]))
            counted = Bytes(row["sent_bytes"], row["received_bytes"])
            if counted != expected:
                raise RuntimeError(
                    f"{PROGRAM}: the count must be that of the formula, got {counted} for {expected} in process {rank} "
                    f"of {n_processes} by {row['exchange']}; one of them is wrong"
                )
        most = {name: max(row[name] for row in of_exchange) for name in of_exchange[0]}
        sizes = {"b": options.images, "d": options.channels, "h": options.side, "w": options.side}
        rows.append({"processes": n_processes, **sizes, **most, "trials": options.trials})
    return rows


def draw(rows: Sequence[dict[str, Any]], options: Options, path: Path) -> None:
    """Write the picture: bytes that a process receives against the number of processes, counted and by the formula."""
    numbers = list(range(1, MOST_PROCESSES + 1))

    def batch(n: int) -> Batch:
        return Batch((options.images,) * n, (options.images,) * n, options.channels, options.side**2)

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for exchange in get_args(Exchange):
        by_formula = [total(traffic(batch(n), 0, exchange)).received / 2**20 for n in numbers[1:]]
        ax.plot(numbers[1:], by_formula, color=COLOURS[exchange], label=f"{exchange}: all that is received")
        ran = [row for row in rows if row["exchange"] == exchange]
        ax.plot(
            [row["processes"] for row in ran],
            [row["received_bytes"] / 2**20 for row in ran],
            "o", color=COLOURS[exchange], label=f"{exchange}: counted",
        )  # fmt: skip
    parts = [traffic(batch(n), 0, "channels") for n in numbers[1:]]
    for names, style in ((("maps",), "--"), (("scores", "tokens"), "-."), (("Gram matrix",), ":")):
        mib = [sum(part[name].received for name in names) / 2**20 for part in parts]
        ax.plot(numbers[1:], mib, color=COLOURS["channels"], linestyle=style, label=f"channels: {' and '.join(names)}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator([2, 3, 4, 8, 16, 32, 64]))
    ax.xaxis.set_minor_locator(NullLocator())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.4g}"))
    ax.set_ylim(bottom=2**-4)
    ax.set_xlabel("processes")
    ax.set_ylabel("MiB that a process receives in a step")
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def run(options: Options) -> None:
    """Run the processes, append the rows, write the picture, and print what was counted."""
    rows = [row for n in options.processes for row in rows_of(n, options)]
    results = options.out / "results/processes.csv"
    results.parent.mkdir(parents=True, exist_ok=True)
    environment = {**measure.environment(), "threads": 1}
    measure.append_rows(results, [{**row, **environment} for row in rows])
    draw(rows, options, options.out / "assets/processes.png")
    for row in rows:
        mib = {way: row[f"{way}_bytes"] / 2**20 for way in Bytes._fields}
        print(
            f"{row['processes']} processes, {row['exchange']}: {mib['received']:.1f} MiB received, {mib['sent']:.1f} "
            f"MiB sent, {row['collectives']} collectives, {row['time_ratio']:.1f} times the local loss"
        )


def main(argv: Sequence[str] | None = None) -> None:
    with sentence_at_fault(PROGRAM):
        run(parsed(Options, PROGRAM, __doc__, argv))


if __name__ == "__main__":
    main()
