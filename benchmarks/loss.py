"""The InfoSAM loss on the CPU, forward and forward + backward: the package against the textbook form.

    python -m benchmarks.loss --out benchmarks/results/loss_cpu.csv

An implementation whose value or gradient is off is not timed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure, textbook
from renyi_kd import InfoSAMTerms, RelationModule, SAMFeatures, infosam_terms

PROVIDERS = {"textbook": textbook.infosam_terms, "reference": partial(infosam_terms, impl="reference")}
DIM, HEIGHT, WIDTH = 256, 64, 64


def make_features(batch: int, layout: str, dtype: torch.dtype = torch.float32) -> SAMFeatures:
    """Return features of B images with what SAM features have in common over images: a shared part."""
    shape = (batch, DIM, HEIGHT, WIDTH)
    maps = torch.randn(shape) + torch.randn(1, DIM, HEIGHT, WIDTH)
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(batch, 1, DIM) + torch.randn(1, 1, DIM)
    return SAMFeatures(maps.to(dtype), tokens.to(dtype))


def gradients(terms: InfoSAMTerms, student: SAMFeatures, relation: RelationModule) -> tuple[Tensor, ...]:
    return torch.autograd.grad(terms.loss, [student.image_features, student.mask_tokens, *relation.parameters()])


def check(batch: int, layout: str) -> None:
    """Raise unless every provider agrees with the textbook form in fp64 as well as the textbook form in fp32 does."""
    relation, teacher, student = setting(batch, layout)
    exact_relation = RelationModule(DIM).double()
    exact_relation.load_state_dict(relation.state_dict())
    exact_student = SAMFeatures(*(value.detach().double().requires_grad_() for value in student[:2]))
    exact_teacher = SAMFeatures(teacher.image_features.double(), teacher.mask_tokens.double())
    exact_terms = textbook.infosam_terms(exact_relation, exact_teacher, exact_student)
    exact = gradients(exact_terms, exact_student, exact_relation)
    # Parameter gradients on the scale of the largest: that of a bias can be zero up to rounding.
    scales = [exact[0].abs().max(), exact[1].abs().max(), *[max(g.abs().max() for g in exact[2:])] * (len(exact) - 2)]
    for name, provider in PROVIDERS.items():
        terms = provider(relation, teacher, student)
        errors = [(terms.loss - exact_terms.loss).abs() / exact_terms.loss.abs()]
        errors += [
            (got - wanted).abs().max() / scale
            for got, wanted, scale in zip(gradients(terms, student, relation), exact, scales, strict=True)
        ]
        # Of the tensors, as Python's max passes over NaN.
        error = torch.stack(errors).max()
        if not error < 5e-5:
            raise RuntimeError(f"{name} is off by {error:.2e} of the scale and is not timed")


def setting(batch: int, layout: str) -> tuple[RelationModule, SAMFeatures, SAMFeatures]:
    """Return the module, the teacher's and the student's features."""
    torch.manual_seed(0)
    relation, teacher, student = RelationModule(DIM), make_features(batch, layout), make_features(batch, layout)
    return relation, teacher, SAMFeatures(*(value.requires_grad_() for value in student[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment, rows = measure.environment(), []
    print(f"{'B':>3} {'layout':<14} {'pass':<17} {'provider':<10} {'ms p50':>8} {'speed-up':>9} {'peak MiB':>9}")
    for batch in args.batches:
        for layout in ("channels_first", "channels_last"):
            check(batch, layout)
            relation, teacher, student = setting(batch, layout)

            def forward(provider, relation=relation, teacher=teacher, student=student):
                return provider(relation, teacher, student)

            def both(provider, relation=relation, teacher=teacher, student=student):
                return gradients(provider(relation, teacher, student), student, relation)

            for which, call in (("forward", forward), ("forward+backward", both)):
                runs = {name: partial(call, provider) for name, provider in PROVIDERS.items()}
                samples = measure.interleaved_ms(runs, args.trials)
                times = {name: measure.percentiles(values) for name, values in samples.items()}
                for name, run in runs.items():
                    speed_up = times["textbook"]["ms_p50"] / times[name]["ms_p50"]
                    peak = measure.cpu_peak_mib(run)
                    rows.append({
                        "op": "infosam_terms", "provider": name, "pass": which, "dtype": "float32", "layout": layout,
                        "b": batch, "d": DIM, "h": HEIGHT, "w": WIDTH, **times[name], "speed_up": speed_up,
                        "peak_mib": peak, "trials": args.trials, **environment,
                    })  # fmt: skip
                    print(
                        f"{batch:>3} {layout:<14} {which:<17} {name:<10} {times[name]['ms_p50']:>8.1f} "
                        f"{speed_up:>8.1f}x {peak:>9.1f}"
                    )
    if args.out:
        measure.append_rows(args.out, rows)


if __name__ == "__main__":
    main()
