"""The PEFT methods that the InfoSAM loss is combined with, applied to the image encoder of a SAM.

Each is written from its paper, on the blocks of transformers' SamModel (``vision_encoder.layers``) and of Meta's Sam
and what is built like it (``image_encoder.blocks``). What differs from the paper is said in the docstring.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    "bitfit": every bias (Ben Zaken et al., BitFit, 2021, arXiv 2106.10199).
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


class Bottleneck(nn.Module):
    """``scale * up(activation(down(x)))`` on what ``before`` puts out, or the like; zero until it is trained."""

    def __init__(self, before: nn.Linear, width: int, activation: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": before.weight.device, "dtype": before.weight.dtype}
        channels = before.out_features
        self.down = nn.Linear(channels, width, **place)
        self.activation = activation
        self.up = nn.Linear(width, channels, **place)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output, of the shape of ``x``."""
        return self.scale * self.up(self.activation(self.down(x)))


class After(nn.Module):
    """A module, then a branch with a skip: ``y + branch(y)`` with ``y = module(x)``."""

    def __init__(self, module: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.module, self.branch = module, branch

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the module's output and the branch's on it."""
        output = self.module(hidden_states)
        return output + self.branch(output)


class Beside(nn.Module):
    """A module and a branch on the same input: ``module(x) + branch(x)``."""

    def __init__(self, module: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.module, self.branch = module, branch

    # The argument has the name by which transformers passes it.
    def forward(self, hidden_states: Tensor, **keywords: Any) -> Any:
        """Return what the module returns, with the branch's output added to the first tensor."""
        output = self.module(hidden_states, **keywords)
        extra = self.branch(hidden_states)
        # Attention in transformers returns its weights as well.
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra


class ConvLoRA(nn.Module):
    """LoRA with convolutions between its two matrices: ``up(p_i E_i(down(x)))``, i the likeliest of the experts.

    Expert i enlarges the map i times, convolves it with a 3 x 3 kernel, and shrinks it again. The gate sees the mean
    over the map. Its probability p_i weighs the expert, so that the gate is trained by the loss alone: the paper's
    noise and its loss for equal use of the experts are left out.
    """

    def __init__(self, linear: nn.Linear, rank: int, n_experts: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.gate = nn.Linear(rank, n_experts, bias=False, **place)
        self.experts = nn.ModuleList(nn.Conv2d(rank, rank, 3, padding=1, **place) for _ in range(n_experts))
        self.up = nn.Linear(rank, linear.out_features, bias=False, **place)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update ``[b, h, w, c]`` for maps ``[b, h, w, c]``."""
        low = self.down(x).permute(0, 3, 1, 2)
        probability, chosen = self.gate(low.mean((2, 3))).softmax(-1).max(-1)
        mixed = torch.zeros_like(low)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            if len(rows):
                mixed = mixed.index_copy(0, rows, _at_scale(expert, low[rows], index + 1).to(mixed.dtype))
        return self.up((probability.to(mixed.dtype)[:, None, None, None] * mixed).permute(0, 2, 3, 1))


def _at_scale(convolution: nn.Module, x: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return convolution(x)
    enlarged = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    return F.interpolate(convolution(enlarged), x.shape[-2:], mode="bilinear", align_corners=False)


def _add_to_block(block: nn.Module, method: str, rank: int, ratio: float, n_experts: int) -> None:
    last = block.mlp.lin2
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
    blocks = list(getattr(encoder, "layers", None) or getattr(encoder, "blocks", None) or [])
    if not blocks or not all(
        isinstance(getattr(getattr(block, "attn", None), "qkv", None), nn.Linear)
        and isinstance(getattr(getattr(block, "mlp", None), "lin2", None), nn.Linear)
        for block in blocks
    ):
        raise ValueError(
            "apply: model must have ViT blocks with attn.qkv and mlp.lin2 in vision_encoder.layers or "
            f"image_encoder.blocks, got {type(model).__name__}; methods for any SAM are 'decoder' and 'bitfit'"
        )
    return blocks


def _with_lora(model: nn.Module, rank: int, tune_decoder: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    _blocks(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=r".*(vision|image)_encoder\..*\.qkv",
        modules_to_save=["mask_decoder"] if tune_decoder else None,
    )
    return get_peft_model(model, config)


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
