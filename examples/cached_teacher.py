"""A cached teacher: its image encoder runs once per image, and its features come from disk afterwards.

python examples/cached_teacher.py
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from scipy import ndimage
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import SamModel

from renyi_kd import CachedTeacher, InfoSAMLoss, tap

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
    """Train for three epochs, and count how often the teacher's encoder runs."""
    torch.manual_seed(0)
    pretrained = SamModel.from_pretrained(ASSETS / "mini_sam").eval()
    # peft changes a model in place, so the student is a copy.
    lora = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(copy.deepcopy(pretrained), lora)
    # Compares each sample with itself, so it suits small batches; a tenth of the task's gradient at any scale.
    infosam_loss = InfoSAMLoss(dim=128, distillation="jensen_renyi", gradient_share=0.1)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=2e-4)
    # An id stands for an image as the encoder sees it: no random crops or flips under one id.
    images = [{**item, "sample_id": f"nucleus {number}"} for number, item in enumerate(nuclei(8))]

    runs = []
    pretrained.vision_encoder.layers[0].register_forward_hook(lambda *_: runs.append(1))
    # A folder of your own stays for the next training: "runs/teacher_features".
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = CachedTeacher(tap(pretrained), folder), tap(model)
        for epoch in range(3):
            runs.clear()
            for batch in DataLoader(images, batch_size=2, shuffle=True):
                masks = student({**batch, "multimask_output": False}).pred_masks[:, :, 0]
                task = F.binary_cross_entropy_with_logits(masks, batch["masks"])
                loss = task + infosam_loss(teacher, student)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            now = infosam_loss.scalars()
            print(
                f"epoch {epoch + 1}: teacher's encoder ran {len(runs)} times, task {task:.4f}, "
                f"L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, share {now['mask_tokens_share']:.2f}"
            )
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        print(f"{size / 2**10 / len(images):.0f} KiB an image on disk")


if __name__ == "__main__":
    main()
