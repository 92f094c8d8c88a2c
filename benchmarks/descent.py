"""Where each form of the distillation term takes a student that follows it alone.

    python -m benchmarks.descent --out benchmarks

The student is s free unit vectors in fp64, its relation maps, which descend the gradient of the term with respect to
them; the teacher's are s fixed ones with a part in common. No model is between, so that what is seen is the term's.
Writes results/descent.csv and assets/descent.png.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import pandas
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.files import whole_file
from benchmarks.markdown import markdown
from renyi_kd import Objective
from renyi_kd.objective import Distillation
from renyi_kd.ops.gram_terms import gram_terms

PROGRAM = "benchmarks.descent"
Start = Literal["teacher", "near", "random"]
# Of a student near the teacher: that of the relation maps after one Adam step of 2e-4 on a decoder.
NEAR = 0.889
# Times s, as every term is a mean over samples.
STEP_SIZE = 0.02
# Of the gradient, below which a descent has ended.
LEAST_GRADIENT = 1e-12
TITLES: dict[Distillation, str] = {
    "mutual_information": "mutual_information\n(the paper's)",
    "cauchy_schwarz": "cauchy_schwarz",
    "debiased": "debiased",
    "jensen_renyi": "jensen_renyi",
}
ROWS = {
    "gram_distance": "distance to the\nteacher's |Gram|\n(RMS of |cosines|)",
    "map_distance": "distance to the\nteacher's maps\n(1 less mean |cosine|)",
    "largest_cosine": "largest |cosine| of\ntwo of the student's\nmaps",
}
STARTS: dict[Start, tuple[str, str]] = {
    "teacher": ("student = teacher", "#0072B2"),
    "near": ("near the teacher (cosine .889)", "#E69F00"),
    "random": ("random", "#9A3B8F"),
}
STYLES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))


@dataclasses.dataclass(frozen=True)
class Options:
    """What descends, and where the rows and the picture go.

    Attributes:
        out: folder of results/descent.csv and assets/descent.png, which are replaced.
        samples: maps of the teacher and of the student.
        pixels: numbers in each map.
        steps: of each descent.
        points: steps of each descent that are written, about evenly spread over the logarithm.

    """

    out: Path
    samples: tuple[int, ...] = (4, 8, 16)
    pixels: int = 4096
    steps: int = 10_000
    points: int = 24


class State(NamedTuple):
    """Where a student is.

    Attributes:
        step: how many it has taken.
        bits: the term.
        gram_distance: root mean square over pairs of samples of ``|s_ij| - |t_ij|``, the cosines' magnitudes.
        map_distance: 1 less the mean ``|cosine|`` of a sample's two maps.
        largest_cosine: largest ``|s_ij|`` of two samples of the student.

    """

    step: int
    bits: float
    gram_distance: float
    map_distance: float
    largest_cosine: float


def teacher_maps(n_samples: int, n_pixels: int, seed: int = 0) -> Tensor:
    """Return unit maps ``[s, k]`` whose cosines lie between .1 and .6."""
    generator = torch.Generator().manual_seed(seed)
    common = _unit(n_pixels, generator=generator)
    shares = torch.linspace(0.4, 1.2, n_samples, dtype=torch.float64)[:, None]
    return F.normalize(shares * common + _unit(n_samples, n_pixels, generator=generator), dim=1)


def student_maps(teacher: Tensor, start: Start, seed: int = 1) -> Tensor:
    """Return the maps that a student begins with."""
    generator = torch.Generator().manual_seed(seed)
    random = _unit(*teacher.shape, generator=generator)
    if start == "teacher":
        return teacher.clone()
    if start == "random":
        return random
    aside = F.normalize(random - (random * teacher).sum(1, keepdim=True) * teacher, dim=1)
    return NEAR * teacher + math.sqrt(1 - NEAR**2) * aside


def _unit(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def descend(
    teacher: Tensor, student: Tensor, form: Distillation, steps: int, step_size: float = STEP_SIZE
) -> list[tuple[Tensor, float]]:
    """Return the student's maps before every step and after the last one, each with the term in bits.

    A step goes along the negative gradient and back to unit length. There are fewer where the gradient vanishes.
    """
    identity = torch.eye(len(teacher), dtype=torch.float64)
    objective = Objective(distillation=form)
    path = []
    for _ in range(steps + 1):
        student.requires_grad_()
        bits = gram_terms(identity, identity, teacher, student, objective, impl="reference").distillation
        (gradient,) = torch.autograd.grad(bits, student)
        student = student.detach()
        path.append((student, bits.item()))
        if gradient.norm() < LEAST_GRADIENT:
            break
        student = F.normalize(student - step_size * len(teacher) * gradient, dim=1)
    return path


def state(step: int, teacher: Tensor, student: Tensor, bits: float) -> State:
    """Return how far a student is from where the terms have their minima."""
    pairs = torch.triu_indices(len(teacher), len(teacher), 1).unbind()
    of_teacher, of_student = ((maps @ maps.mT)[pairs].abs() for maps in (teacher, student))
    return State(
        step,
        bits,
        (of_student - of_teacher).square().mean().sqrt().item(),
        1 - (teacher * student).sum(1).abs().mean().item(),
        of_student.max().item(),
    )


def rows(options: Options) -> pandas.DataFrame:
    """Return the states of every descent at its first and last steps and at some between."""
    found = []
    for n_samples in options.samples:
        teacher = teacher_maps(n_samples, options.pixels)
        for form, start in itertools.product(get_args(Distillation), get_args(Start)):
            path = descend(teacher, student_maps(teacher, start), form, options.steps)
            for step in written_steps(len(path) - 1, options):
                at = state(step, teacher, *path[step])
                found.append({"form": form, "start": start, "samples": n_samples, **at._asdict()})
            print(f"{form} {start} {n_samples}: {len(path) - 1} steps", flush=True)
    return pandas.DataFrame(found)


def written_steps(last: int, options: Options) -> list[int]:
    """Return the steps of a descent that are written, the first and the last among them."""
    spread = [round(options.steps ** (i / (options.points - 2))) for i in range(options.points - 1)]
    return sorted({0, last, *(step for step in spread if step < last)})


def draw(table: pandas.DataFrame, path: Path) -> None:
    """Write the picture: a column per form, a row per distance, a line per start and number of samples."""
    last = table["step"].max()
    samples = sorted(table["samples"].unique())
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ROWS), len(TITLES), sharex=True, sharey="row", squeeze=False)
    for (row, (name, label)), (column, (form, title)) in itertools.product(
        enumerate(ROWS.items()), enumerate(TITLES.items())
    ):
        ax = axes[row, column]
        for (start, (_, colour)), (n, style) in itertools.product(STARTS.items(), zip(samples, STYLES, strict=False)):
            one = table[(table["form"] == form) & (table["start"] == start) & (table["samples"] == n)]
            # One that has ended stays where it is.
            x, y = ([*one[key], end] for key, end in (("step", last), (name, one[name].iloc[-1])))
            ax.plot(x, y, color=colour, linestyle=style, linewidth=1.6)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, last)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        if row == 0:
            ax.set_title(title, fontsize=11)
        if row == len(ROWS) - 1:
            ax.set_xlabel("gradient steps")
        if column == 0:
            ax.set_ylabel(label)
    for row in axes:
        row[0].set_ylim(bottom=-0.02)
    handles = [Line2D([], [], color=colour, label=label) for label, colour in STARTS.values()]
    handles += [
        Line2D([], [], color="0.3", linestyle=style, label=f"{n} samples")
        for n, style in zip(samples, STYLES, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def run(options: Options) -> None:
    """Descend, write the rows and the picture, and print where each descent ends."""
    table = rows(options)
    for folder in ("results", "assets"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    with whole_file(options.out / "results/descent.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    draw(table, options.out / "assets/descent.png")
    ends = table.groupby(["form", "start", "samples"], sort=False).tail(1)
    print(
        markdown(ends.map(lambda value: f"{value:.2g}" if isinstance(value, float) else str(value)).set_index("form"))
    )


def main(argv: Sequence[str] | None = None) -> None:
    with sentence_at_fault(PROGRAM):
        run(parsed(Options, PROGRAM, __doc__, argv))


if __name__ == "__main__":
    main()
