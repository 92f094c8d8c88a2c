"""Compile what the launchers launch, for GPUs that are not there; prints one JSON row per kernel and configuration.

    python -m tests.support.ahead_of_time --targets sm_80 sm_90

Triton's own compiler at launch does it, over a driver that launches nothing. So configurations are written down nowhere
else, and what is compiled is what a GPU would run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from renyi_kd.gram import RBF, KnownKernel, Linear, Polynomial
from renyi_kd.objective import Distillation, Objective
from renyi_kd.ops import gpu as gpus
from renyi_kd.ops.batch_gram import triton as batch_gram
from renyi_kd.ops.feature_terms import triton as feature_terms
from renyi_kd.ops.feature_terms.types import Pair
from renyi_kd.ops.gram_moment import triton as gram_moment
from renyi_kd.ops.gram_terms import triton as gram_terms
from renyi_kd.ops.relation_directions import triton as relation_directions
from renyi_kd.ops.relation_directions.types import Relation, RelationWeights
from renyi_kd.ops.relation_scores import triton as relation_scores

Call = Callable[[], None]
Map = tuple[torch.dtype, tuple[int, int, int]]


class Cases(NamedTuple):
    """The settings of the calls whose kernels are compiled.

    Attributes:
        maps: dtypes with channels, height and width of maps.
        rows: of a Gram of images, beside those of the loss.
        losses: dtypes, samples and layouts of the loss on features.
        prompted: likewise of the loss with two prompts an image.
        pairs: dtypes of the loss on features of a single sample, in the form that compares pairs.
        terms: forms and samples of its terms on Grams; there are two sizes of tiles, up to 64 and up to 256.
        varied_samples: of its terms with a detached teacher or with weights, which add less than a form does.
        moments: dtypes and kernels of the variables of an entropy, and which of them get a gradient.

    """

    maps: Sequence[Map]
    rows: Sequence[int]
    losses: Sequence[tuple[torch.dtype, int, torch.memory_format]]
    prompted: Sequence[tuple[torch.dtype, int, torch.memory_format]]
    pairs: Sequence[torch.dtype]
    terms: Sequence[tuple[Distillation, int]]
    varied_samples: Sequence[int]
    moments: Sequence[tuple[torch.dtype, Sequence[KnownKernel], Sequence[int]]]


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
FIRST, LAST = torch.contiguous_format, torch.channels_last
FORMS: tuple[Distillation, ...] = get_args(Distillation)
SAM, RAGGED, DEEP = (256, 64, 64), (100, 7, 9), (4096, 8, 8)
LINEAR, POLYNOMIAL, RADIAL = Linear(), Polynomial(), RBF(2.0)
MIXED = (LINEAR, RADIAL, POLYNOMIAL, RADIAL)
# The gradients of one variable of each kind: to the others they are what its own is.
MIXED_GRADIENTS = (0, 1, 2)
# Every value of every setting; in fp32 and bf16 every pair of two that share a tile. Maps of SAM's size come with the
# loss.
ALL = Cases(
    maps=[(FLOAT, RAGGED), (HALF, RAGGED), (FLOAT, DEEP), (BFLOAT, DEEP)],
    rows=(2, 16, 64, 65),
    losses=[*product((FLOAT, BFLOAT), (4, 64), (FIRST, LAST)), (FLOAT, 32, FIRST), (HALF, 32, FIRST)],
    prompted=[(FLOAT, 4, FIRST), (FLOAT, 4, LAST)],
    pairs=(FLOAT, BFLOAT, HALF),
    # The form decides what is done with a few numbers at the end, not how the tiles are read.
    terms=[*product(FORMS, (64,)), (FORMS[0], 256), (FORMS[-1], 256)],
    varied_samples=(64,),
    moments=[
        *((FLOAT, (kernel,), (0,)) for kernel in (LINEAR, RADIAL, POLYNOMIAL)),
        (FLOAT, (LINEAR,) * 3, (0,)),
        (FLOAT, MIXED, MIXED_GRADIENTS),
        *((dtype, MIXED, (2,)) for dtype in (BFLOAT, HALF)),
    ],
)
# What fits one target and not the next are large tiles, in the widest and in a narrow dtype.
LARGE = Cases(
    maps=[(FLOAT, DEEP)],
    rows=(64, 65),
    losses=[(FLOAT, 4, FIRST), (BFLOAT, 64, LAST)],
    prompted=[],
    pairs=(FLOAT,),
    terms=[(FORMS[0], 256)],
    varied_samples=(),
    moments=[(FLOAT, MIXED, (2,))],
)
# Of chips whose relatives are above: where they have fewer registers, less shared memory or other instructions.
LARGEST = Cases(
    maps=[],
    rows=(),
    losses=[(FLOAT, 64, FIRST), (BFLOAT, 64, LAST)],
    prompted=[],
    pairs=(),
    terms=[(FORMS[0], 256)],
    varied_samples=(),
    moments=[(FLOAT, MIXED, (2,))],
)
# Of a chip whose code Triton makes as that of a relative: only what comes after differs.
AS_ANOTHER = LARGEST._replace(losses=LARGEST.losses[1:], terms=[], moments=[])


class Target(NamedTuple):
    """A GPU to compile for, the bytes of shared memory that a program can have there, and what is compiled."""

    gpu: GPUTarget
    shared_bytes: int
    cases: Cases


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64 * 1024, LARGEST),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, LARGE),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * 1024, AS_ANOTHER),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * 1024, AS_ANOTHER),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, ALL),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, LARGEST),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, LARGEST),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, LARGE),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64 * 1024, LARGEST),
}
WEIGHTS = RelationWeights._fields


class NoDriver:
    """What Triton asks of a driver, answered for GPUs that are not there; a launch does nothing."""

    def __init__(self, gpu: GPUTarget, device: int) -> None:
        self.gpu, self.device = gpu, device
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        # What does not fit is a row like any other.
        return {"max_shared_mem": 2**31}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and the most threads."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, _module: int) -> None:
        pass

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def compiling(gpu: GPUTarget, device: int) -> Iterator[list[dict[str, Any]]]:
    """Compile for a GPU whatever is launched, and note what came of it.

    Args:
        gpu: to compile for.
        device: its number; Triton keeps what it compiled by device.

    """
    rows: list[dict[str, Any]] = []

    def note(*, src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: object) -> None:
        files = {Path(file).suffix[1:]: Path(file) for file in metadata_group.values()}
        code = files["hsaco" if gpu.backend == "hip" else "cubin"]
        rows.append({
            "kernel": src.fn.__name__,
            "types": list(src.signature.values()),
            "constants": {
                ".".join([src.fn.arg_names[first], *map(str, inner)]): value
                for (first, *inner), value in src.constants.items()
            },
            "options": {name: metadata[name] for name in ("num_warps", "num_stages")},
            "machine_code_bytes": code.stat().st_size,
            "spilled": spilled(files),
            "shared_bytes": metadata["shared"],
        })  # fmt: skip

    def has_tensor_cores(_device: torch.device) -> bool:
        return gpu.backend == "cuda" and gpu.arch >= 80

    triton.runtime.driver.set_active(NoDriver(gpu, device))
    forget()
    with (
        mock.patch.object(triton.knobs.compilation, "listener", note),
        # Lines of the source for a debugger; they are a tenth of the time and no part of the code.
        mock.patch.object(triton.knobs.compilation, "disable_line_info", True),
        # What the launchers ask of the build of PyTorch, and of the GPU.
        mock.patch.object(torch.version, "hip", "6.0" if gpu.backend == "hip" else None),
        mock.patch.object(gpus, "has_tensor_cores", has_tensor_cores),
        mock.patch.object(gpus, "warp_size", return_value=gpu.warp_size),
    ):
        yield rows


def forget() -> None:
    """Drop what the package keeps of launches: it was made for another GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("renyi_kd."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def spilled(files: dict[str, Path]) -> int:
    """Return how many bytes of a thread's stack a compiled kernel takes, by the files of its compilation.

    AMD's scalar registers spill to lanes of vector registers first: only what then does not fit reaches memory.
    """
    if "amdgcn" in files:
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", files["amdgcn"].read_text())[1])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(files["cubin"])]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # One function a file; nothing in Triton's language has an address on the stack.
    ((stack, local),) = re.findall(r" STACK:(\d+) .*LOCAL:(\d+) ", usage)
    return int(stack) + int(local)


def calls(cases: Cases) -> Iterator[Call]:
    """Yield the calls whose launches are compiled."""
    for dtype, (channels, height, width) in cases.maps:
        yield partial(call_directions, channels, dtype)
        for layout in (FIRST, LAST):
            yield partial(call_scores, (2, channels, height, width), dtype, layout)
    for dtype, samples in product(dict.fromkeys(dtype for dtype, *_ in cases.losses), cases.rows):
        yield partial(call_gram, samples, dtype)
    for dtype, kernels, gradients in cases.moments:
        yield partial(call_moment, dtype, kernels, gradients)
    for dtype, samples, layout in cases.losses:
        yield partial(call_loss, samples, dtype, layout, Objective())
    for dtype, samples, layout in cases.prompted:
        yield partial(call_loss, samples, dtype, layout, Objective(), prompts=2)
    for dtype in cases.pairs:
        yield partial(call_loss, 1, dtype, FIRST, Objective(distillation="jensen_renyi"), weighted=True)
    for form, samples in cases.terms:
        yield partial(call_terms, samples, Objective(distillation=form))
    for form, samples in product(FORMS, cases.varied_samples):
        objective = Objective(distillation=form, detach_teacher_relation=True)
        yield partial(call_terms, samples, objective, weighted=objective.compares_pairs)


def call_scores(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    directions = torch.empty(shape[0], 1, shape[1], requires_grad=True)
    offsets = torch.empty(shape[0], 1, requires_grad=True)
    # The teacher's map gets no gradient, the student's does.
    for needs_grad in (False, True):
        x = torch.empty(shape, dtype=dtype, memory_format=layout, requires_grad=needs_grad)
        relation_scores.relation_scores(x, directions, offsets).sum().backward()


def call_directions(channels: int, dtype: torch.dtype) -> None:
    tokens = torch.empty(2, 1, channels, dtype=dtype, requires_grad=True)
    directions, offsets = relation_directions.relation_directions(tokens, weights_of(channels, dtype))
    (directions.sum() + offsets.sum()).backward()


def weights_of(channels: int, dtype: torch.dtype = FLOAT) -> RelationWeights:
    shapes = [(channels, channels) if name in ("query_weight", "key_weight") else (channels,) for name in WEIGHTS]
    return RelationWeights(*(torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes))


def call_gram(samples: int, dtype: torch.dtype) -> None:
    batch_gram.batch_gram(torch.empty(samples, 4096, dtype=dtype, requires_grad=True)).sum().backward()


def call_loss(
    samples: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    objective: Objective,
    *,
    weighted: bool = False,
    prompts: int = 1,
) -> None:
    teacher_map, student_map = (
        torch.empty(samples // prompts, *SAM, dtype=dtype, memory_format=layout, requires_grad=needs_grad)
        for needs_grad in (False, True)
    )
    teacher_tokens, student_tokens = (
        torch.empty(samples, 1, SAM[0], dtype=dtype, requires_grad=needs_grad) for needs_grad in (False, True)
    )
    weight = torch.empty(samples) if weighted else None
    images = None if prompts == 1 else [sample // prompts for sample in range(samples)]
    pair = Pair(teacher_map, teacher_tokens, student_map, student_tokens, images, weight)
    feature_terms.feature_terms(pair, Relation(weights_of(SAM[0]), 1e-5, 1e-5), objective).loss.backward()


def call_terms(samples: int, objective: Objective, *, weighted: bool = False) -> None:
    gram = torch.empty(samples, samples, dtype=torch.float64)
    teacher, student = (torch.empty(samples, 4096, requires_grad=True) for _ in range(2))
    weight = torch.empty(samples) if weighted else None
    gram_terms.gram_terms(gram, gram, teacher, student, objective, weight).loss.backward()


def call_moment(dtype: torch.dtype, kernels: Sequence[KnownKernel], gradients: Sequence[int]) -> None:
    features = [torch.empty(128, 256, dtype=dtype, requires_grad=i in gradients) for i in range(len(kernels))]
    gram_moment.gram_moment(features, kernels).backward()


@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    """Take the mean off a tile that no thread has the registers for."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x - tl.sum(x, 0) / BLOCK)


def planted_spill() -> None:
    _spilling_kernel[(1,)](torch.empty(1), BLOCK=32768, num_warps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--large", action="store_true", help="no more than the large tiles, of every target")
    parser.add_argument("--planted", action="store_true", help="a kernel that spills, in place of the package's")
    options = parser.parse_args()
    for device, name in enumerate(options.targets):
        target = TARGETS[name]
        cases = target.cases
        if options.large:
            cases = LARGE if cases is ALL else LARGEST
        with compiling(target.gpu, device) as rows:
            for call in [planted_spill] if options.planted else calls(cases):
                call()
        for row in rows:
            print(json.dumps({"target": name, **row, "shared_limit": target.shared_bytes}, default=str))


if __name__ == "__main__":
    main()
