"""SAM 2 on images with Meta's sam2 package: a loop with gradients through encoder, prompt encoder and mask decoder.

    SAM2_BUILD_CUDA=0 pip install sam2==1.1.0
    python examples/sam2_loop.py

The model is small, its weights random. A real one: ``build_sam2(config, checkpoint, mode="train")``, with 1024 pixels.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sam2.build_sam import build_sam2
from scipy import ndimage
from torch.nn import functional as F
from torch.utils.data import DataLoader

from renyi_kd import InfoSAMLoss, tap

NUCLEI = Path(__file__).parent / "assets" / "nuclei"
SIZE, DIM = 128, 256


def small_sam2():
    """Return the package's tiny SAM 2.1 with a smaller trunk, for images of 128 pixels."""
    changes = ["image_size=128", "image_encoder.neck.backbone_channel_list=[128,64,32,16]"]
    trunk = ["embed_dim=16", "stages=[1,1,2,1]", "global_att_blocks=[3]"]
    overrides = [f"model.{change}" for change in [*changes, *[f"image_encoder.trunk.{change}" for change in trunk]]]
    return build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", mode="train", hydra_overrides_extra=overrides)


def nuclei(count):
    """Return images ``[3, S, S]``, each with boxes ``[4, 4]`` around its largest nuclei and masks ``[4, S/4, S/4]``."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    items = []
    for path in sorted((NUCLEI / "images").glob("*.jpg")):
        image = np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (SIZE, SIZE)))
        mask = ImageOps.fit(Image.open(NUCLEI / "masks" / f"{path.stem}.png").convert("L"), (SIZE, SIZE))
        labels, n_nuclei = ndimage.label(np.asarray(mask) > 127)
        if n_nuclei >= 4 and len(items) < count:
            largest = 1 + np.bincount(labels.ravel())[1:].argsort()[-4:]
            sides = [ndimage.find_objects(labels)[number - 1] for number in largest]
            boxes = torch.tensor([[x.start, y.start, x.stop - 1, y.stop - 1] for y, x in sides]).float()
            masks = torch.tensor(labels[::4, ::4] == largest[:, None, None]).float()
            pixels = torch.tensor((image - mean) / std).float().permute(2, 0, 1)
            items.append({"image": pixels, "boxes": boxes, "masks": masks})
    return items


def segment(sam, batch):
    """Return mask logits ``[4, S/4, S/4]`` for each image, as the package's image predictor does without gradient."""
    _, levels, _, sizes = sam._prepare_backbone_features(sam.forward_image(torch.stack([x["image"] for x in batch])))
    levels[-1] = levels[-1] + sam.no_mem_embed
    maps = [level.permute(1, 2, 0).unflatten(2, size) for level, size in zip(levels, sizes, strict=True)]
    outputs = []
    for index, item in enumerate(batch):
        sparse, dense = sam.sam_prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        *fine, coarse = [level[index : index + 1] for level in maps]
        position = sam.sam_prompt_encoder.get_dense_pe()
        masks = sam.sam_mask_decoder(coarse, position, sparse, dense, False, True, high_res_features=fine)[0]
        outputs.append(masks[:, 0])
    return outputs


def main():
    """Train for two epochs, and print terms and their share of the task's gradient."""
    torch.manual_seed(0)
    pretrained = small_sam2()
    sam = copy.deepcopy(pretrained)
    teacher, student = tap(pretrained, call=segment), tap(sam)  # the loss runs the teacher
    # Compares each sample with itself, so it takes batches of one; a tenth of the task's gradient at any scale.
    infosam_loss = InfoSAMLoss(DIM, distillation="jensen_renyi", gradient_share=0.1)
    optimizer = torch.optim.AdamW([*sam.parameters(), *infosam_loss.parameters()], lr=2e-4)
    loader = DataLoader(nuclei(6), batch_size=2, collate_fn=list)
    for step, batch in enumerate([*loader, *loader], 1):
        masks = torch.cat([item["masks"] for item in batch])
        task = F.binary_cross_entropy_with_logits(torch.cat(segment(sam, batch)), masks)
        loss = task + infosam_loss(teacher, student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = infosam_loss.scalars()
        terms = f"L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, share {now['mask_tokens_share']:.2f}"
        print(f"step {step}: task {task:.3f}, {terms}")


if __name__ == "__main__":
    main()
