"""The PEFT methods that the InfoSAM loss is combined with, applied to the image encoder of a SAM.

Each is written from its paper, on the blocks of transformers' SamModel (``vision_encoder.layers``), of Meta's Sam and
what is built like it (``image_encoder.blocks``), and of the TinyViT in MobileSAM (``image_encoder.layers[i].blocks``).
What differs from the paper is said in the docstring.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal, get_args

from torch import Tensor, nn

from benchmarks.peft_branches import After, Beside, Bottleneck, ConvLoRA

Method = Literal[
    "decoder",
    "bitfit",
    "adaptformer",
    "lora",
    "adapter",
    "hq_sam",
    "su_sam_series",
    "su_sam_parallel",
    "su_sam_mixed",
    "conv_lora",
]
METHODS: tuple[str, ...] = get_args(Method)


def apply(
    model: nn.Module,
    method: Method,
    *,
    tune_decoder: bool | None = None,
    rank: int = 4,
    ratio: float = 0.25,
    first_block: int = 2,
    n_experts: int = 8,
) -> nn.Module:
    """Make the weights of a method trainable, and no others; the model is changed in place, so copy the teacher before.

    "decoder": the mask decoder alone.
    "bitfit": every bias (Ben Zaken et al., BitFit, 2021, arXiv 2106.10199), but not those of relative positions.
    "adaptformer": :class:`Bottleneck` of width 64 beside every MLP, ReLU, scale 0.5 (Chen et al., AdaptFormer, 2022,
    arXiv 2205.13535; 0.1 there).
    "lora": through peft, on qkv, alpha = rank (Hu et al., 2021, arXiv 2106.09685).
    "adapter": after the projection of the attention and after the MLP, with the block's LayerNorms trained, in the
    blocks from ``first_block`` on (Houlsby et al., 2019, arXiv 1902.00751).
    "hq_sam": HQ token and fused early and late features (Ke et al., 2023, arXiv 2306.01567) by transformers'
    SamHQModel; masks are the sum of SAM's and the HQ token's.
    "su_sam_series", "su_sam_parallel", "su_sam_mixed": adapters in every block after attention and MLP, beside both,
    or after the attention and beside the MLP (Song et al., SU-SAM, 2024, arXiv 2401.17803).
    "conv_lora": :class:`ConvLoRA` on qkv (Zhong et al., Conv-LoRA, 2024, arXiv 2401.17868).

    All but HQ-SAM leave what the model computes as it is until they are trained.

    Args:
        model: a pre-trained SAM.
        method: one of ``METHODS``.
        tune_decoder: whether the whole mask decoder is trained too; None for all methods but BitFit.
        rank: of LoRA and Conv-LoRA.
        ratio: of an adapter's width to the block's, for "adapter" and SU-SAM.
        first_block: the first block with an adapter, for "adapter".
        n_experts: convolutions of Conv-LoRA, the i-th on a map enlarged by i.

    Returns:
        The model, of which exactly the trained parameters require grad; for "lora" the peft model around it, for
        "hq_sam" a SamHQModel with copies of its weights.

    Raises:
        ValueError: the method is unknown, or the model is not built as it needs.

    """
    if method not in METHODS:
        raise ValueError(f"apply: method must be one of {', '.join(METHODS)}, got {method!r}")
    if tune_decoder is None:
        tune_decoder = method != "bitfit"
    elif not tune_decoder and method in ("decoder", "hq_sam"):
        raise ValueError(f"apply: tune_decoder must not be False with {method!r}, which trains nothing else")
    model.requires_grad_(False)
    if method == "hq_sam":
        model = _with_hq_token(model)
    elif method == "lora":
        return _with_lora(model, rank, tune_decoder)
    elif method == "bitfit":
        for name, parameter in model.named_parameters():
            # Not a TinyViT's attention_biases: what eval() looked up in them stays as it is when they are changed.
            parameter.requires_grad_(name.endswith("bias"))
    elif method != "decoder":
        blocks = _blocks(model)
        if method == "adapter" and first_block >= len(blocks):
            raise ValueError(
                f"apply: first_block must be below the number of blocks, got {first_block} of {len(blocks)} blocks"
            )
        for block in blocks[first_block:] if method == "adapter" else blocks:
            _add_to_block(block, method, rank, ratio, n_experts)
    if tune_decoder:
        model.mask_decoder.requires_grad_(True)
    return model


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters, which ``load_state_dict(..., strict=False)`` takes after the same ``apply``."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _add_to_block(block: nn.Module, method: str, rank: int, ratio: float, n_experts: int) -> None:
    last = _last_linear(block)
    width = max(1, round(last.out_features * ratio))
    if method == "adaptformer":
        block.mlp = Beside(block.mlp, Bottleneck(last, 64, nn.ReLU(), scale=0.5))
    elif method == "conv_lora":
        block.attn.qkv = Beside(block.attn.qkv, ConvLoRA(block.attn.qkv, rank, n_experts))
    elif method == "su_sam_parallel":
        block.attn = Beside(block.attn, Bottleneck(last, width, nn.GELU()))
        block.mlp = Beside(block.mlp, Bottleneck(last, width, nn.GELU()))
    else:
        block.attn.proj = After(block.attn.proj, Bottleneck(last, width, nn.GELU()))
        mlp_with = Beside if method == "su_sam_mixed" else After
        block.mlp = mlp_with(block.mlp, Bottleneck(last, width, nn.GELU()))
    for module in block.modules():
        if isinstance(module, Beside | After):
            module.branch.requires_grad_(True)
        elif method == "adapter" and isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    encoder = getattr(model, "vision_encoder", None) or getattr(model, "image_encoder", None)
    blocks: list[nn.Module] = []
    for layer in getattr(encoder, "layers", None) or getattr(encoder, "blocks", None) or []:
        # A TinyViT has its blocks in stages, of which the first has convolutions and no attention.
        blocks += [b for b in layer.blocks if hasattr(b, "attn")] if hasattr(layer, "blocks") else [layer]
    if not blocks or not all(
        isinstance(getattr(getattr(block, "attn", None), "qkv", None), nn.Linear)
        and isinstance(_last_linear(block), nn.Linear)
        for block in blocks
    ):
        raise ValueError(
            "apply: model must have ViT blocks with attn.qkv and mlp.lin2 or mlp.fc2 in vision_encoder.layers, "
            f"image_encoder.blocks or image_encoder.layers[i].blocks, got {type(model).__name__}; methods for any SAM "
            "are 'decoder' and 'bitfit'"
        )
    return blocks


def _last_linear(block: nn.Module) -> Any:
    mlp = getattr(block, "mlp", None)
    return getattr(mlp, "lin2", None) or getattr(mlp, "fc2", None)


def _with_lora(model: nn.Module, rank: int, tune_decoder: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    _blocks(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=r".*(vision|image)_encoder\..*\.qkv",
        modules_to_save=["mask_decoder"] if tune_decoder else None,
    )
    with warnings.catch_warnings():
        # Of peft, about a name in transformers that it still uses.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        with_lora = get_peft_model(model, config)
    # The modules of peft start in training mode, which a loop would give back to the BatchNorms after an evaluation.
    return with_lora if model.training else with_lora.eval()


def _with_hq_token(model: nn.Module) -> nn.Module:
    if type(model).__name__ != "SamModel":
        raise ValueError(
            f"apply: model must be transformers' SamModel for 'hq_sam', got {type(model).__name__}; a decoder of "
            "Meta's kind is not given the early features: take the model of segment_anything_hq, and method 'decoder'"
        )
    from transformers import SamHQConfig, SamHQModel

    settings = model.config.to_dict()
    parts = {name: settings[f"{name}_config"] for name in ("vision", "prompt_encoder", "mask_decoder")}
    for part in parts.values():
        part.pop("model_type", None)
    parts["mask_decoder"]["vit_dim"] = parts["vision"]["hidden_size"]
    config = SamHQConfig(**{f"{name}_config": part for name, part in parts.items()})
    hq = SamHQModel(config).to(model.device, model.dtype).train(model.training).requires_grad_(False)
    missing, unexpected = hq.load_state_dict(model.state_dict(), strict=False)
    new = re.compile(r"mask_decoder\.(hq_|compress_vit_|encoder_|mask_conv|mask_norm)")
    strange = [name for name in missing if not new.match(name)]
    if strange or unexpected:
        raise ValueError(
            f"apply: model must have the weights of a SamModel, got {(strange + unexpected)[0]} on one side only"
        )
    return hq
