"""Instructions and bytes of the kernels that read a map, counted in the machine code for one GPU; nothing is timed.

    python -m benchmarks.instructions --label "with statistics"

The launches of a step are compiled for sm_90 without a GPU, and disassembled with the tools that come with Triton. An
instruction counts as often as the loops around it turn, once per warp and program; a branch counts as not taken.
Divided by what an H100 can issue, and the bytes by what its memory can deliver, they are two lower bounds of a launch's
time. The larger one says what bounds it. Neither is a time measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pandas
import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.markdown import markdown
from benchmarks.measure import append_rows, environment
from renyi_kd.ops.batch_gram import triton as batch_gram
from renyi_kd.ops.feature_terms import backward_kernel, teacher_kernel
from renyi_kd.ops.relation_scores import triton as relation_scores
from tests.support.ahead_of_time import TARGETS, compiling

PROGRAM = "benchmarks.instructions"
TARGET = TARGETS["sm_90"].gpu
# An H100 SXM: schedulers, each one warp-instruction a cycle; boost clock; a copy's bytes a second.
SCHEDULERS, CLOCK, BANDWIDTH = 528, 1.755e9, 3.0e12
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is counted.

    Attributes:
        label: of the rows, to tell one state of the kernels from another.
        batches: numbers of images.
        dtypes: of the features.
        only: counts kernels whose name holds this alone.
        out: CSV file that gets the rows; none if left out.

    """

    label: str = ""
    batches: tuple[int, ...] = (4, 16, 64)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    only: str = ""
    out: Path | None = None


class Launch(NamedTuple):
    """A kernel with its grid, the values of its arguments by name, and what was compiled."""

    kernel: Any
    grid: tuple[int, ...]
    values: dict[str, Any]
    compiled: Any


class Code(NamedTuple):
    """Machine code: opcodes by address, loops as first and last address, registers and bytes of stack of a thread."""

    opcodes: dict[int, str]
    loops: list[tuple[int, int]]
    registers: int
    stack: int


def recorded(call: Callable[[], object]) -> list[Launch]:
    """Return the launches that a call makes, compiled."""
    launches: list[Launch] = []
    original = JITFunction.__getitem__

    def stand_in(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **keywords: Any) -> Any:
            compiled = original(kernel, grid)(*args, **keywords)
            own = {name: value for name, value in keywords.items() if name in kernel.arg_names}
            values = dict(inspect.signature(kernel.fn).bind(*args, **own).arguments)
            launches.append(Launch(kernel, grid, values, compiled))
            return compiled

        return launch

    with mock.patch.object(JITFunction, "__getitem__", stand_in):
        call()
    return launches


def disassembled(compiled: Any) -> Code:
    """Return the machine code of a compiled kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "--dump-resource-usage")
        )
    opcodes, loops = {}, []
    for line in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+)?([A-Z]\S*)([^;]*);", text):
        address, opcode = int(line[1], 16), line[2]
        opcodes[address] = opcode
        target = re.search(r"0x([0-9a-f]+)", line[3]) if opcode.startswith("BRA") else None
        # The last branch of all goes to itself, for the padding behind it.
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Code(opcodes, sorted(loops), int(registers), int(stack))


def trips(launch: Launch) -> list[int]:
    """Return how often the loops of a kernel turn, in the order of its lines."""
    v = launch.values
    name = launch.kernel.__name__
    if name == "_teacher_pass_kernel":
        n_turns = triton.cdiv(v["n_channels"], v["BLOCK_K"] if v["CHANNELS_LAST"] else v["BLOCK_L"])
        for_means = triton.cdiv(v["n_channels"], v["BLOCK_W"])
        return [for_means, for_means, v["n_steps"], n_turns]
    if name == "_batch_gram_fwd_kernel":
        return [v["n_steps"]]
    if name == "_relation_scores_fwd_kernel":
        return [triton.cdiv(v["n_channels"], v["BLOCK_C"])]
    if name == "_relation_scores_bwd_kernel" and v["ONE_ROW"]:
        return [v["n_steps"]]
    if name == "_feature_terms_bwd_kernel":
        # Of the teacher's maps and of the student's: pixels, and samples whose maps are mixed.
        return [v["n_steps"], triton.cdiv(v["n_samples"], v["BLOCK_S"])] * 2
    raise ValueError(f"{PROGRAM}: a kernel must have its loops named, got {name}; add them to trips")


def warp_instructions(code: Code, turns: Sequence[int]) -> int:
    """Return how many instructions a warp runs, those that do nothing left out."""
    turns = list(turns)
    while len(turns) > len(code.loops) and 1 in turns:
        # A loop that is known to turn once is none, and one of those that turn once is as good as another.
        turns.remove(1)
    if len(turns) != len(code.loops):
        raise ValueError(f"{PROGRAM}: loops must be those of the source, got {code.loops} for {turns}")
    total = 0
    for address, opcode in code.opcodes.items():
        times = 1
        for (first, last), n in zip(code.loops, turns, strict=True):
            times *= n if first <= address <= last else 1
        total += times if opcode != "NOP" else 0
    return total


def moved_bytes(launch: Launch) -> int:
    """Return the bytes of all arguments: what memory must move at least."""
    tensors = [value for value in launch.values.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in tensors)


def step(samples: int, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Callable[[], object]]:
    """Return the calls of a step that read a map, by the name of what they do."""
    x = torch.empty(samples, 256, 64, 64, dtype=dtype).contiguous(memory_format=layout)
    directions, offsets = torch.empty(samples, 1, 256), torch.empty(samples, 1)
    scores, grad = torch.empty(2, samples, 1, 4096)
    statistics, sums = relation_scores.empty_statistics(x, samples), relation_scores.empty_sums(x, samples)
    backward = [x, directions, offsets, scores, statistics, grad]
    mix, upstream = torch.empty(3, samples, samples, dtype=torch.float64), torch.empty(())
    calls: dict[str, Callable[[], object]] = {
        "teacher pass": lambda: teacher_kernel.launch(x, directions[:, 0], offsets[:, 0], 1e-5, statistics),
        "image Gram alone": lambda: batch_gram.launch_forward(batch_gram.flat(x)),
        "student's scores": lambda: relation_scores.launch_forward(x, directions, offsets, 1e-5, statistics),
        "teacher's sums": lambda: relation_scores.launch_backward(*backward, None, sums),
        "student's gradient": lambda: relation_scores.launch_backward(*backward, torch.empty_like(x), sums),
    }
    if samples <= backward_kernel.MAX_SAMPLES:
        calls["backward of both"] = lambda: backward_kernel.launch_backward_of_both(
            (x, torch.empty_like(x)),
            torch.empty_like(x),
            directions.new_empty(2 * samples, 256),
            offsets.new_empty(2 * samples),
            (scores[:, 0], grad[:, 0]),
            relation_scores.empty_statistics(x, 2 * samples),
            mix,
            (upstream, None, None),
            1.0,
            0.5,
            False,
        )
    return calls


def rows(options: Options) -> list[dict[str, object]]:
    """Return a row per kernel, dtype, layout and number of images."""
    with compiling(TARGET, 0):
        return [
            row(options.label, task, dtype, layout, samples, launch)
            for samples, dtype, (layout, memory_format) in product(options.batches, options.dtypes, LAYOUTS.items())
            for task, call in step(samples, getattr(torch, dtype), memory_format).items()
            if options.only in task
            for launch in recorded(call)
        ]


def row(label: str, task: str, dtype: str, layout: str, samples: int, launch: Launch) -> dict[str, object]:
    """Return the row of a launch."""
    code, n_warps = disassembled(launch.compiled), launch.compiled.metadata.num_warps
    n_programs, per_warp = math.prod(launch.grid), warp_instructions(code, trips(launch))
    # Of two branches each program takes one, and as many take the one as the other.
    n_counted = n_programs / 2 if launch.kernel.__name__ == "_feature_terms_bwd_kernel" else n_programs
    n_bytes, n_instructions = moved_bytes(launch), int(per_warp * n_warps * n_counted)
    return {
        "label": label, "task": task, "dtype": dtype, "layout": layout, "b": samples,
        "kernel": launch.kernel.__name__, "programs": n_programs, "warps": n_warps,
        "registers": code.registers, "spilled": code.stack, "per_warp": per_warp,
        "warp_instructions": n_instructions, "issue_us": 1e6 * n_instructions / SCHEDULERS / CLOCK,
        "bytes": n_bytes, "bytes_us": 1e6 * n_bytes / BANDWIDTH,
    }  # fmt: skip


def table(found: list[dict[str, object]]) -> pandas.DataFrame:
    """Return millions of warp-instructions, and both bounds in microseconds, with a column per number of images."""
    values = pandas.DataFrame(found).astype({"b": str})
    values["cell"] = [
        f"{n / 1e6:.2f} M: {issue:.1f} / {memory:.1f}"
        for n, issue, memory in zip(values.warp_instructions, values.issue_us, values.bytes_us, strict=True)
    ]
    return (
        values.pivot_table(index=["task", "dtype", "layout"], columns="b", values="cell", aggfunc="first", sort=False)
        .fillna("")
        .reset_index(["dtype", "layout"])
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print and keep."""
    options = parsed(Options, PROGRAM, __doc__, argv)
    with sentence_at_fault(PROGRAM):
        found = rows(options)
        print("Counts; nothing was measured on a GPU.")
        print("Warp-instructions: microseconds to issue them / to move the bytes, by number of images.\n")
        print(markdown(table(found)))
        if options.out:
            state = environment()
            kept = {name: state[name] for name in ("torch", "triton", "python", "commit", "dirty", "utc")}
            append_rows(options.out, [{**row, **kept} for row in found])


if __name__ == "__main__":
    main()
