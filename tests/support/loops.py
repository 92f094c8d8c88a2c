"""The loops that people write, and one step of each by hand: plain hooks, and the loss as its equations read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import textbook
from renyi_kd import InfoSAMLoss, SAMFeatures, Tap
from tests.support import module_gradients
from tests.support.models import hf_batch, hf_sam, meta_forward, meta_sam


class Loop(NamedTuple):
    """One way to train a SAM.

    Attributes:
        make: the model of a seed.
        batch: what a data loader gives.
        run: the masks of the model for a batch, with gradient.
        images: the image of each sample, in the order of the decoder calls.

    """

    make: Callable[[int], nn.Module]
    batch: Any
    run: Callable[[nn.Module, Any], list[Tensor]]
    images: list[int]


class Step(NamedTuple):
    """The InfoSAM loss of a step, and the gradients of it and the task loss together, by parameter."""

    loss: Tensor
    gradients: dict[str, Tensor]


def task_loss(masks: list[Tensor]) -> Tensor:
    return sum(mask.float().square().mean() for mask in masks)


def step_with_taps(teacher: Tap, student: Tap, batch: Any, infosam_loss: InfoSAMLoss) -> Step:
    masks = student(batch)
    loss = infosam_loss(teacher, student, batch)
    return Step(loss.detach(), module_gradients(loss + task_loss(masks), student.model, infosam_loss))


def step_by_hand(teacher: nn.Module, student: nn.Module, loop: Loop, infosam_loss: InfoSAMLoss) -> Step:
    """Compute a step without taps and without this package's loss."""
    with torch.no_grad():
        of_teacher, _ = features_by_hand(teacher, loop)
    of_student, masks = features_by_hand(student, loop)
    loss = textbook.infosam_terms(infosam_loss.relation, in_fp32(of_teacher), in_fp32(of_student)).loss
    return Step(loss.detach(), module_gradients(loss + task_loss(masks), student, infosam_loss))


def features_by_hand(model: nn.Module, loop: Loop) -> tuple[SAMFeatures, list[Tensor]]:
    """Run the loop and read the encoder's output and, by their index, the mask tokens of every decoder call."""
    images: list[Tensor] = []
    tokens: list[Tensor] = []
    encoder = model.vision_encoder if hasattr(model, "vision_encoder") else model.image_encoder
    handles = [
        encoder.register_forward_hook(
            lambda _module, _args, output: images.append(getattr(output, "last_hidden_state", output))
        ),
        model.mask_decoder.transformer.register_forward_hook(
            lambda _module, _args, output: tokens.append(output[0].flatten(0, -3)[:, 1:5])
        ),
    ]
    masks = loop.run(model, loop.batch)
    for handle in handles:
        handle.remove()
    return SAMFeatures(torch.cat(images), torch.cat(tokens), torch.tensor(loop.images)), masks


def in_fp32(features: SAMFeatures) -> SAMFeatures:
    """Return the first mask token of each sample with its image, as the textbook takes them."""
    images, tokens, index = features
    return SAMFeatures(images.float(), tokens[:, :1].float(), index)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float) -> None:
    """Assert that each gradient is right to ``rtol`` of the largest one, and that the largest is not zero."""
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        assert error <= rtol * scale, f"{name}: off by {error:.2e} where the largest gradient is {scale:.2e}"


def run_hf(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    names = ("pixel_values", "image_embeddings", "input_boxes")
    inputs = {name: batch[name] for name in names if name in batch}
    return [model(**inputs, multimask_output=False).pred_masks]


def batched_decoder_sam(seed: int) -> nn.Module:
    """Return a Sam whose decoder takes one prompt for each of several images, as MedSAM patches Meta's."""
    from segment_anything.modeling import MaskDecoder

    class BatchedDecoder(MaskDecoder):
        def predict_masks(
            self,
            image_embeddings: Tensor,
            image_pe: Tensor,
            sparse_prompt_embeddings: Tensor,
            dense_prompt_embeddings: Tensor,
        ) -> tuple[Tensor, Tensor]:
            n_images = len(image_embeddings)
            own_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n_images, -1, -1)
            tokens, pixels = self.transformer(
                image_embeddings + dense_prompt_embeddings,
                image_pe.expand_as(image_embeddings),
                torch.cat([own_tokens, sparse_prompt_embeddings], 1),
            )
            upscaled = self.output_upscaling(pixels.mT.unflatten(-1, image_embeddings.shape[-2:]))
            kernels = [mlp(tokens[:, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)]
            masks = torch.einsum("bnc,bchw->bnhw", torch.stack(kernels, 1), upscaled)
            return masks, self.iou_prediction_head(tokens[:, 0])

    model = meta_sam(seed)
    model.mask_decoder.__class__ = BatchedDecoder
    return model


def decode(sam: nn.Module, feature: Tensor, **prompts: Any) -> Tensor:
    """Return the low-resolution masks of Meta's decoder for prompts ``points``, ``boxes``, ``masks``."""
    sparse, dense = sam.prompt_encoder(**{"points": None, "boxes": None, "masks": None, **prompts})
    masks, _ = sam.mask_decoder(
        image_embeddings=feature,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return masks


def run_pairs(sam: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Run image and box, as MedSAM does; the third of the tuple is the truth."""
    images, boxes, _ = batch
    return [decode(sam, sam.image_encoder(images), boxes=boxes)]


def run_each_image(sam: nn.Module, batch: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    """Run all boxes of one image after the other, as lightning-sam does: their number differs."""
    images, boxes = batch
    features = sam.image_encoder(images)
    return [decode(sam, feature[None], boxes=of_image) for feature, of_image in zip(features, boxes, strict=True)]


def run_clicks(sam: nn.Module, batch: list[dict[str, Any]]) -> list[Tensor]:
    """Run growing numbers of clicks, each time with the last masks as a prompt, as micro_sam does."""
    features = sam.image_encoder(torch.stack([item["image"] for item in batch]))
    masks: list[Tensor] = []
    for index, item in enumerate(batch):
        last = None
        for n_clicks in range(1, item["clicks"].shape[1] + 1):
            clicks = item["clicks"][:, :n_clicks]
            last = decode(sam, features[index : index + 1], points=(clicks, torch.ones(clicks.shape[:2])), masks=last)
            masks.append(last)
            last = last.detach()
    return masks


def loops() -> dict[str, Loop]:
    of_two, of_three = hf_batch(2, 3), hf_batch(3, 1)
    images, boxes = of_two["pixel_values"], of_two["input_boxes"]
    clicks = [{"image": image, "clicks": box[None, :, :2] + 2} for image, box in zip(images, boxes, strict=True)]
    pairs = (of_three["pixel_values"], of_three["input_boxes"][:, 0], of_three["ground_truth"])
    return {
        "dicts": Loop(hf_sam, of_two, run_hf, [0, 0, 0, 1, 1, 1]),
        "tuples": Loop(batched_decoder_sam, pairs, run_pairs, [0, 1, 2]),
        "an image at a time": Loop(meta_sam, (images, [boxes[0, :2], boxes[1]]), run_each_image, [0, 0, 1, 1, 1]),
        "clicks": Loop(meta_sam, clicks, run_clicks, [0, 0, 0, 1, 1, 1]),
        "metas dicts": Loop(
            meta_sam,
            [{"image": image, "boxes": box} for image, box in zip(images, boxes, strict=True)],
            meta_forward,
            [0, 0, 0, 1, 1, 1],
        ),
    }


class MiniSam(nn.Module):
    """The least that is recognised as a SAM, for many steps: an encoder and a decoder of a few numbers."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.image_encoder = nn.Conv2d(3, dim, 2)
        self.mask_decoder = MiniDecoder(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.mask_decoder(self.image_encoder(image))


class MiniDecoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.transformer = nn.Linear(dim, dim)
        self.iou_token, self.mask_tokens = nn.Embedding(1, dim), nn.Embedding(1, dim)
        self.output_hypernetworks_mlps = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, image_embeddings: Tensor) -> Tensor:
        token = self.transformer(image_embeddings.mean((2, 3)) + self.mask_tokens.weight)
        if token.isnan().any():
            raise FloatingPointError
        return torch.einsum("bc,bchw->bhw", self.output_hypernetworks_mlps[0](token), image_embeddings)
