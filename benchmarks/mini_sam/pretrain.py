"""Pretrain mini SAM, the small Segment Anything model that examples/finetune.py adapts.

    python -m benchmarks.mini_sam.pretrain --out examples/assets/mini_sam

A `transformers.SamModel` of 1.7 million weights learns, from nothing but generated scenes, to segment the object that a
box or a point names. With the default options this wrote the weights in examples/assets/mini_sam.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.command_line import parsed, sentence_at_fault
from benchmarks.devices import on_device
from benchmarks.files import whole_file
from benchmarks.mini_sam.scenes import random_scene
from benchmarks.sam.data import PIXEL_MEAN, PIXEL_STD
from benchmarks.torchvision_compat import ensure_importable

# Before transformers is imported, which looks for torchvision.
ensure_importable()

import transformers  # noqa: E402
from transformers import SamConfig, SamModel  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

IMAGE_SIZE, PATCH_SIZE, WIDTH = 192, 8, 128
MEAN, STD = PIXEL_MEAN.flatten().numpy() / 255, PIXEL_STD.flatten().numpy() / 255
N_BOXES, N_POINTS = 5, 3
PEAK_LR, WEIGHT_DECAY, WARMUP_STEPS = 8e-4, 0.05, 100
# Over this share of the steps the loss goes from balanced cross-entropy to focal; see mask_loss.
BALANCED_SHARE = 0.5
HELD_OUT_SCENES, EVALUATE_EVERY = 96, 200
PROGRAM = "benchmarks.mini_sam.pretrain"
COLUMNS = ("step", "loss", "held_out_box_iou", "held_out_point_iou", "seconds")


@dataclasses.dataclass(frozen=True)
class Options:
    """How long it is trained, and where the result goes.

    Attributes:
        out: folder to write; made if missing.
        steps: of the optimiser.
        batch_size: scenes a step.
        seed: of the weights and the scenes.
        device: as torch names it.

    """

    out: Path
    steps: int = 2400
    batch_size: int = 4
    seed: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))


# model


def mini_sam_config() -> SamConfig:
    """Return the configuration; the image, the token grid and the widths of the three parts must agree."""
    grid = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    return SamConfig(
        vision_config={
            **grid,
            "hidden_size": WIDTH,
            "output_channels": WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "mlp_ratio": 2.0,
            # Divides the 24 x 24 grid, so that no window is padded.
            "window_size": 8,
            "global_attn_indexes": [2, 5],
            # Sines and cosines of these make up the decoder's width.
            "num_pos_feats": WIDTH // 2,
            "layer_norm_eps": 1e-6,
        },
        prompt_encoder_config={**grid, "hidden_size": WIDTH, "layer_norm_eps": 1e-6},
        mask_decoder_config={
            "hidden_size": WIDTH,
            "mlp_dim": 256,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 64,
            "layer_norm_eps": 1e-6,
        },
    )


def new_mini_sam() -> SamModel:
    """Return an untrained mini SAM, initialised as the SAM paper's code does it rather than as transformers does.

    transformers draws all weights at scale 0.02, from which the mask decoder barely starts, and the random Fourier
    features at scale hidden_size / 2, far too fine to tell neighbouring tokens.
    """
    model = SamModel(mini_sam_config())
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    frequencies = model.shared_image_embedding.positional_embedding
    torch.nn.init.normal_(frequencies, std=1.0)
    frequencies.requires_grad_(False)
    return model


def save_atomically(model: SamModel, out: Path) -> None:
    """Write config.json and model.safetensors (fp16) to `out`, each under a temporary name and then renamed."""
    half = SamModel(model.config)
    half.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        half.half().save_pretrained(temporary)
        config = json.loads((Path(temporary) / "config.json").read_text())
        # The weights are stored in fp16 but meant to be used in fp32, which from_pretrained reads from here.
        config["dtype"] = "float32"
        (Path(temporary) / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name in ("config.json", "model.safetensors"):
            (Path(temporary) / name).replace(out / name)


# data


class PromptedScenes(Dataset):
    """Scene `index` of a stream, with boxes and points that name objects in it.

    Items are dictionaries of pixel_values [3, s, s], boxes [n_boxes, 4] and points [n_points, 1, 2] in pixels, and the
    named objects' masks box_masks [n_boxes, s, s] and point_masks [n_points, s, s], bool.
    """

    def __init__(self, count: int, *, seed: int, stream: int, jitter: float) -> None:
        self.count, self.seed, self.stream, self.jitter = count, seed, stream, jitter

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, self.stream, index])
        height, width = IMAGE_SIZE, IMAGE_SIZE
        if rng.random() < 0.4:
            height = int(rng.uniform(0.6, 1) * IMAGE_SIZE)
        if rng.random() < 0.5:
            height, width = width, height
        scene = random_scene(rng, height, width)
        labels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int32)
        labels[:height, :width] = scene.labels
        named = rng.choice(np.unique(scene.labels[scene.labels > 0]), size=N_BOXES + N_POINTS)
        masks = labels == named[:, None, None]
        return {
            "pixel_values": torch.from_numpy(to_pixel_values(scene.image)),
            "boxes": torch.from_numpy(np.stack([jittered_box(rng, m, self.jitter) for m in masks[:N_BOXES]])),
            "points": torch.from_numpy(np.stack([point_inside(rng, m) for m in masks[N_BOXES:]])[:, None]),
            "box_masks": torch.from_numpy(masks[:N_BOXES]),
            "point_masks": torch.from_numpy(masks[N_BOXES:]),
        }


def to_pixel_values(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalise RGB in [0, 1], [h, w, 3], and pad it with zeros on the right and below to [3, s, s]."""
    height, width, _ = image.shape
    pixels = np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    pixels[:, :height, :width] = ((image - MEAN) / STD).transpose(2, 0, 1)
    return pixels


def jittered_box(rng: Generator, mask: NDArray[np.bool_], jitter: float) -> NDArray[np.float32]:
    """Return the tight box (x0, y0, x1, y1) of a mask in pixels, each side moved by about `jitter` of its length."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    sides = np.tile(box[2:] - box[:2] + 1, 2)
    return np.clip(box + jitter * sides * rng.standard_normal(4), 0, IMAGE_SIZE - 1).astype(np.float32)


def point_inside(rng: Generator, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a random pixel (x, y) of a mask."""
    return np.argwhere(mask)[rng.integers(mask.sum()), ::-1].astype(np.float32)


# objective


def mask_loss(logits: Tensor, target: Tensor, balance: float) -> Tensor:
    """Return dice + balance x balanced cross-entropy + (1 - balance) x 20 focal of each mask.

    Focal loss alone, as SAM uses it, holds a new model at the empty mask for long; cross-entropy that weighs the
    object's pixels as much as all others starts it at once, but in the end would draw masks too large.

    Args:
        logits: [..., h, w].
        target: [..., h, w], bool, at least one pixel true in each mask.
        balance: share of the balanced cross-entropy, in [0, 1].

    Returns:
        One loss a mask, [...].
    """
    target = target.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target
    area, rest = target.sum((-2, -1)), (1 - target).sum((-2, -1))
    balanced = (target * cross_entropy).sum((-2, -1)) / area + ((1 - target) * cross_entropy).sum((-2, -1)) / rest
    focal = (wrong.square() * cross_entropy).mean((-2, -1))
    dice = 1 - (2 * (probability * target).sum((-2, -1)) + 1) / (probability.sum((-2, -1)) + area + 1)
    return dice + balance * balanced + (1 - balance) * 20 * focal


def mask_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Return the intersection over union of `logits > 0` and `target`, both [..., h, w]; result [...] in [0, 1]."""
    predicted = logits > 0
    return (predicted & target).sum((-2, -1)) / (predicted | target).sum((-2, -1)).clamp(min=1)


def segment(model: SamModel, embeddings: Tensor, multimask: bool, **prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Return mask logits at the image's size, [b, p, m, s, s], and predicted IoUs, [b, p, m]."""
    output = model(image_embeddings=embeddings, multimask_output=multimask, **prompts)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    logits = F.interpolate(output.pred_masks.flatten(0, 1), size, mode="bilinear", align_corners=False)
    return logits.unflatten(0, output.pred_masks.shape[:2]), output.iou_scores


def prompt_loss(logits: Tensor, scores: Tensor, masks: Tensor, balance: float) -> Tensor:
    """Return the loss of the best of m masks plus the squared error of all predicted IoUs, averaged over prompts."""
    target = masks[:, :, None].expand_as(logits)
    return mask_loss(logits, target, balance).amin(-1).mean() + F.mse_loss(scores, mask_iou(logits, target))


def step_loss(model: SamModel, batch: dict[str, Tensor], *, multimask: bool, balance: float) -> Tensor:
    """Return the loss of a batch's boxes (one mask each) and points (`multimask`: the best of three masks)."""
    embeddings = model.vision_encoder(batch["pixel_values"]).last_hidden_state
    by_box = segment(model, embeddings, False, input_boxes=batch["boxes"])
    by_point = segment(model, embeddings, multimask, input_points=batch["points"])
    point_loss = prompt_loss(*by_point, batch["point_masks"], balance)
    return prompt_loss(*by_box, batch["box_masks"], balance) + 0.5 * point_loss


@torch.no_grad()
def held_out_iou(model: SamModel, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Return the mean IoU over held-out prompts: tight boxes, then single points; one mask a prompt."""
    model.eval()
    boxes, points = [], []
    for batch in batches:
        embeddings = model.get_image_embeddings(batch["pixel_values"])
        logits, _ = segment(model, embeddings, False, input_boxes=batch["boxes"])
        boxes.append(mask_iou(logits[:, :, 0], batch["box_masks"]))
        logits, _ = segment(model, embeddings, False, input_points=batch["points"])
        points.append(mask_iou(logits[:, :, 0], batch["point_masks"]))
    model.train()
    return torch.cat(boxes).mean().item(), torch.cat(points).mean().item()


# training


def train(model: SamModel, options: Options) -> list[dict[str, float]]:
    """Train in place and return the rows of training.csv; every evaluation writes them and the weights so far."""
    count = options.steps * options.batch_size
    scenes = DataLoader(
        PromptedScenes(count, seed=options.seed, stream=0, jitter=0.05), options.batch_size, num_workers=1
    )
    held_out = DataLoader(PromptedScenes(HELD_OUT_SCENES, seed=options.seed, stream=1, jitter=0.0), 8)
    held_out_batches = [on_device(batch, options.device) for batch in held_out]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    warmup = min(WARMUP_STEPS, options.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * s / options.steps))
    )
    rows, recent, started = [], [], time.perf_counter()
    progress = tqdm(scenes, total=options.steps, unit="step", smoothing=0.05)
    for step, batch in enumerate(progress, start=1):
        balance = max(0.0, 1 - step / (BALANCED_SHARE * options.steps))
        loss = step_loss(model, on_device(batch, options.device), multimask=step % 2 == 0, balance=balance)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % EVALUATE_EVERY == 0 or step == options.steps:
            box_iou, point_iou = held_out_iou(model, held_out_batches)
            seconds = round(time.perf_counter() - started)
            values = (step, round(float(np.mean(recent)), 4), round(box_iou, 4), round(point_iou, 4), seconds)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            write_rows(rows, options.out / "training.csv")
            save_atomically(model, options.out)
            progress.set_postfix(loss=rows[-1]["loss"], box=rows[-1]["held_out_box_iou"])
            recent.clear()
    return rows


def write_rows(rows: list[dict[str, float]], path: Path) -> None:
    """Write `rows` as CSV."""
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def check(options: Options) -> None:
    """Raise an error that names the option, unless all can be used."""
    for option, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
        if (value := getattr(options, option)) < least:
            name = option.replace("_", "-")
            raise ValueError(
                f"--{name} must be at least {least}, got {value}; leave it out for {getattr(Options, option)}"
            )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {options.out}; name another path")
    torch.empty(0, device=options.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the command line's options and write the folder."""
    with sentence_at_fault(PROGRAM):
        options = parsed(Options, PROGRAM, __doc__, argv)
        check(options)
        options.out.mkdir(parents=True, exist_ok=True)
    # Its bars, one for each save, would break the progress bar of the training.
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    model = new_mini_sam().to(options.device).train()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"mini SAM, {size:.2f} million weights; torch {torch.__version__}, transformers {transformers.__version__}")
    last = train(model, options)[-1]
    print(f"{last['step']} steps in {last['seconds'] / 60:.1f} minutes; held-out IoU on generated scenes: ", end="")
    print(f"{last['held_out_box_iou']:.3f} with a box, {last['held_out_point_iou']:.3f} with a point -> {options.out}")


if __name__ == "__main__":
    main()
