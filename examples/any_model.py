"""Any other model, by naming two places in it: here CLIP, whose words and patches are to relate as before.

    python examples/any_model.py

The model is small and its weights are random. ``CLIPModel.from_pretrained(name)`` with its processor makes a real one.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel

from renyi_kd import InfoSAMLoss, tap

IMAGES = Path(__file__).parent / "assets" / "nuclei" / "images"
SIZE, PATCH, DIM, LENGTH = 64, 8, 32, 24


def small_clip():
    """Return a CLIP that reads 64 pixels and the bytes of a caption."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 128, "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 0}
    vision = {**tower, "image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).train()


def captioned(count):
    """Return images with captions of their brightness and colour."""
    items = []
    for path in sorted(IMAGES.glob("*.jpg"))[:count]:
        image = np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (SIZE, SIZE))) / 255
        colour = "grey" if np.ptp(image.mean((0, 1))) < 0.02 else "stained"
        caption = f"{'bright' if image.mean() > 0.4 else 'dark'} {colour} cells"
        ids = torch.tensor(list(caption.encode().ljust(LENGTH, b"\0")))
        pixels = torch.tensor(4 * image - 2).float().permute(2, 0, 1)
        items.append({"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids > 0).long()})
    return items


def tapped(clip):
    """Return the tap of a CLIP: its patches as image features, and the pooled text as one token an image."""

    def patches(output):
        projected = clip.visual_projection(output.last_hidden_state[:, 1:])
        return projected.mT.unflatten(-1, (SIZE // PATCH, SIZE // PATCH))

    return tap(clip, image_features=("vision_model", patches), mask_tokens="text_projection")


def main():
    """Train for five epochs by CLIP's own loss and InfoSAM's."""
    torch.manual_seed(0)
    pretrained = small_clip()
    clip = copy.deepcopy(pretrained)
    teacher, student = tapped(pretrained), tapped(clip)
    # Zero where the student's relations are the teacher's, which the paper's form is not.
    infosam_loss = InfoSAMLoss(DIM, distillation="jensen_renyi")
    optimizer = torch.optim.AdamW([*clip.parameters(), *infosam_loss.parameters()], lr=1e-3)
    images = captioned(32)
    for epoch in range(5):
        for batch in DataLoader(images, batch_size=8, shuffle=True):
            task = student({**batch, "return_loss": True}).loss
            loss = task + infosam_loss(teacher, student)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = infosam_loss.scalars()
        print(
            f"epoch {epoch + 1}: task {task:.3f}, L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, "
            f"share {now['mask_tokens_share']:.2f}"
        )


if __name__ == "__main__":
    main()
