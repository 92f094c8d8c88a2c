"""Small models of our own in the shape of SAMs that the test extra does not bring: same parts, calls and layouts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.models import DIM, GRID, IMAGE_SIZE, meta_sam, spread


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, DIM, IMAGE_SIZE // GRID, IMAGE_SIZE // GRID), nn.GroupNorm(1, DIM))


class TokenTransformer(nn.Module):
    """Tokens attend to themselves and to the image, the image to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.to_tokens = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.to_image = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, image: Tensor, position: Tensor, tokens: Tensor, *_more: Any) -> tuple[Tensor, Tensor]:
        pixels = (image + position).flatten(2).mT
        tokens = tokens.expand(len(pixels), -1, -1)
        joint = torch.cat([tokens, pixels], 1)
        tokens = self.norm(tokens + self.to_tokens(tokens, joint, joint)[0])
        return tokens, pixels + self.to_image(pixels, tokens, tokens)[0]


class Decoder(nn.Module):
    """The mask decoder that the families have in common, for one image and its prompts."""

    def __init__(self, n_tokens: int = 4, n_hypernetworks: int | None = None) -> None:
        super().__init__()
        self.transformer = TokenTransformer()
        self.iou_token = nn.Embedding(1, DIM)
        self.mask_tokens = nn.Embedding(n_tokens, DIM)
        self.output_upscaling = nn.ConvTranspose2d(DIM, 4, 2, 2)
        self.output_hypernetworks_mlps = nn.ModuleList(nn.Linear(DIM, 4) for _ in range(n_hypernetworks or n_tokens))
        self.iou_prediction_head = nn.Linear(DIM, n_tokens)

    def run(self, image: Tensor, position: Tensor, sparse: Tensor, dense: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], 1)
        source = image.repeat_interleave(len(sparse), 0) if len(image) == 1 else image
        hidden, pixels = self.transformer(source + dense, position, tokens, *more)
        upscaled = self.output_upscaling(pixels.mT.unflatten(2, (GRID, GRID)))
        weights = self.hypernetworks(hidden[:, 1 : 1 + self.mask_tokens.num_embeddings])
        return torch.einsum("snc,schw->snhw", weights, upscaled), self.iou_prediction_head(hidden[:, 0])

    def hypernetworks(self, mask_tokens: Tensor) -> Tensor:
        return torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)


class Prompts(nn.Module):
    """Boxes as two tokens each, and the embedding of no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.corner = nn.Linear(2, DIM)
        self.no_mask = nn.Embedding(1, DIM)
        self.register_buffer("grid", torch.randn(1, DIM, GRID, GRID))

    def forward(self, *, points: None, boxes: Tensor | None, masks: None) -> tuple[Tensor, Tensor]:
        dense = self.no_mask.weight[..., None, None].expand(-1, -1, GRID, GRID)
        if boxes is None:
            return torch.empty(1, 0, DIM), dense
        return self.corner(boxes.unflatten(-1, (2, 2)) / IMAGE_SIZE), dense

    def get_dense_pe(self) -> Tensor:
        return self.grid


class Sam(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = Encoder()
        self.prompt_encoder = Prompts()
        self.mask_decoder = decoder


# The signatures below name what the families' decoders take, used or not.


class TinySamDecoder(Decoder):
    """Always gives all masks: no ``multimask_output``."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return self.run(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)


class EdgeSamDecoder(Decoder):
    """Takes the number of masks, and hands its transformer a place for targets of distillation."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        num_multimask_outputs: int,
        num_prompts: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.run(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, None)


class EfficientSamDecoder(Decoder):
    """All images and prompts in one call, everything by position; the features are repeated inside."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        repeated = image_embeddings.repeat_interleave(sparse_prompt_embeddings.shape[1], 0)
        return self.run(repeated, image_pe, sparse_prompt_embeddings.flatten(0, 1), dense_prompt_embeddings)


class EfficientSam(Sam):
    def forward(self, batched_images: Tensor, batched_points: Tensor, batched_point_labels: Tensor) -> Any:
        points = self.prompt_encoder.corner(batched_points / IMAGE_SIZE)
        # Six prompt tokens, whatever is given.
        padding = points.new_zeros(*points.shape[:2], 6 - points.shape[2], DIM)
        _, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        features = self.image_encoder(batched_images)
        return self.mask_decoder(features, self.prompt_encoder.grid, torch.cat([points, padding], 2), dense, True)


class SamedDecoder(TinySamDecoder):
    """A mask token per class and one more; a whole batch of images without prompts."""


class Samed(Sam):
    def forward(self, batched_input: Tensor) -> tuple[Tensor, Tensor]:
        features = self.image_encoder(batched_input)
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        return self.mask_decoder(
            image_embeddings=features,
            image_pe=self.prompt_encoder.grid,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )


class AutoGluonDecoder(TinySamDecoder):
    """The first hypernetwork takes all mask tokens of all prompts at once, ``[b, p, n, d]``; the others rest."""

    def hypernetworks(self, mask_tokens: Tensor) -> Tensor:
        return self.output_hypernetworks_mlps[0](mask_tokens[:, None])[:, 0]


class AutoGluon(Samed):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(decoder)
        self.vision_encoder = self.image_encoder
        del self.image_encoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        return self.mask_decoder(
            image_embeddings=self.vision_encoder(pixel_values),
            image_pe=self.prompt_encoder.grid,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )


class OneHypernetworkDecoder(TinySamDecoder):
    """One hypernetwork that is no list, for all tokens ``[s, n, d]`` in one call or in a call for each."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.output_hypernetworks_mlps = nn.Linear(DIM, 4)
        self.at_once = at_once

    def hypernetworks(self, mask_tokens: Tensor) -> Tensor:
        if self.at_once:
            return self.output_hypernetworks_mlps(mask_tokens)
        return torch.stack([self.output_hypernetworks_mlps(token) for token in mask_tokens.unbind(1)], 1)


def _sam(kind: type[Sam], decoder: nn.Module) -> nn.Module:
    return spread(kind(decoder)).train()


def tiny_sam(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _sam(Sam, TinySamDecoder())


def edge_sam_decoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _sam(Sam, EdgeSamDecoder())


def efficient_sam(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _sam(EfficientSam, EfficientSamDecoder())


def samed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _sam(Samed, SamedDecoder(9))


def auto_gluon(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _sam(AutoGluon, AutoGluonDecoder(5))


def one_hypernetwork(at_once: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _sam(Samed, OneHypernetworkDecoder(at_once))


class TinyViTAttention(nn.Module):
    """Attention among the tokens ``[n, l, c]`` of windows: the norm inside, the biases looked up once in eval mode."""

    def __init__(self, channels: int, n_heads: int, window: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(n_heads, window**2))
        row, column = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
        distance = window * (row[:, None] - row).abs() + (column[:, None] - column).abs()
        self.register_buffer("attention_bias_idxs", distance, persistent=False)
        self.register_buffer("ab", None, persistent=False)

    def train(self, mode: bool = True) -> TinyViTAttention:
        self.ab = None if mode else self.attention_biases.detach()[:, self.attention_bias_idxs]
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        biases = self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + biases).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class TinyViTMlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Attention in windows of a square map of tokens ``[b, l, c]``, a convolution for each channel, an MLP."""

    def __init__(self, channels: int, n_heads: int, side: int, window: int) -> None:
        super().__init__()
        self.side, self.window = side, window
        self.attn = TinyViTAttention(channels, n_heads, window)
        self.mlp = TinyViTMlp(channels)
        self.local_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        margin, n = -self.side % self.window, -(-self.side // self.window)
        padded = F.pad(x.unflatten(1, (self.side, self.side)), (0, 0, 0, margin, 0, margin))
        windows = padded.unflatten(2, (n, self.window)).unflatten(1, (n, self.window)).transpose(2, 3)
        attended = self.attn(windows.reshape(-1, self.window**2, x.shape[2]))
        back = attended.view(windows.shape).transpose(2, 3).reshape(padded.shape)[:, : self.side, : self.side]
        pixels = (x + back.flatten(1, 2)).mT.unflatten(2, (self.side, self.side))
        x = self.local_conv(pixels).flatten(2).mT
        return x + self.mlp(x)


class TinyViTStage(nn.Module):
    """Blocks, and a convolution that may halve the map; tokens come out."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if x.ndim == 3:
            x = x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1))
        return self.downsample(x).flatten(2).mT


class TinyViT(nn.Module):
    """The encoder of MobileSAM and TinySAM: a stage of convolutions, then stages with attention in windows."""

    def __init__(self) -> None:
        super().__init__()
        side = 2 * GRID
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, IMAGE_SIZE // side, IMAGE_SIZE // side), nn.BatchNorm2d(4))
        convolution = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.GELU())
        self.layers = nn.ModuleList(
            [
                TinyViTStage([convolution], nn.Conv2d(4, 8, 1)),
                # The map does not fill its windows; in the next stage it is one window.
                TinyViTStage([TinyViTBlock(8, 2, side, window=3)], nn.Conv2d(8, 12, 3, 2, 1)),
                TinyViTStage([TinyViTBlock(12, 3, GRID, window=GRID) for _ in range(2)], nn.Identity()),
            ]
        )
        self.neck = nn.Sequential(nn.Conv2d(12, DIM, 1), nn.GroupNorm(1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x.mT.unflatten(2, (GRID, GRID)))


def tiny_vit_sam(seed: int = 0) -> nn.Module:
    """Return Meta's Sam around a :class:`TinyViT`, in eval mode, in which it is fine-tuned: the BatchNorms rest."""
    sam = meta_sam(seed)
    sam.image_encoder = spread(TinyViT())
    return sam.eval()


class MonaiLike(nn.Module):
    """A SAM whose decoder was replaced by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Sam(nn.Sequential(nn.BatchNorm2d(DIM), nn.ConvTranspose2d(DIM, 3, 2, 2)))
        self.model.prompt_encoder = None

    def forward(self, x: Tensor) -> Tensor:
        return self.model.mask_decoder(self.model.image_encoder(x))


class InferenceOnly(nn.Module):
    """A SAM behind a predictor that runs it under inference mode, as that of ultralytics does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = samed()

    @torch.inference_mode()
    def forward(self, source: Tensor) -> Any:
        return self.model(source)
