"""Fine-tune a Segment Anything model on your images, once without and once with the InfoSAM loss.

    python -m examples.finetune

Without arguments a small SAM learns to segment nuclei in microscopy images, in a few minutes on two CPU cores; model
and images lie beside this file. Weights, metrics.csv and comparison.png are written to the folder of --out.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from renyi_kd import InfoSAMLoss, Tap, tap
from renyi_kd.plot import relation_figure

ASSETS = Path(__file__).parent / "assets"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROGRAM = "python -m examples.finetune"
# Of ImageNet, as every SAM was trained with.
PIXEL_MEAN, PIXEL_STD = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
# Told apart with any colour vision (Okabe and Ito, 2008).
COLOURS = ListedColormap(["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7"])
Item = dict[str, Tensor]
Items = list[Item]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fine-tuned, on what and how; every comment is what --help says."""

    model: str = "mini"  # mini, or a SAM, SAM-HQ or SAM 2 of transformers by name or folder
    data: Path = ASSETS / "nuclei"  # folder with images/, masks/, train.csv, test.csv
    peft: Literal["lora", "bitfit", "decoder"] = "lora"  # what is trained: LoRA and decoder, all biases, the decoder
    distillation: str = "mutual_information"  # form of L_d; or cauchy_schwarz, debiased, jensen_renyi
    lambda_r: float = 1.0  # weight of the compression term
    lambda_d: float = 0.5  # weight of the distillation term
    prompts: int = 8  # boxes per image in training
    epochs: int = 6  # passes over the training images
    batch_size: int = 4  # images per step
    lr: float = 2e-4  # peak learning rate
    limit: int | None = None  # use at most so many images of each list
    device: torch.device = DEVICE  # where everything runs
    amp: Literal["off", "bf16", "fp16"] = "off"  # precision of autocast
    seed: int = 0  # of weights, order and boxes
    figures: bool = False  # draw the relations of teacher and student after every epoch
    out: Path = Path("runs/finetune")  # folder for weights, metrics.csv and pictures


def fine_tune(
    name: str, pretrained: nn.Module, train: Instances, shown: Items, options: Options, infosam_loss: InfoSAMLoss | None
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return a fine-tuned copy of the model, and a row of metrics for every step; without InfoSAM if it is None."""
    torch.manual_seed(options.seed)
    model = trainable_copy(pretrained, options.peft).to(options.device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if infosam_loss:
        teacher, student = tap(pretrained), tap(model)
        weights += infosam_loss.parameters()
    optimizer = torch.optim.AdamW(weights, lr=options.lr)
    order = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(train, min(options.batch_size, len(train)), shuffle=True, drop_last=True, generator=order)
    n_steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=n_steps, pct_start=0.2)
    scaler = torch.amp.GradScaler(options.device.type, enabled=options.amp == "fp16")
    rows, started = [], time.perf_counter()
    progress = tqdm(total=n_steps, desc=name, unit="step")
    for epoch in range(1, options.epochs + 1):
        train.epoch = epoch
        for batch in loader:
            with autocast(options):
                loss = task = task_loss(segment(model, batch), batch["masks"])
                if infosam_loss:
                    loss = task + infosam_loss(teacher, student, batch)
            if not loss.isfinite():
                raise RuntimeError(f"the loss must be finite, got {loss.item()} at step {len(rows) + 1}; lower --lr")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            logged = infosam_loss.scalars() if infosam_loss else {}
            row = {"run": name, "epoch": epoch, "step": len(rows) + 1, **logged}
            row |= {"loss": loss.item(), "task_loss": task.item(), "seconds": time.perf_counter() - started}
            rows.append(row)
            bar = {"loss": "task_loss", "L_r": "compression", "L_d": "distillation", "share": "image_features_share"}
            progress.set_postfix({label: f"{row[key]:.3f}" for label, key in bar.items() if key in row})
            progress.update()
        if infosam_loss and options.figures:
            with whole_file(options.out / f"relations_{epoch:02}.png") as path:
                relations(infosam_loss, teacher, student, shown).savefig(path)
    progress.close()
    if infosam_loss:
        teacher.close()
        student.close()
    return model, rows


def trainable_copy(pretrained: nn.Module, peft: str) -> nn.Module:
    """Return a copy of the model of which only the weights of a PEFT method require grad."""
    model = copy.deepcopy(pretrained).requires_grad_(False)
    if peft == "lora":
        from peft import LoraConfig, get_peft_model

        # Of peft, about a name in transformers that it still uses.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=r".*encoder.*\.qkv", modules_to_save=["mask_decoder"])
        return get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") if peft == "bitfit" else name.startswith("mask_decoder."))
    return model


def segment(model: nn.Module, batch: Item) -> Tensor:
    """Return mask logits ``[b, p, S, S]``, far below zero in the padding."""
    output = model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"], multimask_output=False)
    logits = F.interpolate(output.pred_masks[:, :, 0].float(), batch["inside"].shape[-2:], mode="bilinear")
    return logits.where(batch["inside"].bool(), -20.0)


def task_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return 20 x focal plus Dice loss, as SAM was trained with, averaged over the masks ``[b, p, S, S]``."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    probability = logits.sigmoid()
    focal = ((probability - masks).square() * cross_entropy).mean()
    overlap = (probability * masks).sum((-2, -1))
    dice = (2 * overlap + 1) / (probability.sum((-2, -1)) + masks.sum((-2, -1)) + 1)
    return 20 * focal + (1 - dice).mean()


@torch.no_grad()
def evaluate(model: nn.Module, images: Instances, options: Options) -> dict[str, float]:
    """Return IoU and Dice, averaged over the instances of an image and then over the images."""
    scores = []
    for batch in tqdm(DataLoader(images), desc="evaluating", unit="image", leave=False):
        with autocast(options):
            predicted = segment(model, batch) > 0
        true = batch["masks"].bool()
        overlap, both = (predicted & true).sum((-2, -1)), predicted.sum((-2, -1)) + true.sum((-2, -1))
        scores.append(torch.stack([(overlap / (both - overlap)).mean(), (2 * overlap / both).mean()]))
    return dict(zip(("iou", "dice"), torch.stack(scores).mean(0).tolist(), strict=True))


def autocast(options: Options) -> torch.autocast:
    """Return the context of a precision."""
    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    return torch.autocast(options.device.type, dtype, enabled=options.amp != "off")


class Instances(Dataset[Item]):
    """Images with boxes around some of their instances, from a folder with images/, masks/, train.csv and test.csv.

    A mask file holds the union of an image's instances, which are its connected components. Items have, with S the size
    of the model's input, ``pixel_values [3, S, S]``, ``input_boxes [p, 4]``, ``masks [p, S, S]`` and, 0 in the padding,
    ``inside [1, S, S]``. In training the p instances are drawn and their boxes jittered, else they are the first.
    """

    def __init__(self, split: str, size: int, n_boxes: int, options: Options) -> None:
        self.split, self.size, self.n_boxes, self.options, self.epoch = split, size, n_boxes, options, 0
        pairs = listed_pairs(options.data / f"{split}.csv")[: options.limit]
        # All files are read, so that a bad one is named before any training.
        self.pairs = [pair for pair in pairs if self.prepared(*pair)[1].any()]
        self.n_skipped = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise ValueError(
                f"{options.data}: {split}.csv must list masks with components of 20 pixels above 127 at {size} px, got "
                f"{len(pairs)} without one; store foreground as 255"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        pixels, instances = self.prepared(*self.pairs[index])
        rng = np.random.default_rng([self.options.seed, self.epoch, index])
        numbers, boxes = np.arange(1, instances.max() + 1), []
        if self.split == "train":
            numbers = rng.choice(numbers, self.n_boxes, replace=len(numbers) < self.n_boxes)
        masks = instances == numbers[: self.n_boxes, None, None]
        (height, width), around = instances.shape, ndimage.find_objects(instances)
        for rows, columns in (around[number - 1] for number in numbers[: self.n_boxes]):
            box = np.array([columns.start, rows.start, columns.stop - 1, rows.stop - 1], np.float32)
            if self.split == "train":
                moved = box + rng.uniform(-0.05, 0.05, 4) * np.tile(box[2:] - box[:2] + 1, 2)
                box = np.clip(moved, 0, [width - 1, height - 1] * 2).astype(np.float32)
            boxes.append(box)
        item = {"pixel_values": pixels, "masks": torch.from_numpy(masks), "inside": torch.ones(1, height, width)}
        padding = (0, self.size - width, 0, self.size - height)
        item = {name: F.pad(value.float(), padding) for name, value in item.items()}
        item["input_boxes"] = torch.from_numpy(np.stack(boxes))
        return {name: value.to(self.options.device) for name, value in item.items()}

    def prepared(self, image_path: Path, mask_path: Path) -> tuple[Tensor, np.ndarray]:
        """Return an image as SAM takes it, ``[3, h, w]``, and the instance of every pixel ``[h, w]``, 0 for none."""
        try:
            with Image.open(image_path) as image, Image.open(mask_path) as mask:
                if image.size != mask.size:
                    raise ValueError(f"an image of {image.size} and a mask of {mask.size} (width, height)")
                size = [int(side * (self.size / max(image.size)) + 0.5) for side in image.size]
                pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
                foreground = np.array(mask.convert("L").resize(size, Image.Resampling.NEAREST)) > 127
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{image_path}, {mask_path}: must be readable images of one size, got {error}; mend or remove the row"
            ) from error
        labels, _ = ndimage.label(foreground)
        large = np.bincount(labels.ravel()) >= 20
        large[0] = False
        return (torch.from_numpy(pixels).permute(2, 0, 1) - PIXEL_MEAN) / PIXEL_STD, (large * large.cumsum())[labels]


def listed_pairs(path: Path) -> list[tuple[Path, Path]]:
    """Return the paths of the images and masks that a csv file lists."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; --data must be a folder with images/, masks/, train.csv, test.csv")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if not row.get("image") or not row.get("label")]
    if wrong or not rows:
        raise ValueError(f"{path}: must have rows of image,label under that header, got {(wrong or ['none'])[0]}")
    return [(path.parent / row["image"], path.parent / row["label"]) for row in rows]


@torch.no_grad()
def comparison(models: dict[str, nn.Module], items: Items) -> Figure:
    """Draw a row for every item: the image with its boxes, the true masks, and those of each model."""
    columns = {"image and boxes": None, "truth": None, **models}
    figure = Figure(figsize=(2.6 * len(columns), 2.75 * len(items)), layout="constrained", dpi=110)
    for item, axes in zip(items, figure.subplots(len(items), len(columns), squeeze=False), strict=True):
        true, image = item["masks"].bool(), as_image(item).permute(1, 2, 0).numpy()
        height, width = (int(item["inside"][0].amax(side).sum()) for side in (1, 0))
        numbers = torch.arange(1, len(true) + 1, device=true.device)[:, None, None]
        for ax, (title, model) in zip(axes, columns.items(), strict=True):
            ax.set_axis_off()
            ax.set_title(title if item is items[0] else "", fontsize=11)
            ax.imshow(image[:height, :width])
            if title == "image and boxes":
                for left, top, right, bottom in item["input_boxes"].tolist():
                    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="#ffd92f"))
                continue
            masks = true if model is None else segment(model, default_collate([item]))[0] > 0
            iou = ((true & masks).sum((-2, -1)) / (true | masks).sum((-2, -1))).mean()
            instance = (masks * numbers).amax(0).cpu().numpy()[:height, :width]
            ax.imshow(np.ma.masked_equal(instance, 0) % 6, cmap=COLOURS, vmin=0, vmax=5, alpha=0.7)
            if model is not None:
                ax.text(0.02, 0.02, f"IoU {iou:.2f}", transform=ax.transAxes, color="white", backgroundcolor="#000a")
    return figure


def relations(infosam_loss: InfoSAMLoss, teacher: Tap, student: Tap, items: Items) -> Figure:
    """Draw the relations of teacher and student of the first box of every item."""
    one = [{"pixel_values": item["pixel_values"], "input_boxes": item["input_boxes"][:1]} for item in items]
    seen = {"teacher": teacher.observe(default_collate(one)), "student": student.observe(default_collate(one))}
    maps = {name: infosam_loss.relation(*features[:3]) for name, features in seen.items()}
    return relation_figure(maps, torch.stack([as_image(item) for item in items]))


def as_image(item: Item) -> Tensor:
    """Return the image of an item ``[3, S, S]`` with values in [0, 1]."""
    return (item["pixel_values"].cpu() * PIXEL_STD + PIXEL_MEAN).clamp(0, 255) / 255 * item["inside"].cpu()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of ``path`` once it is written: no file is ever there by half."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(module: nn.Module, path: Path) -> None:
    """Write the weights that were trained as safetensors; load them with load_state_dict(..., strict=False)."""
    trained = {
        name: value.detach().cpu().contiguous() for name, value in module.named_parameters() if value.requires_grad
    }
    with whole_file(path) as temporary:
        save_file(trained, temporary)


def setup(options: Options) -> tuple[nn.Module, InfoSAMLoss, Instances, Instances]:
    """Load the model, the loss and the images; an option or a file may be refused."""
    import transformers

    for option, least in {"prompts": 1, "epochs": 1, "batch_size": 1, "limit": 1, "seed": 0, "lr": 0}.items():
        if (value := getattr(options, option)) is not None and not least <= value < math.inf:
            raise ValueError(f"--{option.replace('_', '-')} must be at least {least}, got {value}; leave it out")
    torch.empty(0, device=options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    name = ASSETS / "mini_sam" if options.model == "mini" else options.model
    # Always in eval mode: a SAM has no dropout in use, and BatchNorm keeps the statistics of all its images.
    model = transformers.AutoModelForMaskGeneration.from_pretrained(name).float().eval().to(options.device)
    terms = {name: getattr(options, name) for name in ("lambda_r", "lambda_d", "distillation")}
    infosam_loss = InfoSAMLoss(model.config.mask_decoder_config.hidden_size, **terms).to(options.device)
    size = model.config.prompt_encoder_config.image_size
    train, test = Instances("train", size, options.prompts, options), Instances("test", size, 32, options)
    if min(options.batch_size, len(train)) * options.prompts < 2:
        raise ValueError("--batch-size times --prompts must be at least 2: InfoSAM compares samples; raise one of them")
    return model, infosam_loss, train, test


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune twice, compare on the test images, and write what came out."""
    try:
        options = tyro.cli(Options, prog=PROGRAM, description=__doc__, args=argv)
        pretrained, infosam_loss, train, test = setup(options)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for images in (train, test):
        print(f"{images.split}: {len(images)} images, {images.n_skipped} without instances skipped")
    shown = [test[index] for index in range(min(4, len(test)))]
    models, rows = {"zero-shot": pretrained}, [{"run": "zero-shot", **evaluate(pretrained, test, options)}]
    for name, loss, file_name in (("PEFT", None, ""), ("PEFT + InfoSAM", infosam_loss, "_infosam")):
        models[name], steps = fine_tune(name, pretrained, train, shown, options, loss)
        rows += [*steps[:-1], {**steps[-1], **evaluate(models[name], test, options)}]
        save(models[name], options.out / f"{options.peft}{file_name}.safetensors")
        with whole_file(options.out / "metrics.csv") as path, path.open("w", newline="") as file:
            # The last row has the most columns, in the best order.
            writer = csv.DictWriter(file, dict.fromkeys(column for row in reversed(rows) for column in row))
            writer.writeheader()
            writer.writerows(rows)
    save(infosam_loss.relation, options.out / "relation.safetensors")
    with whole_file(options.out / "comparison.png") as path:
        comparison(models, shown).savefig(path)
    print(f"\n{'':<16}{'IoU':>8}{'Dice':>8}")
    for row in rows:
        if "iou" in row:
            print(f"{row['run']:<16}{row['iou']:>8.3f}{row['dice']:>8.3f}")
    print(f"\n{len(test)} held-out images; weights, metrics.csv and comparison.png are in {options.out}")


if __name__ == "__main__":
    main()
