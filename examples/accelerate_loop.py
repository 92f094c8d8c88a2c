"""Accelerate: the loss is prepared like the model, the teacher in evaluation mode, and the taps come after.

    pip install accelerate
    python examples/accelerate_loop.py

On several devices: ``accelerate launch examples/accelerate_loop.py``.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from scipy import ndimage
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import SamModel

from renyi_kd import InfoSAMLoss, tap

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
    """Train for three epochs of four steps."""
    torch.manual_seed(0)
    pretrained = SamModel.from_pretrained(ASSETS / "mini_sam").eval()
    # peft changes a model in place, so the student is a copy.
    lora = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(copy.deepcopy(pretrained), lora)
    # A mean over samples, however processes split the batch; a tenth of the task's gradient at any scale.
    infosam_loss = InfoSAMLoss(dim=128, distillation="jensen_renyi", gradient_share=0.1)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=2e-4)
    loader = DataLoader(nuclei(8), batch_size=2, shuffle=True)

    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    model, infosam_loss, optimizer, loader = accelerator.prepare(model, infosam_loss, optimizer, loader)
    teacher, student = tap(accelerator.prepare_model(pretrained, evaluation_mode=True)), tap(model)
    for epoch in range(3):
        for batch in loader:
            output = model(pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"], multimask_output=False)
            task = F.binary_cross_entropy_with_logits(output.pred_masks[:, :, 0], batch["masks"])
            loss = task + infosam_loss(teacher, student, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        now = accelerator.unwrap_model(infosam_loss).scalars()
        accelerator.print(
            f"epoch {epoch + 1}: task {task:.4f}, L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, "
            f"share {now['mask_tokens_share']:.2f}"
        )


if __name__ == "__main__":
    main()
