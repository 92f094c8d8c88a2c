"""Compile what the launchers launch, for GPUs that are not there; prints one JSON row per kernel and configuration.

    python -m tests.support.ahead_of_time sm_90

The launches of real calls are recorded in place of being run, so configurations are written down nowhere else.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from renyi_kd.gram import RBF, KnownKernel, Linear, Polynomial
from renyi_kd.objective import Distillation, Objective
from renyi_kd.ops.batch_gram import triton as batch_gram
from renyi_kd.ops.feature_terms import triton as feature_terms
from renyi_kd.ops.feature_terms.types import Pair
from renyi_kd.ops.gram_moment import triton as gram_moment
from renyi_kd.ops.gram_terms import triton as gram_terms
from renyi_kd.ops.relation_directions import triton as relation_directions
from renyi_kd.ops.relation_directions.types import Relation, RelationWeights
from renyi_kd.ops.relation_scores import triton as relation_scores


class Cases(NamedTuple):
    """The settings of the calls whose kernels are compiled.

    Attributes:
        dtypes: of features.
        sizes: channels, height and width of maps.
        samples: of the loss on features.
        term_samples: of its terms on Grams; a tile is as large as the next power of two.
        varied_samples: of its terms with a detached teacher or with weights, which add less than a form does.
        kernels: of the variables of an entropy.

    """

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[int, int, int], ...]
    samples: tuple[int, ...]
    term_samples: tuple[int, ...]
    varied_samples: tuple[int, ...]
    kernels: tuple[tuple[KnownKernel, ...], ...]


LINEAR, POLYNOMIAL, RADIAL = Linear(), Polynomial(), RBF(2.0)
MIXED = (LINEAR, RADIAL, POLYNOMIAL, RADIAL)
ALL = Cases(
    (torch.float32, torch.bfloat16, torch.float16),
    ((256, 64, 64), (100, 7, 9), (4096, 8, 8)),
    (4, 32, 64),
    (1, 2, 4, 16, 32, 64, 256),
    (1, 64),
    ((LINEAR,), (RADIAL,), (POLYNOMIAL,), (LINEAR,) * 3, MIXED),
)
# What fits one target and not the next are large tiles, whole ones, in the widest and in a narrow dtype.
LARGE = Cases(
    (torch.float32, torch.bfloat16),
    ((256, 64, 64), (4096, 8, 8)),
    (4, 64),
    (64, 256),
    (64,),
    ((LINEAR,), (RADIAL,), MIXED),
)


class Target(NamedTuple):
    """A GPU to compile for, the bytes of shared memory that a program can have there, and what is compiled."""

    gpu: GPUTarget
    shared_bytes: int
    cases: Cases


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, LARGE),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, ALL),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, LARGE),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, LARGE),
}
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
WEIGHTS = RelationWeights._fields


def recorder(launches: dict[str, tuple]) -> Callable[[Any, tuple[int, ...]], Callable[..., None]]:
    """Return what stands in for ``kernel[grid]`` and writes a launch down in place of making it."""

    def stand_in(kernel: Any, _grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **keywords: Any) -> None:
            options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
            values = inspect.signature(kernel.fn).bind(*args, **keywords).arguments
            arguments = Arguments({}, {}, [])
            for index, parameter in enumerate(kernel.params):
                value = values[parameter.name]
                arguments.types[parameter.name] = arguments.add((index,), value, parameter.is_constexpr)
            # One of each kind: Triton compiles no more of them either.
            launches[f"{kernel.__name__} {arguments} {options}"] = (kernel, arguments, options)

        return launch

    return stand_in


class Arguments(NamedTuple):
    """The arguments of a launch as Triton specialises them.

    Attributes:
        types: by name; a tuple of types for a tuple.
        constants: what is compiled in, by its path in the arguments.
        divisible: the paths of what is divisible by 16.

    """

    types: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    divisible: list[tuple[int, ...]]

    def add(self, path: tuple[int, ...], value: Any, is_constexpr: bool) -> Any:
        """Note one argument and return its type."""
        if is_constexpr or value is None or (isinstance(value, int) and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(self.add((*path, index), item, False) for index, item in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            self.divisible.append(path)
        return POINTER[value.dtype] if isinstance(value, Tensor) else "i32"


def record(cases: Cases) -> dict[str, tuple]:
    """Return the kernels with the kinds of their arguments, of calls as the loss makes them."""
    launches: dict[str, tuple] = {}
    with mock.patch.object(JITFunction, "__getitem__", recorder(launches)):
        for dtype in cases.dtypes:
            for channels, height, width in cases.sizes:
                call_directions(channels, dtype)
                x = torch.empty(2, channels, height, width, dtype=dtype)
                for layout in (torch.contiguous_format, torch.channels_last):
                    call_scores(x.contiguous(memory_format=layout))
            for samples in (2, 16, 64):
                rows = torch.empty(samples, 4096, dtype=dtype, requires_grad=True)
                batch_gram.batch_gram(rows).sum().backward()
            call_moments(dtype, cases.kernels)
            for samples, layout in product(cases.samples, (torch.contiguous_format, torch.channels_last)):
                call_loss(samples, dtype, layout, Objective())
            # Of pairs one will do.
            call_loss(1, dtype, torch.contiguous_format, Objective(distillation="jensen_renyi"), torch.empty(1))
        for samples in cases.term_samples:
            call_terms(samples, (False, True) if samples in cases.varied_samples else (False,))
    return launches


def call_scores(x: Tensor) -> None:
    directions = torch.empty(len(x), 1, x.shape[1], requires_grad=True)
    offsets = torch.empty(len(x), 1, requires_grad=True)
    # The teacher's map gets no gradient, the student's does.
    relation_scores.relation_scores(x, directions, offsets).sum().backward()
    relation_scores.relation_scores(x.detach().requires_grad_(), directions, offsets).sum().backward()


def call_directions(channels: int, dtype: torch.dtype) -> None:
    tokens = torch.empty(2, 1, channels, dtype=dtype, requires_grad=True)
    directions, offsets = relation_directions.relation_directions(tokens, weights_of(channels, dtype))
    (directions.sum() + offsets.sum()).backward()


def weights_of(channels: int, dtype: torch.dtype = torch.float32) -> RelationWeights:
    shapes = [(channels, channels) if name in ("query_weight", "key_weight") else (channels,) for name in WEIGHTS]
    return RelationWeights(*(torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes))


def call_loss(
    samples: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    objective: Objective,
    sample_weight: Tensor | None = None,
) -> None:
    teacher_map = torch.empty(samples, 256, 64, 64, dtype=dtype).contiguous(memory_format=layout)
    teacher_tokens = torch.empty(samples, 1, 256, dtype=dtype)
    student_map, student_tokens = (value.detach().requires_grad_() for value in (teacher_map, teacher_tokens))
    pair = Pair(teacher_map, teacher_tokens, student_map, student_tokens, None, sample_weight)
    feature_terms.feature_terms(pair, Relation(weights_of(256), 1e-5, 1e-5), objective).loss.backward()


def call_terms(samples: int, variants: tuple[bool, ...]) -> None:
    gram = torch.empty(samples, samples, dtype=torch.float64)
    teacher, student = (torch.empty(samples, 4096, requires_grad=True) for _ in range(2))
    for form, varied in product(get_args(Distillation), variants):
        objective = Objective(distillation=form, detach_teacher_relation=varied)
        weight = torch.empty(samples) if varied and objective.compares_pairs else None
        gram_terms.gram_terms(gram, gram, teacher, student, objective, weight).loss.backward()


def call_moments(dtype: torch.dtype, combinations: tuple[tuple[KnownKernel, ...], ...]) -> None:
    for kernels in combinations:
        features = [torch.empty(128, 256, dtype=dtype, requires_grad=True) for _ in kernels]
        gram_moment.gram_moment(features, kernels).backward()


def compile_ahead(kernel: Any, arguments: Arguments, options: dict[str, int], target: GPUTarget) -> Any:
    """Compile down to the target's machine code."""
    attributes = {path: [["tt.divisibility", 16]] for path in arguments.divisible}
    source = ASTSource(kernel, signature=arguments.types, constexprs=arguments.constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def spilled(compiled: Any) -> int:
    """Return how many bytes a compiled kernel spills to memory.

    AMD's scalar registers spill to lanes of vector registers first: only what then does not fit reaches memory.
    """
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", compiled.asm["amdgcn"])[1])
    ptx = compiled.asm["ptx"]
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        reports = []
        for tool in (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell):
            command = [tool.path, "-v", f"--gpu-name={architecture}", str(file), "-o", str(file.with_suffix(".cubin"))]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            reports.append(result.stderr)
            if result.returncode == 0:
                stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr).groups()
                return int(stores) + int(loads)
    raise RuntimeError(f"no ptxas takes {architecture}: {reports}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    target = TARGETS[parser.parse_args().target]
    # What the launchers ask of the build of PyTorch, answered for the target.
    with mock.patch.object(torch.version, "hip", "6.0" if target.gpu.backend == "hip" else None):
        launches = record(target.cases)
    for kernel, arguments, options in launches.values():
        compiled = compile_ahead(kernel, arguments, options, target.gpu)
        row = {
            "kernel": kernel.__name__,
            "types": arguments.types,
            "constants": {
                ".".join([kernel.params[first].name, *map(str, inner)]): value
                for (first, *inner), value in arguments.constants.items()
            },
            "options": options,
            "machine_code_bytes": len(compiled.asm.get("cubin", compiled.asm.get("hsaco", b""))),
            "spilled": spilled(compiled),
            "shared_bytes": compiled.metadata.shared,
            "shared_limit": target.shared_bytes,
        }
        print(json.dumps(row, default=str), flush=True)


if __name__ == "__main__":
    main()
