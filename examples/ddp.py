"""DistributedDataParallel: the loss is wrapped like the model, and goes over the samples of all processes.

torchrun --nproc_per_node 2 examples/ddp.py
"""

import copy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from scipy import ndimage
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
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
    """Train for three epochs; each process has a single image a step."""
    # On GPUs: "nccl", and model, teacher, loss and batches on the device of LOCAL_RANK.
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    pretrained = SamModel.from_pretrained(ASSETS / "mini_sam").eval()
    # peft changes a model in place, so the student is a copy.
    lora = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = DistributedDataParallel(get_peft_model(copy.deepcopy(pretrained), lora), find_unused_parameters=True)
    # The paper's form compares samples with one another, so those of other processes count too.
    infosam_loss = DistributedDataParallel(InfoSAMLoss(dim=128, global_batch=True, gradient_share=0.1))
    teacher, student = tap(pretrained), tap(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=2e-4)
    images = nuclei(8)
    sampler = DistributedSampler(images, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in DataLoader(images, batch_size=1, sampler=sampler):
            masks = student({**batch, "multimask_output": False}).pred_masks[:, :, 0]
            task = F.binary_cross_entropy_with_logits(masks, batch["masks"])
            loss = task + infosam_loss(teacher, student)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = infosam_loss.module.scalars()
        print(
            f"epoch {epoch + 1}, process {distributed.get_rank()}: task {task:.4f}, L_r {now['compression']:.3f}, "
            f"L_d {now['distillation']:.3f}, share {now['mask_tokens_share']:.2f}"
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
