"""What InfoSAM adds to a fine-tuning step, by teacher: a copy, the student without adapters, cached features.

    python -m benchmarks.teachers --out benchmarks/results/teachers_cpu.csv

The model is a SamModel of transformers, of the size of ViT-B, with random weights, LoRA in the encoder and a trained
decoder.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure
from examples.torchvision_compat import ensure_importable
from renyi_kd import AdapterDisabled, CachedTeacher, InfoSAMLoss, SAMFeatures, Teacher, tap

Step = Callable[[], Tensor]
TEACHERS = ("none", "copy", "adapters off", "cached")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS[1:], default=TEACHERS[1:])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    # Of random weights most gradients are so small that the CPU takes its slow path for denormal numbers.
    torch.set_flush_denormal(True)
    environment = measure.environment(args.device)
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(args.batch, args.image_size, args.device)
        steps, alone, weights = make_steps(batch, args.image_size, args.device, args.amp, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in ("none", *args.teachers)}
        infosam: dict[str, list[float]] = {name: [] for name in args.teachers}
        # The first turn fills the cache and warms up; in turns, so that a drift of the machine meets all alike.
        for trial in range(args.trials + 1):
            for name, values in times.items():
                elapsed = seconds(steps[name], args.device)
                if trial:
                    values.append(elapsed)
        # Steps differ by more than InfoSAM takes with some teachers, so it is also timed by itself.
        for trial in range(2 * args.trials + 1):
            for name, values in infosam.items():
                elapsed = seconds(alone[name], args.device)
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
            "teacher": name, "b": args.batch, "image_size": args.image_size, "amp": args.amp, "s_p50": median,
            "added_percent": added, "infosam_s": by_itself, "extra_weights_mib": weights[name],
            "trials": args.trials, **environment,
        })  # fmt: skip
        print(
            f"{name:<14} {median:>8.2f} {added:>7.1f}% {by_itself:>10.3f} {100 * by_itself / bare:>9.1f}% "
            f"{weights[name]:>10.0f} MiB"
        )
    if args.out:
        measure.append_rows(args.out, rows)


if __name__ == "__main__":
    main()
