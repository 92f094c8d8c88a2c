"""Every operation and the whole loss, forward and forward + backward, by every implementation side by side.

    python -m benchmarks.kernels --out benchmarks/results/kernels_cpu.csv --picture kernels.png
    python -m benchmarks.kernels --device cuda --dtype float32 bfloat16 --batches 4 16 64 --out kernels_cuda.csv

An implementation whose value or gradient is further from fp64 than rounding allows is not timed. In half precision the
loss runs under autocast, as users run it. ``of_copy`` says how near a row comes to what the memory allows: the time
that a plain copy takes for the same bytes, at the least traffic an operation needs, by its own time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import pandas
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import Case, cases
from benchmarks.command_line import parsed
from benchmarks.files import whole_file
from renyi_kd import implementation

Pass = Literal["forward", "forward+backward"]
PRINTED = ["provider", "ms_p50", "speed_up", "of_copy", "peak_mib", "launches"]
LAYOUTS = {"channels_first": "channels first", "channels_last": "channels last"}
PROVIDERS = ("textbook", "textbook compiled", "reference", "triton", "keops")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where.

    Attributes:
        out: CSV file to append the rows to.
        picture: image file to draw the speed-ups to.
        device: where it runs.
        dtype: of the features.
        batches: images of each batch.
        samples: of gram_moment.
        ops: only these operations; all if left out.
        providers: only these implementations; all if left out.
        passes: what is timed.
        threads: of the CPU.
        trials: turns of each implementation, at least 2.

    """

    out: Path | None = None
    picture: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    batches: tuple[int, ...] = (4, 16)
    samples: tuple[int, ...] = (4096,)
    ops: tuple[Literal["relation_scores", "batch_gram", "infosam_terms", "gram_moment"], ...] = ()
    providers: tuple[Literal["textbook", "textbook compiled", "reference", "triton", "keops"], ...] = ()
    passes: tuple[Pass, ...] = get_args(Pass)
    threads: int = 2
    trials: int = 5


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


def setting(row: Mapping[str, object]) -> str:
    """Return on what an operation ran."""
    if row["op"] == "gram_moment":
        return f"{row['op']}, {row['variables']} variables, n {row['n']}"
    return f"{row['op']}, B {row['b']}, {LAYOUTS[row['layout']]}"


def label(row: Mapping[str, object]) -> str:
    return f"{setting(row)}, {row['dtype']}"


def options_of(argv: Sequence[str] | None = None) -> Options:
    return parsed(Options, "benchmarks.kernels", __doc__, argv)


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    environment, rows = measure.environment(options.device), []
    print(f"auto takes: {implementation(torch.ones(1, device=options.device))}")
    dtypes = [getattr(torch, name) for name in options.dtype]
    for dtype, case in cases(options.batches, options.samples, dtypes, options.device):
        if options.ops and case.op not in options.ops:
            continue
        if options.providers:
            case = case._replace(functions={name: case.functions[name] for name in options.providers})
        for which in options.passes:
            new = rows_of(case, which, dtype, options.trials, environment)
            if not new:
                print(f"{case.op}, {which}: nothing to time")
                continue
            rows += new
            print(f"{label(new[0])}, {which}")
            print(pandas.DataFrame(new)[PRINTED].to_string(index=False, float_format="{:.2f}".format, na_rep=""))
            # Every time, for the case that this process is stopped.
            if options.out:
                measure.append_rows(options.out, new)
            if options.picture:
                draw(rows, options.picture)


if __name__ == "__main__":
    main()
