"""The operations that are measured, on inputs of the sizes that SAMs have, by every implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import textbook
from renyi_kd import Linear, RelationModule, SAMFeatures, infosam_terms
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.gram_moment import gram_moment
from renyi_kd.ops.relation_scores import relation_scores

DIM, HEIGHT, WIDTH = 256, 64, 64


class Sizes(NamedTuple):
    """The columns that say what an operation ran on; None where it has no such size."""

    layout: str | None = None
    b: int | None = None
    d: int = DIM
    h: int | None = None
    w: int | None = None
    n: int | None = None
    variables: int | None = None


class Case(NamedTuple):
    """One operation on one input.

    Attributes:
        op: its name.
        sizes: of the input.
        functions: by provider, functions of ``leaves`` with one value.
        leaves: what is differentiated; the first is the largest.
        passes: of the largest leaf through memory, at least, by pass; empty where products bound the operation.
        wide: returns the same case in fp64.

    """

    op: str
    sizes: Sizes
    functions: dict[str, Callable[..., Tensor]]
    leaves: list[Tensor]
    passes: dict[str, int]
    wide: Callable[[], Case]


def cases(
    batches: Sequence[int], samples: Sequence[int], dtypes: Sequence[torch.dtype], device: str
) -> Iterator[tuple[torch.dtype, Case]]:
    """Yield every case with its dtype; all dtypes of a size first, as the time may end before the sizes do."""
    for batch in batches:
        for dtype in dtypes:
            for layout in ("channels_first", "channels_last"):
                for case in map_cases(batch, layout, dtype, device):
                    yield dtype, case
    for n in samples:
        for dtype in dtypes:
            yield dtype, moment_case(n, dtype, device)


def make_features(batch: int, layout: str, dtype: torch.dtype = torch.float32) -> SAMFeatures:
    """Return features of B images with what SAM features have in common over images: a shared part."""
    shape = (batch, DIM, HEIGHT, WIDTH)
    maps = torch.randn(shape) + torch.randn(1, DIM, HEIGHT, WIDTH)
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(batch, 1, DIM) + torch.randn(1, 1, DIM)
    return SAMFeatures(maps.to(dtype), tokens.to(dtype))


def map_cases(batch: int, layout: str, dtype: torch.dtype, device: str, *, wide: bool = False) -> Iterator[Case]:
    torch.manual_seed(0)
    # What is computed in fp64 is of the rounded inputs.
    features, others = (torch.float64, torch.float64) if wide else (dtype, torch.float32)
    relation = RelationModule(DIM).to(device, others)
    teacher, student = (
        SAMFeatures(*(value.to(device, features) for value in make_features(batch, layout, dtype)[:2]))
        for _ in range(2)
    )
    x, tokens = (value.requires_grad_() for value in student[:2])
    directions = torch.randn(batch, 1, DIM).to(device, others).requires_grad_()
    sizes = Sizes(layout, batch, h=HEIGHT, w=WIDTH)

    def textbook_scores(x: Tensor, directions: Tensor) -> Tensor:
        pixels = at_least_float(x).flatten(2).mT
        return directions @ torch.nn.functional.layer_norm(pixels, (DIM,)).mT

    def textbook_gram(x: Tensor) -> Tensor:
        rows = at_least_float(x.flatten(1))
        return rows @ rows.mT

    def loss(function: Callable[..., object], x: Tensor, tokens: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(device, x.dtype, enabled=x.dtype.itemsize == 2):
            return function(relation, teacher, SAMFeatures(x, tokens)).loss

    def in_fp64(op: str) -> Case:
        return next(case for case in map_cases(batch, layout, dtype, device, wide=True) if case.op == op)

    yield Case(
        "relation_scores",
        sizes,
        implementations(textbook_scores, relation_scores),
        [x, directions],
        {"forward": 1, "forward+backward": 3},
        partial(in_fp64, "relation_scores"),
    )
    yield Case(
        "batch_gram",
        sizes,
        implementations(textbook_gram, batch_gram),
        [x],
        {"forward": 1, "forward+backward": 3},
        partial(in_fp64, "batch_gram"),
    )
    functions = {"textbook": textbook.infosam_terms, "textbook compiled": compiled(textbook.infosam_terms)}
    functions |= {impl: partial(infosam_terms, impl=impl) for impl in ("reference", "triton")}
    # The teacher's map is read once, the student's twice, its gradient written once: two and four passes of one map.
    yield Case(
        "infosam_terms",
        sizes,
        {name: partial(loss, function) for name, function in functions.items()},
        [x, tokens, *relation.parameters()],
        {"forward": 2, "forward+backward": 4},
        partial(in_fp64, "infosam_terms"),
    )


def at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def moment_case(n: int, dtype: torch.dtype, device: str, *, wide: bool = False) -> Case:
    torch.manual_seed(0)
    # With something in common, as features have: without, the moment is all but its diagonal, which has no gradient.
    features = [(torch.randn(n, DIM) + torch.randn(1, DIM)).to(device, dtype) for _ in range(3)]
    features = [(x.double() if wide else x).requires_grad_() for x in features]

    def of_grams(*features: Tensor) -> Tensor:
        squares = torch.ones((), device=device)
        for x in features:
            unit = torch.nn.functional.normalize(at_least_float(x), dim=1)
            squares = squares * (unit @ unit.mT).square()
        return squares.sum()

    def package(*features: Tensor, impl: str) -> Tensor:
        return gram_moment(features, [Linear()] * len(features), impl=impl)

    functions = {"textbook": of_grams, "textbook compiled": compiled(of_grams)}
    functions |= {impl: partial(package, impl=impl) for impl in ("reference", "triton")}
    if importlib.util.find_spec("pykeops"):
        functions["keops"] = keops_moment
    sizes = Sizes(n=n, variables=3)
    return Case("gram_moment", sizes, functions, features, {}, partial(moment_case, n, dtype, device, wide=True))


def keops_moment(*features: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    squares: object = 1.0
    for x in features:
        unit = torch.nn.functional.normalize(x.float(), dim=1)
        products = (LazyTensor(unit[:, None, :]) * LazyTensor(unit[None, :, :])).sum(-1)
        squares = products.square() * squares
    return squares.sum(1).sum()


def implementations(
    textbook_function: Callable[..., Tensor], function: Callable[..., Tensor]
) -> dict[str, Callable[..., Tensor]]:
    named = {"textbook": textbook_function, "textbook compiled": compiled(textbook_function)}
    return named | {impl: partial(function, impl=impl) for impl in ("reference", "triton")}


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """Return ``torch.compile`` of a function; the compiler is loaded at the first call."""
    kept: list[Callable[..., object]] = []

    def run(*args: object) -> object:
        if not kept:
            # Dynamo keeps what it compiled by function: another size would make it compile for all sizes.
            torch.compiler.reset()
            kept.append(torch.compile(function, dynamic=False))
        return kept[0](*args)

    return run
