"""The SAMs that are fine-tuned, and one way to run them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.torchvision_compat import ensure_importable

Segment = Callable[[nn.Module, dict[str, Tensor]], Tensor]
# The side of the input that its weights were trained with.
_MOBILE_SAM_SIZE = 1024
MINI_SAM = Path(__file__).parent.parent.parent / "examples" / "assets" / "mini_sam"


class Sam(NamedTuple):
    """A pretrained SAM: the module, how to run it on a batch, its square input in pixels, its decoder's channels.

    ``segment(model, batch)`` takes ``pixel_values [b, 3, S, S]``, ``inside [b, 1, S, S]``, 0 in the padding, and boxes
    or points as transformers' SamModel does, and returns mask logits ``[b, p, S, S]``. Of a SAM 1, ``image_embeddings
    [b, d, h, w]`` in the batch take the place of the encoder's run.
    """

    model: nn.Module
    segment: Segment
    image_size: int
    dim: int


def load_sam(name: str, weights: Path | None, image_size: int | None) -> Sam:
    """Return the pretrained SAM of a name: "mini", "mobile_sam", or one of transformers by name or folder.

    Raises:
        FileNotFoundError: the weights file is missing.
        ModuleNotFoundError: the package of the model is not installed.
        OSError: transformers finds no such model.
        ValueError: the model cannot work at ``image_size``.

    """
    ensure_importable()
    return _load_mobile_sam(weights, image_size) if name == "mobile_sam" else _load_hf_sam(name, image_size)


def _load_hf_sam(name: str, image_size: int | None) -> Sam:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if name == "mini" and not (MINI_SAM / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{MINI_SAM}/model.safetensors: missing; write it with python -m benchmarks.mini_sam.pretrain"
        )
    # SamModel, SamHQModel, Sam2Model, ...: all of them take these batches.
    model = transformers.AutoModelForMaskGeneration.from_pretrained(MINI_SAM if name == "mini" else name).float()
    prompts = model.config.prompt_encoder_config
    if image_size not in (None, prompts.image_size):
        if model.config.model_type != "sam":
            raise ValueError(f"--image-size must be {prompts.image_size} with {name}, got {image_size}; leave it out")
        if image_size % prompts.patch_size:
            raise ValueError(f"--image-size must be a multiple of {prompts.patch_size} px, got {image_size}")
        model = _resized(model, image_size)
    # Always in eval mode: a SAM has no dropout in use, and BatchNorm keeps the statistics of all its images.
    return Sam(
        model.eval(),
        segment_hf,
        model.config.prompt_encoder_config.image_size,
        model.config.mask_decoder_config.hidden_size,
    )


def _resized(model: nn.Module, image_size: int) -> nn.Module:
    """Return the model for inputs of another size, its embeddings of absolute and relative positions interpolated."""
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = config.prompt_encoder_config.image_size = image_size
    config.prompt_encoder_config.image_embedding_size = image_size // config.vision_config.patch_size
    resized = type(model)(config)
    state = model.state_dict()
    for name, target in resized.state_dict().items():
        value = state[name]
        if value.shape == target.shape:
            continue
        if value.ndim == 4:
            value = F.interpolate(value.permute(0, 3, 1, 2), target.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
        else:
            value = F.interpolate(value.T[None], len(target), mode="linear")[0].T
        state[name] = value
    resized.load_state_dict(state)
    return resized


def segment_hf(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a transformers SAM."""
    image = "image_embeddings" if "image_embeddings" in batch else "pixel_values"
    names = (image, "input_boxes", "input_points", "input_labels")
    inputs = {name: batch[name] for name in names if name in batch}
    low_resolution = model(**inputs, multimask_output=False).pred_masks[:, :, 0]
    return _at_input_size(low_resolution, batch)


def _load_mobile_sam(weights: Path | None, image_size: int | None) -> Sam:
    if weights is None:
        raise ValueError("--weights must name a safetensors file with --model mobile_sam, got nothing")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: missing; --weights must be a safetensors file with MobileSAM's own names")
    image_size = image_size or _MOBILE_SAM_SIZE
    if image_size % 16:
        raise ValueError(f"--image-size must be a multiple of 16 px with --model mobile_sam, got {image_size}")
    try:
        from mobilesam_lite.mobile_sam import build_sam_vit_t
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; --model mobile_sam needs: pip install mobilesam-lite") from error
    from safetensors.torch import load_file

    model = mobile_sam_at(image_size, build_sam_vit_t())
    state = {name: value.float() for name, value in load_file(weights).items()}
    differ = sorted(model.state_dict().keys() ^ state.keys())
    if differ:
        raise ValueError(
            f"--weights must hold the tensors of MobileSAM by their names, got {weights}, which differs in "
            f"{len(differ)} of them, such as {differ[0]}; save mobile_sam.pt as safetensors"
        )
    model.load_state_dict(state)
    # eval() again: TinyViT's attention computes its biases there, and its builder did so before the weights came.
    return Sam(model.eval(), segment_meta, image_size, 256)


def mobile_sam_at(image_size: int, model: nn.Module) -> nn.Module:
    """Return the model for inputs of a size: its weights are those of windows, and only its grids know the image."""
    encoder, side = model.image_encoder, image_size // 16
    for module in encoder.modules():
        if hasattr(module, "input_resolution"):
            module.input_resolution = tuple(n * image_size // _MOBILE_SAM_SIZE for n in module.input_resolution)

    def forward_features(encoder: nn.Module, x: Tensor) -> Tensor:
        x = encoder.patch_embed(x)
        for layer in encoder.layers:
            x = layer(x)
        return encoder.neck(x.mT.unflatten(2, (side, side)))

    # The package's own has the grid of 1024 pixels written into it.
    encoder.forward_features = MethodType(forward_features, encoder)
    encoder.img_size = image_size
    model.prompt_encoder.image_embedding_size = (side, side)
    model.prompt_encoder.input_image_size = (image_size, image_size)
    return model


def segment_meta(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a SAM with Meta's interface."""
    # Meta's own forward runs without gradient and its decoder takes one image at a time.
    features = batch["image_embeddings"] if "image_embeddings" in batch else model.image_encoder(batch["pixel_values"])
    masks = []
    for index, feature in enumerate(features):
        boxes = batch["input_boxes"][index] if "input_boxes" in batch else None
        points = (batch["input_points"][index], batch["input_labels"][index]) if "input_points" in batch else None
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=None)
        low_resolution, _ = model.mask_decoder(
            image_embeddings=feature[None],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        masks.append(low_resolution[:, 0])
    return _at_input_size(torch.stack(masks), batch)


def _at_input_size(low_resolution: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return logits at the size of the input, and far below zero in the padding."""
    inside = batch["inside"]
    logits = F.interpolate(low_resolution.float(), inside.shape[-2:], mode="bilinear", align_corners=False)
    return logits.where(inside.bool(), -20.0)
