"""What the entropy of features costs at many samples, in one process and in several.

    python -m benchmarks.many_samples --out benchmarks

Processes have one thread each and talk over gloo. Seconds are those that a process computes, not those that pass: so
they tell a process's share of the work, on however few cores the processes meet. Appends rows to
results/many_samples.csv and draws assets/many_samples.png from the newest row of each setting. Linux with glibc.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks import measure
from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.files import whole_file

PROGRAM = "benchmarks.many_samples"
COLOURS = {1: "#0072B2", 2: "#E69F00", 4: "#9A3B8F"}
NUMBERS = ["cpu_s", "ns_a_pair", "peak_mib", "received_mib"]
# Of so many samples a run takes a moment, and of fewer several are taken.
SOME_SAMPLES = 16_384


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where rows and picture go.

    Attributes:
        out: folder of results/many_samples.csv, to which rows are appended, and of assets/many_samples.png.
        samples: of all processes together; without any, and without other_features, it only draws.
        features: of each sample.
        processes: how many share the samples.
        other_features: of each sample, of 16,384 samples.

    """

    out: Path
    samples: tuple[int, ...] = (8_192, 16_384, 32_768, 65_536, 131_072)
    features: int = 64
    processes: tuple[int, ...] = (1, 2, 4)
    other_features: tuple[int, ...] = (16, 256, 1024)


def settings(options: Options) -> list[tuple[int, int, int]]:
    """Return samples, features and processes of every measurement."""
    sizes = [(n, options.features) for n in options.samples]
    sizes += [(SOME_SAMPLES, d) for d in options.other_features]
    return [(n, d, processes) for n, d in sizes for processes in options.processes]


def run_processes(n_samples: int, n_features: int, n_processes: int) -> list[dict[str, dict[str, float]]]:
    """Return what each process found."""
    words = [f"--samples={n_samples}", f"--features={n_features}", f"--processes={n_processes}"]
    words.append(f"--repeats={min(max(1, (SOME_SAMPLES // n_samples) ** 2), 16)}")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ring_process", f"--folder={folder}", f"--rank={rank}", *words],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(n_processes)
        ]
        try:
            printed = [process.communicate()[0] for process in started]
        finally:
            for process in started:
                process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process of {n_processes} stopped; see its error above")
    return [json.loads(line) for line in printed]


def rows(n_samples: int, n_features: int, n_processes: int) -> list[dict[str, object]]:
    """Return a row for each pass, with the most that any process takes."""
    found = run_processes(n_samples, n_features, n_processes)
    made = []
    for name in found[0]:
        most = {key: max(process[name][key] for process in found) for key in found[0][name]}
        # What all processes together take for each of the n^2 entries.
        pair = {"ns_a_pair": 1e9 * n_processes * most["cpu_s"] / n_samples**2}
        sizes = {"n": n_samples, "d": n_features, "processes": n_processes}
        made.append({"op": "feature_entropy", "kernel": "linear", "pass": name, **sizes, **most, **pair})
        print(
            f"n {n_samples} d {n_features} P {n_processes} {name}: {most['cpu_s']:.3g} s a process, "
            f"{pair['ns_a_pair']:.3g} ns a pair, {most['peak_mib']:.3g} MiB, {most['received_mib']:.3g} MiB received, "
            f"{most['wall_s']:.3g} s passed",
            flush=True,
        )
    return made


def newest(table: pandas.DataFrame, name: str = "forward+backward") -> pandas.DataFrame:
    """Return the last row of a pass for every n, d and number of processes, with numbers as such."""
    whole = table[table["pass"] == name].astype({"n": int, "d": int, "processes": int})
    whole = whole.astype(dict.fromkeys(NUMBERS, float))
    return whole.groupby(["n", "d", "processes"]).last().sort_index()


def pair_model(table: pandas.DataFrame) -> tuple[float, float]:
    """Return the nanoseconds of a pair, and of a pair and feature, that fit the measured ones best, by ratio."""
    d = table.index.get_level_values("d").to_numpy(float)
    ns = table["ns_a_pair"].to_numpy(float)
    fixed, of_feature = np.linalg.lstsq(np.stack([1 / ns, d / ns], 1), np.ones_like(ns), rcond=None)[0]
    return float(fixed), float(of_feature)


def draw(table: pandas.DataFrame, path: Path) -> None:
    """Write the picture: seconds, memory and bytes of a process against n, and the time of a pair against d."""
    measured = newest(table)
    fixed, of_feature = pair_model(measured)
    widths = measured.index.get_level_values("d")
    usual = widths.value_counts().idxmax()
    by_samples = measured.xs(usual, level="d")
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, memory, pair = figure.subplots(1, 3)
    for processes, colour in COLOURS.items():
        if processes not in by_samples.index.get_level_values("processes"):
            continue
        one = by_samples.xs(processes, level="processes")
        n = one.index.to_numpy(float)
        label = f"{processes} process{'es' if processes > 1 else ''}"
        seconds.plot(n, one["cpu_s"], "o", color=colour, label=label)
        seconds.plot(n, 1e-9 * (fixed + of_feature * usual) * n**2 / processes, color=colour, linewidth=1.2)
        memory.plot(n, one["peak_mib"], "o-", color=colour, linewidth=1.2, label=f"memory, {label}")
        if processes == by_samples.index.get_level_values("processes").max():
            # Any even number receives as much.
            memory.plot(n, one["received_mib"], "s:", color="0.3", linewidth=1.2, label=f"received, {label}")
        some = measured.xs(processes, level="processes")
        some = some[some.index.get_level_values("n") == SOME_SAMPLES]
        pair.plot(some.index.get_level_values("d"), some["ns_a_pair"], "o", color=colour, label=label)
    d = np.geomspace(widths.min(), widths.max(), 100)
    pair.plot(d, fixed + of_feature * d, color="0.3", linewidth=1.2, label=f"{fixed:.1f} + {of_feature:.3f} d")
    finish(seconds, "samples n", f"CPU seconds of a process, d = {usual}", "lines: the model, (a + b d) n² / P")
    finish(
        memory, "samples n", f"MiB of a process, d = {usual}", "memory above own features, and rows received", base=2
    )
    finish(
        pair,
        "features d of a sample",
        "ns for each of n² pairs, all processes together",
        f"n = {SOME_SAMPLES:,}; line: the model, a + b d",
        base=2,
    )
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def finish(ax: Axes, x: str, y: str, title: str, base: int = 10) -> None:
    """Name and thin out the axes, both logarithmic; ``base`` is that of the upright one."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=base)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)


def run(options: Options) -> None:
    """Measure every setting, append its rows, and draw all there are."""
    torch.set_num_threads(1)
    for folder in ("results", "assets"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    path = options.out / "results/many_samples.csv"
    environment = measure.environment()
    for setting in settings(options):
        measure.append_rows(path, [{**row, **environment} for row in rows(*setting)])
    draw(measure.read_rows(path), options.out / "assets/many_samples.png")


def main(argv: Sequence[str] | None = None) -> None:
    with sentence_at_fault(PROGRAM):
        run(parsed(Options, PROGRAM, __doc__, argv))


if __name__ == "__main__":
    main()
