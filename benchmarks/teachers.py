"""What InfoSAM adds to a fine-tuning step, by teacher: a copy, the student without adapters, cached features.

    python -m benchmarks.teachers --out benchmarks/results/teachers_cpu.csv

The model is a SamModel of transformers, of the size of ViT-B, with random weights, LoRA in the encoder and a trained
decoder.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure
from examples.command_line import parsed
from examples.torchvision_compat import ensure_importable
from renyi_kd import AdapterDisabled, CachedTeacher, InfoSAMLoss, SAMFeatures, Teacher, tap

Step = Callable[[], Tensor]
Kind = Literal["copy", "adapters off", "cached"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where.

    Attributes:
        out: CSV file to append the rows to.
        batch: images per step.
        image_size: side of the square input in pixels.
        device: cpu or cuda.
        amp: bf16 autocast.
        threads: of the CPU.
        trials: steps that count, of each teacher.
        teachers: those beside a step without InfoSAM.

    """

    out: Path | None = None
    batch: int = 4
    image_size: int = 1024
    device: Literal["cpu", "cuda"] = "cpu"
    amp: bool = False
    threads: int = 2
    trials: int = 3
    teachers: tuple[Kind, ...] = get_args(Kind)


def make_batch(batch: int, image_size: int, device: str) -> dict[str, object]:
    corner = torch.rand(batch, 1, 2, device=device) * image_size / 2
    return {
        "pixel_values": torch.randn(batch, 3, image_size, image_size, device=device),
        "input_boxes": torch.cat([corner, corner + image_size / 3], -1),
        "sample_id": list(range(batch)),
    }


def make_steps(
    batch: dict[str, object], image_size: int, device: str, amp: bool, folder: Path
) -> tuple[dict[str, Step], dict[str, Step], dict[str, float]]:
    """Return per teacher a training step, what InfoSAM does in it, and the memory of weights that only it needs."""
    ensure_importable()
    from peft import LoraConfig, get_peft_model
    from transformers import SamConfig, SamModel

    config = SamConfig(vision_config={"image_size": image_size}, prompt_encoder_config={"image_size": image_size})
    original = SamModel(config).to(device)
    frozen = tap(copy.deepcopy(original).requires_grad_(False))
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(original, lora).train()
    student, infosam = tap(model), InfoSAMLoss(256).to(device)
    trained = [p for p in (*model.parameters(), *infosam.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    teachers: dict[str, Teacher | None] = {
        "none": None,
        "copy": frozen,
        "adapters off": AdapterDisabled(student),
        "cached": CachedTeacher(frozen, folder),
    }

    def step(teacher: Teacher | None) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits = student(batch).pred_masks.float()
            loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
            if teacher is not None:
                loss = loss + infosam(teacher, student, batch)
        student.clear()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def infosam_alone(teacher: Teacher) -> Tensor:
        # On features that are there already: the teacher's run, the loss, and its gradient for map and tokens.
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            features = teacher.observe(batch)
            own = SAMFeatures(
                features.image_features.clone().requires_grad_(), features.mask_tokens.clone().requires_grad_()
            )
            loss = infosam(features, own)
        loss.backward()
        return loss.detach()

    own = _weights_mib(frozen.model)
    steps = {name: partial(step, teacher) for name, teacher in teachers.items()}
    alone = {name: partial(infosam_alone, teacher) for name, teacher in teachers.items() if teacher is not None}
    return steps, alone, {"none": 0.0, "copy": own, "adapters off": 0.0, "cached": own}


def _weights_mib(model: nn.Module) -> float:
    return sum(value.nbytes for value in model.state_dict().values()) / 2**20


def seconds(run: Step, device: str) -> float:
    start = time.perf_counter()
    if not run().isfinite():
        raise RuntimeError("the loss is not finite, so the step is not timed")
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    options = parsed(Options, "benchmarks.teachers", __doc__, None)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # Of random weights most gradients are so small that the CPU takes its slow path for denormal numbers.
    torch.set_flush_denormal(True)
    environment = measure.environment(options.device)
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(options.batch, options.image_size, options.device)
        steps, alone, weights = make_steps(batch, options.image_size, options.device, options.amp, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in ("none", *options.teachers)}
        infosam: dict[str, list[float]] = {name: [] for name in options.teachers}
        # The first turn fills the cache and warms up; in turns, so that a drift of the machine meets all alike.
        for trial in range(options.trials + 1):
            for name, values in times.items():
                elapsed = seconds(steps[name], options.device)
                if trial:
                    values.append(elapsed)
        # Steps differ by more than InfoSAM takes with some teachers, so it is also timed by itself.
        for trial in range(2 * options.trials + 1):
            for name, values in infosam.items():
                elapsed = seconds(alone[name], options.device)
                if trial:
                    values.append(elapsed)
    rows = []
    bare = statistics.median(times["none"])
    print(f"{'teacher':<14} {'step s':>8} {'added':>8} {'InfoSAM s':>10} {'of a step':>10} {'extra weights':>14}")
    for name, values in times.items():
        median = statistics.median(values)
        added = 100 * (median / bare - 1)
        by_itself = statistics.median(infosam[name]) if name in infosam else 0.0
        rows.append({
            "teacher": name, "b": options.batch, "image_size": options.image_size, "amp": options.amp, "s_p50": median,
            "added_percent": added, "infosam_s": by_itself, "extra_weights_mib": weights[name],
            "trials": options.trials, **environment,
        })  # fmt: skip
        print(
            f"{name:<14} {median:>8.2f} {added:>7.1f}% {by_itself:>10.3f} {100 * by_itself / bare:>9.1f}% "
            f"{weights[name]:>10.0f} MiB"
        )
    if options.out:
        measure.append_rows(options.out, rows)


if __name__ == "__main__":
    main()
