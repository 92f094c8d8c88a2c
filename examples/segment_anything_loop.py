"""Meta's segment_anything: a loop that calls the three parts of the model apart, one image a call.

    pip install segment-anything==1.0 torchvision
    python examples/segment_anything_loop.py

The model is small, its weights random. A real one: ``sam_model_registry["vit_b"](checkpoint=...)``, with ``dim=256``.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from renyi_kd import InfoSAMLoss, tap

NUCLEI = Path(__file__).parent / "assets" / "nuclei"
SIZE, GRID, DIM = 128, 16, 64


def small_sam():
    """Return a SAM of 64 channels for images of 128 pixels."""
    encoder = ImageEncoderViT(img_size=SIZE, patch_size=SIZE // GRID, embed_dim=64, depth=2, num_heads=4, out_chans=DIM)
    prompts = PromptEncoder(
        embed_dim=DIM, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=DIM, mlp_dim=128, num_heads=4)
    return Sam(encoder, prompts, MaskDecoder(transformer_dim=DIM, transformer=transformer))


def nuclei(count):
    """Return images ``[3, S, S]``, each with boxes ``[4, 4]`` around its largest nuclei and masks ``[4, S/2, S/2]``."""
    items = []
    for path in sorted((NUCLEI / "images").glob("*.jpg")):
        image = ImageOps.fit(Image.open(path).convert("RGB"), (SIZE, SIZE))
        mask = ImageOps.fit(Image.open(NUCLEI / "masks" / f"{path.stem}.png").convert("L"), (SIZE, SIZE))
        labels, n_nuclei = ndimage.label(np.asarray(mask) > 127)
        if n_nuclei >= 4 and len(items) < count:
            largest = 1 + np.bincount(labels.ravel())[1:].argsort()[-4:]
            sides = [ndimage.find_objects(labels)[number - 1] for number in largest]
            boxes = torch.tensor([[x.start, y.start, x.stop - 1, y.stop - 1] for y, x in sides]).float()
            masks = torch.tensor(labels[::2, ::2] == largest[:, None, None]).float()
            items.append({"image": torch.tensor(np.asarray(image)).permute(2, 0, 1), "boxes": boxes, "masks": masks})
    return items


def segment(sam, batch):
    """Return mask logits ``[4, S/2, S/2]`` for each image; Sam's own forward runs without gradient."""
    features = sam.image_encoder(torch.stack([sam.preprocess(item["image"]) for item in batch]))
    outputs = []
    for feature, item in zip(features, batch, strict=True):
        sparse, dense = sam.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        masks, _ = sam.mask_decoder(feature[None], sam.prompt_encoder.get_dense_pe(), sparse, dense, False)
        outputs.append(masks[:, 0])
    return outputs


def main():
    """Train for two epochs, and print terms and their share of the task's gradient."""
    torch.manual_seed(0)
    pretrained = small_sam()
    sam = copy.deepcopy(pretrained)
    # The loss runs the teacher, so the teacher's tap is told how.
    teacher, student = tap(pretrained, call=segment), tap(sam)
    # Compares each sample with itself, so it takes batches of one; a tenth of the task's gradient at any scale.
    infosam_loss = InfoSAMLoss(DIM, distillation="jensen_renyi", gradient_share=0.1)
    optimizer = torch.optim.AdamW([*sam.parameters(), *infosam_loss.parameters()], lr=2e-4)
    loader = DataLoader(nuclei(8), batch_size=2, collate_fn=list)
    for step, batch in enumerate([*loader, *loader], 1):
        masks = torch.cat([item["masks"] for item in batch])
        task = F.binary_cross_entropy_with_logits(torch.cat(segment(sam, batch)), masks)
        loss = task + infosam_loss(teacher, student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0:
            now = infosam_loss.scalars()
            print(
                f"step {step:>2}: task {task:.4f}, L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, "
                f"share {now['mask_tokens_share']:.2f}"
            )


if __name__ == "__main__":
    main()
