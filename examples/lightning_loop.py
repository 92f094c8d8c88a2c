"""Lightning: the loss is a module of yours, the taps are none, so of the teacher nothing is trained or saved.

pip install lightning
python examples/lightning_loop.py
"""

import copy
from pathlib import Path

import lightning
import numpy as np
import torch
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


class FineTuning(lightning.LightningModule):
    """A SAM with LoRA that keeps the relations of the pre-trained one."""

    def __init__(self, pretrained):
        super().__init__()
        # peft changes a model in place, so the student is a copy.
        lora = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mask_decoder"])
        self.sam = get_peft_model(copy.deepcopy(pretrained), lora)
        # Compares each sample with itself, so it suits small batches; a tenth of the task's gradient at any scale.
        self.infosam_loss = InfoSAMLoss(dim=128, distillation="jensen_renyi", gradient_share=0.1)
        self.teacher, self.student = tap(pretrained), tap(self.sam)

    def on_fit_start(self):
        """Move the teacher, which Lightning does not know of."""
        self.teacher.model.to(self.device, self.dtype)

    def training_step(self, batch, _index):
        """Return the task's loss and InfoSAM's."""
        output = self.student({**batch, "multimask_output": False})
        task = F.binary_cross_entropy_with_logits(output.pred_masks[:, :, 0], batch["masks"])
        self.log("task", task)
        return task + self.infosam_loss(self.teacher, self.student)

    def on_train_batch_end(self, *_args):
        """Log terms, similarities and shares, which are known after the backward."""
        self.log_dict(self.infosam_loss.scalars())
        now = self.trainer.callback_metrics
        if self.global_step % 4 == 0:
            print(
                f"step {self.global_step:>2}: task {now['task']:.4f}, L_r {now['compression']:.3f}, "
                f"L_d {now['distillation']:.3f}, share {now['mask_tokens_share']:.2f}"
            )

    def configure_optimizers(self):
        """Train what LoRA trains, and the relation module."""
        return torch.optim.AdamW([value for value in self.parameters() if value.requires_grad], lr=2e-4)


def main():
    """Train for three epochs of four steps."""
    lightning.seed_everything(0)
    module = FineTuning(SamModel.from_pretrained(ASSETS / "mini_sam").eval())
    trainer = lightning.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader(nuclei(8), batch_size=2, shuffle=True))


if __name__ == "__main__":
    main()
