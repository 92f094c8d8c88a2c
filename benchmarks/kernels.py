"""Every operation and the whole loss, forward and forward + backward, by every implementation side by side.

    python -m benchmarks.kernels --out benchmarks/results/kernels_cpu.csv --picture kernels.png
    python -m benchmarks.kernels --device cuda --dtype float32 bfloat16 --batches 4 16 64 --out kernels_cuda.csv

An implementation whose value or gradient is further from fp64 than rounding allows is not timed. In half precision the
loss runs under autocast, as users run it. ``of_copy`` says how near a row comes to what the memory allows: the time
that a plain copy takes for the same bytes, at the least traffic an operation needs, by its own time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure, textbook
from benchmarks.loss import DIM, HEIGHT, WIDTH, make_features
from examples.files import whole_file
from renyi_kd import RelationModule, SAMFeatures, implementation, infosam_terms
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.gram_moment import SampleKernel, gram_moment
from renyi_kd.ops.relation_scores import relation_scores

PROVIDERS = ("textbook", "textbook compiled", "reference", "triton", "keops")
PASSES = ("forward", "forward+backward")
LINEAR = SampleKernel("linear")


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
    batches: list[int], samples: list[int], dtypes: list[torch.dtype], device: str
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
        return gram_moment(features, [LINEAR] * len(features), impl=impl)

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


def runs_of(case: Case, which: str) -> dict[str, measure.Run]:
    """Return what is timed, by provider; the upstream gradient of a value that is no scalar is fixed.

    On a CPU there is nothing that Triton could be timed on.
    """
    upstream = torch.ones_like(case.functions["reference"](*case.leaves))

    def forward(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(*case.leaves)

    def both(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = function(*case.leaves)
        return (value, *torch.autograd.grad(value, case.leaves, upstream.to(value.dtype)))

    on_gpu = case.leaves[0].is_cuda
    return {
        name: partial(forward if which == "forward" else both, function)
        for name, function in case.functions.items()
        if name != "triton" or on_gpu
    }


def exact_values(case: Case, which: str) -> tuple[Tensor, ...]:
    """Return the textbook's value and gradients in fp64 or, where its matrices do not fit, the reference's as it is."""
    try:
        return values_of(runs_of(case.wide(), which)["textbook"])
    except (MemoryError, RuntimeError) as error:
        print(f"    textbook does not run in fp64, so the reference is the measure: {type(error).__name__}")
        return values_of(runs_of(case, which)["reference"])


def values_of(run: measure.Run) -> tuple[Tensor, ...]:
    value = run()
    return tuple(part.detach().cpu() for part in (value if isinstance(value, tuple) else (value,)))


def agreeing(case: Case, which: str, dtype: torch.dtype) -> dict[str, measure.Run]:
    """Return the runs that work and are right to rounding; say of the others why not.

    Right is what comes as near to fp64 as 5e-5 of the scale (.05 in half precision), or as twice the textbook's error:
    sums over a million pixels cost it the digits.
    """
    exact = exact_values(case, which)
    # Parameter gradients on the scale of the largest: that of a bias can be zero up to rounding.
    scales = [value.abs().max().item() for value in exact]
    largest = max(scales[3:], default=0.0)
    runs, errors = runs_of(case, which), {}
    for name, run in runs.items():
        try:
            values = values_of(run)
        except Exception as error:
            print(f"    {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        of_values = [
            (a.double() - e).abs().max() / max(scale, largest if index > 2 else 0.0)
            for index, (a, e, scale) in enumerate(zip(values, exact, scales, strict=True))
        ]
        # Of the tensors, as Python's max passes over NaN.
        errors[name] = torch.stack(of_values).max().item()
    allowed = max(5e-5 if dtype == torch.float32 else 0.05, 2 * errors.get("textbook", 0.0))
    for name, error in errors.items():
        if not error < allowed:
            print(f"    {name} is off by {error:.1e} of the scale and is not timed")
    return {name: runs[name] for name, error in errors.items() if error < allowed}


def rows_of(case: Case, which: str, dtype: torch.dtype, trials: int, environment: dict) -> list[dict]:
    device = case.leaves[0].device.type
    runs = agreeing(case, which, dtype)
    with_copy = {**runs, "copy": partial(torch.clone, case.leaves[0].detach())}
    samples = measure.interleaved_ms(with_copy, trials, device)
    times = {name: measure.percentiles(values) for name, values in samples.items()}
    textbook = times["textbook"]["ms_p50"] if "textbook" in times else math.nan
    rows = []
    for name, run in runs.items():
        of_copy = math.nan
        if case.passes:
            # A copy is two passes, a read and a write.
            of_copy = case.passes[which] / 2 * times["copy"]["ms_p50"] / times[name]["ms_p50"]
        rows.append({
            "op": case.op, "provider": name, "pass": which, "dtype": str(dtype).removeprefix("torch."),
            **case.sizes._asdict(), **times[name], "speed_up": textbook / times[name]["ms_p50"], "of_copy": of_copy,
            "peak_mib": measure.peak_mib(run, device), "launches": measure.launches(run, device),
            "trials": trials, **environment,
        })  # fmt: skip
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Draw the speed-up over the textbook form of every operation and input."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = [row for row in rows if row["pass"] == "forward+backward"]
    settings = list(dict.fromkeys(label(row) for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.35 * len(settings)), layout="constrained")
    for provider, marker in zip(PROVIDERS, "|xods", strict=True):
        of_provider = [row for row in rows if row["provider"] == provider]
        places = [settings.index(label(row)) for row in of_provider]
        if places:
            axes.plot([row["speed_up"] for row in of_provider], places, marker, markersize=8, label=provider)
    axes.set_yticks(range(len(settings)), settings)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.grid(axis="both", color="0.9")
    axes.set_xlabel("times as fast as the textbook form, forward + backward")
    figure.legend(loc="outside lower center", ncols=len(PROVIDERS), frameon=False)
    axes.set_title(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)


def label(row: dict) -> str:
    if row["op"] == "gram_moment":
        return f"gram_moment, n {row['n']}, {row['dtype']}"
    return f"{row['op']}, B {row['b']}, {row['layout'].replace('_', ' ')}, {row['dtype']}"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    parser.add_argument("--picture", type=Path, help="image file to draw the speed-ups to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--samples", type=int, nargs="*", default=[4096], help="of gram_moment")
    parser.add_argument("--ops", nargs="+", help="only these operations")
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5, help="at least 2")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    environment, rows = measure.environment(args.device), []
    print(f"auto takes: {implementation(torch.ones(1, device=args.device))}")
    dtypes = [getattr(torch, name) for name in args.dtype]
    for dtype, case in cases(args.batches, args.samples, dtypes, args.device):
        if args.ops and case.op not in args.ops:
            continue
        for which in args.passes:
            new = rows_of(case, which, dtype, args.trials, environment)
            if not new:
                print(f"{case.op}, {which}: nothing to time")
                continue
            rows += new
            print(f"{label(new[0])}, {which}")
            for row in new:
                of_copy = "" if math.isnan(row["of_copy"]) else f"{row['of_copy']:.0%} of copy"
                launches = f"{row['launches']} launches" if row["launches"] else ""
                print(
                    f"    {row['provider']:<18} {row['ms_p50']:>9.2f} ms {row['speed_up']:>6.1f} x "
                    f"{row['peak_mib']:>8.1f} MiB  {of_copy:<13} {launches}"
                )
            # Every time, for the case that this process is stopped.
            if args.out:
                measure.append_rows(args.out, new)
            if args.picture:
                draw(rows, args.picture)


if __name__ == "__main__":
    main()
