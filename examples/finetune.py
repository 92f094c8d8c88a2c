"""Fine-tune a Segment Anything model on your images, once without and once with the InfoSAM loss.

    python -m examples.finetune

Without arguments a small SAM learns to segment nuclei in microscopy images, in a few minutes on two CPU cores; model
and images lie beside this file. Weights, metrics.csv and comparison.png are written to the folder of --out.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.data import InstanceDataset, Item
from examples.files import whole_file
from examples.models import Sam, load_sam, trainable_copy
from examples.picture import save_comparison
from renyi_kd import InfoSAMLoss, tap

NUCLEI = Path(__file__).parent / "assets" / "nuclei"
RUNS = {"PEFT": False, "PEFT + InfoSAM": True}
COLUMNS = (
    "run", "epoch", "step", "loss", "task_loss", "compression", "distillation", "teacher_similarity",
    "student_similarity", "seconds", "iou", "dice",
)  # fmt: skip


def fine_tune(
    sam: Sam, images: InstanceDataset, args: argparse.Namespace, with_infosam: bool
) -> tuple[nn.Module, InfoSAMLoss, list[dict[str, float]]]:
    """Return a fine-tuned copy of the model, the loss with its relation module, and one row of metrics per step."""
    torch.manual_seed(args.seed)
    model = trainable_copy(sam, args.peft).to(args.device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    teacher = tap(sam.model, call=sam.segment)
    student = tap(model, call=sam.segment)
    infosam_loss = InfoSAMLoss(sam.dim, lambda_r=args.lambda_r, lambda_d=args.lambda_d, alpha=args.alpha)
    infosam_loss.to(args.device)
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=args.lr)

    order = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(images, min(args.batch_size, len(images)), shuffle=True, drop_last=True, generator=order)
    n_steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=n_steps, pct_start=0.2)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
    rows, started = [], time.perf_counter()
    progress = tqdm(total=n_steps, desc=run_name(with_infosam), unit="step")
    for epoch in range(1, args.epochs + 1):
        images.epoch = epoch
        for batch in loader:
            batch = to_device(batch, args.device)
            with autocast(args):
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
def evaluate(model: nn.Module, sam: Sam, images: InstanceDataset, args: argparse.Namespace) -> dict[str, float]:
    """Return IoU and Dice, averaged over the instances of an image and then over the images."""
    ious, dices = [], []
    for batch in tqdm(DataLoader(images), desc="evaluating", unit="image", leave=False):
        batch = to_device(batch, args.device)
        with autocast(args):
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


def to_device(batch: Item, device: torch.device) -> Item:
    """Return the batch on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Return the context of --amp."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    return torch.autocast(args.device.type, dtype, enabled=dtype is not None)


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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's options; a bad one ends the program with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="mini", help="mini, mobile_sam, or a SAM of transformers by name or folder")
    add("--weights", type=Path, help="safetensors file of mobile_sam")
    add("--data", type=Path, default=NUCLEI, help="folder with images/, masks/, train.csv, test.csv")
    add("--peft", choices=("lora", "adapter", "bitfit", "decoder"), default="lora")
    add("--lambda-r", type=float, default=1.0, help="weight of the compression term")
    add("--lambda-d", type=float, default=0.5, help="weight of the distillation term")
    add("--alpha", type=float, default=2.0, help="order of the entropies")
    add("--prompt", choices=("box", "point"), default="box")
    add("--prompts", type=int, default=8, help="prompts per image in training")
    add("--epochs", type=int, default=6)
    add("--batch-size", type=int, default=4)
    add("--lr", type=float, default=2e-4, help="peak learning rate")
    add("--limit", type=int, help="use at most so many images of each list")
    add("--image-size", type=int, help="side of the square input in pixels; the model's own if left out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=("off", "bf16", "fp16"), default="off")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/finetune"), help="folder for weights, metrics.csv and comparison.png")
    args = parser.parse_args(argv)
    for option in ("prompts", "epochs", "batch_size", "limit", "image_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr must be a finite number above 0, got {args.lr}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    try:
        args.device = torch.empty(0, device=args.device).device
        InfoSAMLoss(1, lambda_r=args.lambda_r, lambda_d=args.lambda_d, alpha=args.alpha)
        args.out.mkdir(parents=True, exist_ok=True)
        args.sam = load_sam(args.model, args.weights, args.image_size)
        shared = {"size": args.sam.image_size, "prompt": args.prompt, "limit": args.limit, "seed": args.seed}
        args.train_images = InstanceDataset(args.data, "train", n_prompts=args.prompts, **shared)
        args.test_images = InstanceDataset(args.data, "test", n_prompts=32, **shared)
    except (AssertionError, OSError, RuntimeError, ValueError, ModuleNotFoundError, SafetensorError) as error:
        parser.error(str(error))
    if min(args.batch_size, len(args.train_images)) * args.prompts < 2:
        parser.error("--batch-size times --prompts must be at least 2 for InfoSAM, which compares samples, got 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Fine-tune twice, compare on the test images, and write what came out."""
    args = arguments(argv)
    sam = args.sam._replace(model=args.sam.model.to(args.device))
    for images, split in ((args.train_images, "train"), (args.test_images, "test")):
        skipped = f", {len(images.empty)} without instances skipped" if images.empty else ""
        print(f"{split}: {len(images)} images{skipped}")
    models = {"zero-shot": sam.model}
    results = {"zero-shot": evaluate(sam.model, sam, args.test_images, args)}
    rows: list[dict[str, float]] = [{"run": "zero-shot", **results["zero-shot"]}]
    for name, with_infosam in RUNS.items():
        model, infosam_loss, steps = fine_tune(sam, args.train_images, args, with_infosam)
        models[name], results[name] = model, evaluate(model, sam, args.test_images, args)
        steps[-1].update(results[name])
        rows += [{"run": name, **step} for step in steps]
        save_weights(model, args.out / f"{args.peft}{'_infosam' if with_infosam else ''}.safetensors")
        if with_infosam:
            save_weights(infosam_loss.relation, args.out / "relation.safetensors")
        save_metrics(rows, args.out / "metrics.csv")
    with whole_file(args.out / "comparison.png") as temporary:
        save_comparison(temporary, sam, models, [to_device(item, args.device) for item in args.test_images.first(4)])
    print(f"\n{'':<16}{'IoU':>8}{'Dice':>8}")
    for name, result in results.items():
        print(f"{name:<16}{result['iou']:>8.3f}{result['dice']:>8.3f}")
    print(f"\n{len(args.test_images)} held-out images; weights, metrics.csv and comparison.png are in {args.out}")


if __name__ == "__main__":
    main()
