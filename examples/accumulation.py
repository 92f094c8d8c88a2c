"""One batch in micro-batches of a single image: the gradient of the whole batch, with the graph of one image in memory.

python examples/accumulation.py
"""

import copy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from scipy import ndimage
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import SamModel

from renyi_kd import Accumulation, InfoSAMLoss, tap

ASSETS = Path(__file__).parent / "assets"


def nuclei(count):
    """Return images as SAM takes them, each with boxes around its four largest nuclei and masks of half the size."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    items = []
    for path in sorted((ASSETS / "nuclei/images").glob("*.jpg")):
        image = np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (192, 192)))
        mask = ImageOps.fit(Image.open(ASSETS / f"nuclei/masks/{path.stem}.png").convert("L"), (192, 192))
        labels, n_nuclei = ndimage.label(np.asarray(mask) > 127)
        if n_nuclei >= 4 and len(items) < count:
            largest = 1 + np.bincount(labels.ravel())[1:].argsort()[-4:]
            sides = [ndimage.find_objects(labels)[number - 1] for number in largest]
            pixels = torch.tensor((image - mean) / std).float().permute(2, 0, 1)
            boxes = torch.tensor([[x.start, y.start, x.stop - 1, y.stop - 1] for y, x in sides]).float()
            masks = torch.tensor(labels[::2, ::2] == largest[:, None, None]).float()
            items.append({"pixel_values": pixels, "input_boxes": boxes, "masks": masks})
    return items


def main():
    """Train for three epochs of two steps, each on four images."""
    torch.manual_seed(0)
    pretrained = SamModel.from_pretrained(ASSETS / "mini_sam").eval()
    # peft changes a model in place, so the student is a copy. What dropout drops is the same in both passes.
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(copy.deepcopy(pretrained), lora).train()
    infosam_loss = InfoSAMLoss(dim=128, gradient_share=0.1)
    teacher, student = tap(pretrained), tap(model)
    accumulation = Accumulation(infosam_loss, teacher, student)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=2e-4)
    loader = DataLoader(nuclei(8), batch_size=1, shuffle=True)
    for epoch in range(3):
        images = [{**batch, "multimask_output": False} for batch in loader]
        for micro_batches in (images[:4], images[4:]):
            # First pass: student and teacher run, and leave their features.
            for batch in micro_batches:
                accumulation.collect(batch)
            # Second pass: the graph of one image after the other.
            for batch in accumulation.replay():
                masks = student(batch).pred_masks[:, :, 0]
                task = F.binary_cross_entropy_with_logits(masks, batch["masks"])
                loss = task + accumulation.loss()
                (loss / len(micro_batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        now = infosam_loss.scalars()
        print(
            f"epoch {epoch + 1}: task {task:.4f}, L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, "
            f"share {now['mask_tokens_share']:.2f}"
        )


if __name__ == "__main__":
    main()
