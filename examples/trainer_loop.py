"""The Trainer of transformers: the loss goes into compute_loss, and a callback clears the gradients of its module.

pip install accelerate
python examples/trainer_loop.py
"""

import copy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from scipy import ndimage
from torch.nn import functional as F
from transformers import SamModel, Trainer, TrainerCallback, TrainingArguments

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
    """Train for twelve steps."""
    arguments = TrainingArguments(
        "runs/trainer", per_device_train_batch_size=2, max_steps=12, save_strategy="no", remove_unused_columns=False
    )
    torch.manual_seed(0)
    pretrained = SamModel.from_pretrained(ASSETS / "mini_sam").eval().to(arguments.device)
    # peft changes a model in place, so the student is a copy.
    lora = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
    model = get_peft_model(copy.deepcopy(pretrained), lora)
    teacher, student = tap(pretrained), tap(model)
    # Compares each sample with itself, so it suits small batches; a tenth of the task's gradient at any scale.
    infosam_loss = InfoSAMLoss(dim=128, distillation="jensen_renyi", gradient_share=0.1).to(arguments.device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trainable, *infosam_loss.parameters()], lr=2e-4)

    class SamTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            images, boxes = inputs["pixel_values"], inputs["input_boxes"]
            masks = model(pixel_values=images, input_boxes=boxes, multimask_output=False).pred_masks[:, :, 0]
            task = F.binary_cross_entropy_with_logits(masks, inputs["masks"])
            loss = task + infosam_loss(teacher, student, inputs)
            return (loss, {"masks": masks}) if return_outputs else loss

    class ClearInfoSAM(TrainerCallback):
        def on_optimizer_step(self, _args, state, _control, **_more):
            infosam_loss.zero_grad()
            now = infosam_loss.scalars()
            print(
                f"step {state.global_step + 1:>2}: L_r {now['compression']:.3f}, L_d {now['distillation']:.3f}, "
                f"share {now['mask_tokens_share']:.2f}"
            )

    optimizers = (optimizer, None)
    trainer = SamTrainer(model, arguments, train_dataset=nuclei(8), optimizers=optimizers, callbacks=[ClearInfoSAM])
    loss = trainer.train().training_loss
    print(f"mean loss {loss:.4f}")


if __name__ == "__main__":
    main()
