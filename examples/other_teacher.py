"""Another architecture as teacher: a student with a third of the encoder's layers keeps the relations of a larger SAM.

    python examples/other_teacher.py

Teacher and student may differ in everything but the channels of their features and the grid of their image features.
"""

import copy
from pathlib import Path

import numpy as np
import torch
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


def smaller(sam):
    """Return a SAM with a new encoder of two narrow layers, and the prompt encoder and decoder of the other."""
    config = copy.deepcopy(sam.config)
    vision = config.vision_config
    vision.num_hidden_layers, vision.hidden_size, vision.mlp_dim, vision.global_attn_indexes = 2, 64, 128, [1]
    model = SamModel(config)
    state = {name: value for name, value in sam.state_dict().items() if not name.startswith("vision_encoder")}
    model.load_state_dict(state, strict=False)
    return model


def main():
    """Train the student's encoder, and watch how far its relations are from the teacher's."""
    torch.manual_seed(0)
    large = SamModel.from_pretrained(ASSETS / "mini_sam").eval()
    small = smaller(large)
    teacher, student = tap(large), tap(small)
    # Zero where the relations agree, which the paper's form is not. Without L_r the relation module stays as it is.
    infosam_loss = InfoSAMLoss(dim=128, distillation="jensen_renyi", lambda_r=0, lambda_d=1).requires_grad_(False)
    optimizer = torch.optim.AdamW(small.vision_encoder.parameters(), lr=1e-3)
    for epoch in range(6):
        distances = []
        for batch in DataLoader(nuclei(8), batch_size=2, shuffle=True):
            masks = student({**batch, "multimask_output": False}).pred_masks[:, :, 0]
            task = F.binary_cross_entropy_with_logits(masks, batch["masks"])
            loss = task + infosam_loss(teacher, student)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            distances.append(infosam_loss.scalars()["distillation"])
        mean, share = np.mean(distances), infosam_loss.scalars()["mask_tokens_share"]
        print(f"epoch {epoch + 1}: task {task:.4f}, mean L_d {mean:.3f}, share {share:.2f}")


if __name__ == "__main__":
    main()
