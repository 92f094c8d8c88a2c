"""What each form of the loss costs, and measuring its share of the gradient: forward + backward, in turns.

    python -m benchmarks.forms --out benchmarks/results/forms_cpu.csv

Beside the loss every step has a task, whose gradients at image features and mask tokens are there already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import DIM, make_features
from benchmarks.command_line import parsed
from renyi_kd import InfoSAMLoss, SAMFeatures, infosam_terms
from renyi_kd.objective import Distillation

PROGRAM = "benchmarks.forms"
UNMEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where.

    Attributes:
        out: CSV file to append the rows to.
        batches: images of each batch.
        layouts: memory formats of the maps.
        threads: of the CPU.
        trials: turns of each form, at least 2.

    """

    out: Path | None = None
    batches: tuple[int, ...] = (4, 16)
    layouts: tuple[str, ...] = ("channels_first", "channels_last")
    threads: int = 2
    trials: int = 7


def runs(batch: int, layout: str) -> dict[str, measure.Run]:
    """Return a step of the default form without a measurement, and of each form and the following weight with one."""
    torch.manual_seed(0)
    teacher, student = (make_features(batch, layout) for _ in range(2))
    leaves = [value.requires_grad_() for value in student[:2]]
    of_task = [1e-3 * torch.randn_like(leaf) for leaf in leaves]
    losses = {form: InfoSAMLoss(DIM, distillation=form) for form in get_args(Distillation)}
    losses["gradient_share=0.1"] = InfoSAMLoss(DIM, gradient_share=0.1)
    bare = InfoSAMLoss(DIM).relation

    def step(function: Callable[[SAMFeatures, SAMFeatures], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss = function(teacher, SAMFeatures(*leaves))
        torch.autograd.backward([loss, *leaves], [None, *of_task])

    def unmeasured(teacher: SAMFeatures, student: SAMFeatures) -> Tensor:
        return infosam_terms(bare, teacher, student).loss

    return {UNMEASURED: partial(step, unmeasured), **{name: partial(step, loss) for name, loss in losses.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Time every batch and layout, print the rows, and append them to the file."""
    options = parsed(Options, PROGRAM, __doc__, argv)
    if options.trials < 2:
        raise SystemExit(f"--trials must be at least 2, got {options.trials}; the first turn warms up")
    torch.set_num_threads(options.threads)
    environment = measure.environment()
    for batch in options.batches:
        for layout in options.layouts:
            samples = measure.interleaved_ms(runs(batch, layout), options.trials)
            bare = samples[UNMEASURED]
            rows = []
            for name, times in samples.items():
                # In turns, so that what slows one slows its neighbour as well.
                ratio = sorted(own / other for own, other in zip(times, bare, strict=True))[len(times) // 2]
                rows.append({"b": batch, "layout": layout, "form": name, **measure.percentiles(times), "ratio": ratio})
                print(f"B {batch} {layout} {name}: {rows[-1]['ms_p50']:.1f} ms, {ratio:.3f} of {UNMEASURED}")
            if options.out is not None:
                measure.append_rows(options.out, [{**row, **environment} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
