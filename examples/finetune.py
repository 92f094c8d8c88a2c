"""Fine-tune a Segment Anything model on your images, once without and once with the InfoSAM loss.

    python -m examples.finetune

Without arguments a small SAM learns to segment nuclei in microscopy images, in a few minutes on two CPU cores; model
and images lie beside this file. Weights, metrics.csv and comparison.png are written to the folder of --out.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.devices import Amp, autocast, best_device, on_device
from benchmarks.files import whole_file
from benchmarks.sam.data import InstanceDataset, Prompt
from benchmarks.sam.models import Peft, Sam, load_sam, trainable_copy
from examples.picture import save_comparison
from renyi_kd import InfoSAMLoss, tap

NUCLEI = Path(__file__).parent / "assets" / "nuclei"
PROGRAM = "examples.finetune"
RUNS = {"PEFT": False, "PEFT + InfoSAM": True}
COLUMNS = (
    "run", "epoch", "step", "loss", "task_loss", "compression", "distillation", "teacher_similarity",
    "student_similarity", "seconds", "iou", "dice",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fine-tuned, on what and how.

    Attributes:
        model: mini, mobile_sam, or a SAM of transformers by name or folder.
        weights: safetensors file of mobile_sam.
        data: folder with images/, masks/, train.csv, test.csv.
        peft: which weights are trained.
        lambda_r: weight of the compression term.
        lambda_d: weight of the distillation term.
        alpha: order of the entropies.
        prompt: kind of the prompts.
        prompts: number per image in training.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate.
        limit: use at most so many images of each list.
        image_size: side of the square input in pixels; the model's own if left out.
        device: where everything runs.
        amp: autocast.
        seed: of weights, order and prompts.
        out: folder for weights, metrics.csv and comparison.png.

    """

    model: str = "mini"
    weights: Path | None = None
    data: Path = NUCLEI
    peft: Peft = "lora"
    lambda_r: float = 1.0
    lambda_d: float = 0.5
    alpha: float = 2.0
    prompt: Prompt = "box"
    prompts: int = 8
    epochs: int = 6
    batch_size: int = 4
    lr: float = 2e-4
    limit: int | None = None
    image_size: int | None = None
    device: torch.device = dataclasses.field(default_factory=best_device)
    amp: Amp = "off"
    seed: int = 0
    out: Path = Path("runs/finetune")


class Setup(NamedTuple):
    """What the options name."""

    sam: Sam
    train_images: InstanceDataset
    test_images: InstanceDataset


def fine_tune(
    sam: Sam, images: InstanceDataset, options: Options, with_infosam: bool
) -> tuple[nn.Module, InfoSAMLoss, list[dict[str, float]]]:
    """Return a fine-tuned copy of the model, the loss with its relation module, and one row of metrics per step."""
    torch.manual_seed(options.seed)
    model = trainable_copy(sam, options.peft).to(options.device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    teacher = tap(sam.model, call=sam.segment)
    student = tap(model, call=sam.segment)
    infosam_loss = InfoSAMLoss(sam.dim, lambda_r=options.lambda_r, lambda_d=options.lambda_d, alpha=options.alpha)
    infosam_loss.to(options.device)
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=options.lr)

    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(images, min(options.batch_size, len(images)), shuffle=True, drop_last=True, generator=order)
    n_steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=n_steps, pct_start=0.2)
    scaler = torch.amp.GradScaler(options.device.type, enabled=options.amp == "fp16")
    rows, started = [], time.perf_counter()
    progress = tqdm(total=n_steps, desc=run_name(with_infosam), unit="step")
    for epoch in range(1, options.epochs + 1):
        images.epoch = epoch
        for batch in loader:
            batch = on_device(batch, options.device)
            with autocast(options.device, options.amp):
                logits = student(batch)
                loss = task = task_loss(logits, batch["masks"])
                if with_infosam:
                    terms = infosam_loss.terms(teacher, student, batch)
                    loss = task + terms.loss
            if not loss.isfinite():
                raise RuntimeError(f"the loss must be finite, got {loss.item()} at step {len(rows) + 1}; lower --lr")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

            row = {"epoch": epoch, "step": len(rows) + 1, "loss": loss.item(), "task_loss": task.item()}
            if with_infosam:
                state = infosam_loss.diagnostics()
                row["compression"], row["distillation"] = terms.compression.item(), terms.distillation.item()
                row["teacher_similarity"] = state.teacher_similarity.item()
                row["student_similarity"] = state.student_similarity.item()
            rows.append({**row, "seconds": time.perf_counter() - started})
            shown = {"loss": row["task_loss"], "L_r": row.get("compression"), "L_d": row.get("distillation")}
            progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None})
            progress.update()
    progress.close()
    teacher.close()
    student.close()
    return model, infosam_loss, rows


def task_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return 20 x focal plus Dice loss, as SAM was trained with, averaged over the masks ``[b, p, S, S]``."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    probability = logits.sigmoid()
    focal = ((probability - masks).square() * cross_entropy).mean()
    overlap = (probability * masks).sum((-2, -1))
    dice = (2 * overlap + 1) / (probability.sum((-2, -1)) + masks.sum((-2, -1)) + 1)
    return 20 * focal + (1 - dice).mean()


@torch.no_grad()
def evaluate(model: nn.Module, sam: Sam, images: InstanceDataset, options: Options) -> dict[str, float]:
    """Return IoU and Dice, averaged over the instances of an image and then over the images."""
    ious, dices = [], []
    for batch in tqdm(DataLoader(images), desc="evaluating", unit="image", leave=False):
        batch = on_device(batch, options.device)
        with autocast(options.device, options.amp):
            predicted = sam.segment(model, batch) > 0
        true = batch["masks"].bool()
        overlap = (predicted & true).sum((-2, -1))
        both = predicted.sum((-2, -1)) + true.sum((-2, -1))
        ious.append((overlap / (both - overlap)).mean())
        dices.append((2 * overlap / both).mean())
    return {"iou": torch.stack(ious).mean().item(), "dice": torch.stack(dices).mean().item()}


def run_name(with_infosam: bool) -> str:
    """Return the name of a run in tables and files."""
    return next(name for name, infosam in RUNS.items() if infosam == with_infosam)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the parameters that were trained as safetensors; load them with load_state_dict(..., strict=False)."""
    trained = {
        name: value.detach().cpu().contiguous() for name, value in module.named_parameters() if value.requires_grad
    }
    with whole_file(path) as temporary:
        save_file(trained, temporary)


def save_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """Write the rows as CSV; a run's IoU and Dice stand in its last row."""
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


def setup(options: Options) -> Setup:
    """Load the model and the images.

    Raises:
        ValueError: an option, or a file that it names, does not do; likewise OSError, RuntimeError and the like.

    """
    for option in ("prompts", "epochs", "batch_size", "limit", "image_size"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}; raise it")
    if not 0 < options.lr < math.inf:
        raise ValueError(f"--lr must be a finite number above 0, got {options.lr}; leave it out for 2e-4")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}; leave it out for 0")
    torch.empty(0, device=options.device)
    InfoSAMLoss(1, lambda_r=options.lambda_r, lambda_d=options.lambda_d, alpha=options.alpha)
    options.out.mkdir(parents=True, exist_ok=True)
    sam = load_sam(options.model, options.weights, options.image_size)
    shared = {"size": sam.image_size, "prompt": options.prompt, "limit": options.limit, "seed": options.seed}
    train_images = InstanceDataset(options.data, "train", n_prompts=options.prompts, **shared)
    test_images = InstanceDataset(options.data, "test", n_prompts=32, **shared)
    if min(options.batch_size, len(train_images)) * options.prompts < 2:
        raise ValueError(
            "--batch-size times --prompts must be at least 2 for InfoSAM, which compares samples, got 1; raise one"
        )
    return Setup(sam._replace(model=sam.model.to(options.device)), train_images, test_images)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune twice, compare on the test images, and write what came out."""
    with sentence_at_fault(PROGRAM):
        options = parsed(Options, PROGRAM, __doc__, argv)
        sam, train_images, test_images = setup(options)
    for images, split in ((train_images, "train"), (test_images, "test")):
        skipped = f", {len(images.empty)} without instances skipped" if images.empty else ""
        print(f"{split}: {len(images)} images{skipped}")
    models = {"zero-shot": sam.model}
    results = {"zero-shot": evaluate(sam.model, sam, test_images, options)}
    rows: list[dict[str, float]] = [{"run": "zero-shot", **results["zero-shot"]}]
    for name, with_infosam in RUNS.items():
        model, infosam_loss, steps = fine_tune(sam, train_images, options, with_infosam)
        models[name], results[name] = model, evaluate(model, sam, test_images, options)
        steps[-1].update(results[name])
        rows += [{"run": name, **step} for step in steps]
        save_weights(model, options.out / f"{options.peft}{'_infosam' if with_infosam else ''}.safetensors")
        if with_infosam:
            save_weights(infosam_loss.relation, options.out / "relation.safetensors")
        save_metrics(rows, options.out / "metrics.csv")
    with whole_file(options.out / "comparison.png") as temporary:
        save_comparison(temporary, sam, models, [on_device(item, options.device) for item in test_images.first(4)])
    print(f"\n{'':<16}{'IoU':>8}{'Dice':>8}")
    for name, result in results.items():
        print(f"{name:<16}{result['iou']:>8.3f}{result['dice']:>8.3f}")
    print(f"\n{len(test_images)} held-out images; weights, metrics.csv and comparison.png are in {options.out}")


if __name__ == "__main__":
    main()
