"""What InfoSAM adds to a fine-tuning step, by teacher: a copy, the student without adapters, cached features.

    python -m benchmarks.teachers --out benchmarks/results/teachers_cpu.csv

The model is a SamModel of transformers, of the size of ViT-B, with random weights, LoRA in the encoder and a trained
decoder.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import pandas
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.command_line import parsed
from benchmarks.torchvision_compat import ensure_importable
from renyi_kd import AdapterDisabled, CachedTeacher, InfoSAMLoss, SAMFeatures, Teacher, tap

Step = Callable[[], Tensor]
PRINTED = ["teacher", "s_p50", "added_percent", "infosam_s", "extra_weights_mib"]
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


def seconds_in_turns(runs: dict[str, Step], trials: int, device: str) -> dict[str, float]:
    """Return the median seconds of each; in turns, so that a drift of the machine meets all alike."""
    turns = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(trials + 1)]
    # The first turn fills the cache and warms up.
    return pandas.DataFrame(turns[1:], columns=list(runs)).median().to_dict()


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
        with_each = {name: steps[name] for name in ("none", *options.teachers)}
        times = seconds_in_turns(with_each, options.trials, options.device)
        # Steps differ by more than InfoSAM takes with some teachers, so it is also timed by itself.
        by_itself = {name: alone[name] for name in options.teachers}
        infosam = seconds_in_turns(by_itself, 2 * options.trials, options.device)
    bare = times["none"]
    rows = [
        {
            "teacher": name,
            "b": options.batch,
            "image_size": options.image_size,
            "amp": options.amp,
            "s_p50": median,
            "added_percent": 100 * (median / bare - 1),
            "infosam_s": infosam.get(name, 0.0),
            "extra_weights_mib": weights[name],
            "trials": options.trials,
            **environment,
        }
        for name, median in times.items()
    ]
    print(pandas.DataFrame(rows)[PRINTED].to_string(index=False, float_format="{:.3f}".format))
    if options.out:
        measure.append_rows(options.out, rows)


if __name__ == "__main__":
    main()
