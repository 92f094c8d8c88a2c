"""Real SAMs with tiny random weights, and batches for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DIM, IMAGE_SIZE, GRID = 16, 32, 4


def hf_sam(seed: int = 0, dim: int = DIM) -> nn.Module:
    """Return a transformers SamModel with ``dim`` channels on a 4 x 4 grid, in training mode."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(seed)
    size = {"image_size": IMAGE_SIZE, "patch_size": IMAGE_SIZE // GRID}
    config = SamConfig(
        vision_config={
            **size,
            "hidden_size": 24,
            "output_channels": dim,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "global_attn_indexes": [1],
            "window_size": 2,
            "mlp_dim": 32,
            "num_pos_feats": dim // 2,
        },
        prompt_encoder_config={**size, "hidden_size": dim, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": dim, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    return spread(SamModel(config)).train()


def needs_transformers_with(name: str) -> None:
    """Skip the test where the installed transformers is older than one of its models."""
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def hf_batch(n_images: int = 2, n_prompts: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return images and box prompts for :func:`hf_sam`, with one name that its forward does not take."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n_images, n_prompts, 2, generator=generator) * IMAGE_SIZE / 2
    return {
        "pixel_values": torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "input_boxes": torch.cat([corner, corner + IMAGE_SIZE / 3], -1),
        "ground_truth": torch.zeros(n_images, IMAGE_SIZE, IMAGE_SIZE),
    }


def meta_sam(seed: int = 0) -> nn.Module:
    """Return a segment_anything Sam with 16 channels on a 4 x 4 grid, in training mode."""
    from segment_anything import modeling

    torch.manual_seed(seed)
    return spread(assemble(modeling, vit(modeling), DIM, IMAGE_SIZE, GRID, iou_head_depth=2)).train()


def assemble(modeling: Any, encoder: nn.Module, dim: int, size: int, grid: int, **more: Any) -> nn.Module:
    """Return a Sam of any package with Meta's class names around an encoder."""
    decoder = more.pop("decoder", modeling.MaskDecoder)
    prompts = modeling.PromptEncoder(
        embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=4
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=32, num_heads=2)
    return modeling.Sam(
        encoder, prompts, decoder(transformer_dim=dim, transformer=transformer, iou_head_hidden_dim=16, **more)
    )


def vit(modeling: Any) -> nn.Module:
    """Return the encoder of any package with Meta's class names."""
    return modeling.ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // GRID,
        embed_dim=24,
        depth=2,
        num_heads=2,
        out_chans=DIM,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )


def meta_batch(n_images: int = 2, n_prompts: int = 1) -> list[dict[str, Any]]:
    """Return Meta's format: one dict per image."""
    batch = hf_batch(n_images, n_prompts)
    return [
        {"image": image, "boxes": boxes, "original_size": (IMAGE_SIZE, IMAGE_SIZE)}
        for image, boxes in zip(batch["pixel_values"], batch["input_boxes"], strict=True)
    ]


def meta_forward(sam: nn.Module, batch: list[dict[str, Any]]) -> list[Tensor]:
    """Run a segment_anything Sam with gradients, which its own forward switches off; one decoder call per image."""
    features = sam.image_encoder(torch.stack([item["image"] for item in batch]))
    masks = []
    for feature, item in zip(features, batch, strict=True):
        sparse, dense = sam.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        logits, _ = sam.mask_decoder(
            image_embeddings=feature[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        masks.append(logits)
    return masks


def with_lora(model: nn.Module, **settings: Any) -> nn.Module:
    """Return a peft model that trains LoRA in the encoder and a copy of the mask decoder."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "target_modules": ["qkv"], "modules_to_save": ["mask_decoder"], **settings}
    return get_peft_model(model, LoraConfig(**config))


def hooks_of(model: nn.Module) -> int:
    """Return how many forward hooks are on the modules of a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def spread(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Add noise to the initial weights, under which all images and prompts look nearly alike to the decoder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model
