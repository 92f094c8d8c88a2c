"""One tiny model with random weights per SAM family, and how the image features and mask tokens of each are known."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support.models import DIM, GRID, IMAGE_SIZE, assemble, hf_sam, meta_sam, needs_transformers_with, spread, vit
from tests.support.packages import import_quietly, need
from tests.support.stand_ins import auto_gluon, edge_sam_decoder, efficient_sam, samed, tiny_sam

SAM1, HQ, SAM2 = slice(1, 5), slice(1, 5), slice(2, 6)
# The width of the memory, 64, is written into its attention, and that of the features must be a larger multiple.
VIDEO_DIM = 128


class Case(NamedTuple):
    """A family, and what the tests need to know of it beside the tap.

    Attributes:
        name: the row of the table.
        make: returns a model from a seed, in training mode.
        batch: returns a batch from numbers of images and of prompts for each.
        call: how a student runs it; None for a plain call.
        encoder: the path of the module whose output holds the image features.
        image: takes from model and output what the decoder should get.
        decoder: the path of the mask decoder.
        rows: where the mask tokens are in the first output of the decoder's transformer.
        dim: channels.
        module: what is imported, and the distribution that has it; None for a stand-in.
        install: how to get it where the ``test`` extra does not bring it.
        compiled: the parts that are compiled in place; none: the whole model is.
        prompts: how many prompts for an image; one where there are none.

    """

    name: str
    make: Callable[[int], nn.Module]
    batch: Callable[[int, int], Any]
    call: Callable[[nn.Module, Any], Any] | None
    encoder: str
    image: Callable[[nn.Module, Any], Tensor]
    decoder: str
    rows: slice
    dim: int = DIM
    module: tuple[str, str] | None = None
    install: str = ""
    compiled: tuple[str, ...] = ()
    prompts: int = 3


def run_with(case: Case) -> str:
    """Return what the model of a case is run with, or skip where that is missing."""
    if case.module is None:
        return "stand-in"
    module, distribution = case.module
    return need(module.partition(".")[0], distribution, case.install)


def boxes_in(size: int, n_images: int, n_prompts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(n_images, n_prompts, 2, generator=generator) * size / 2
    return {
        "pixel_values": torch.randn(n_images, 3, size, size, generator=generator),
        "input_boxes": torch.cat([corner, corner + size / 3], -1),
    }


def list_of_dicts(size: int, n_images: int, n_prompts: int) -> list[dict[str, Any]]:
    batch = boxes_in(size, n_images, n_prompts)
    pairs = zip(batch["pixel_values"], batch["input_boxes"], strict=True)
    return [{"image": image, "boxes": boxes, "original_size": (size, size)} for image, boxes in pairs]


def first(_model: nn.Module, output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


# transformers


def hf_names(size: int = IMAGE_SIZE) -> dict[str, Any]:
    return {
        "batch": partial(boxes_in, size),
        "call": None,
        "decoder": "mask_decoder",
        "module": ("transformers", "transformers"),
    }


def _decoder_config(**more: int) -> dict[str, Any]:
    return {"hidden_size": DIM, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16, **more}


def _prompt_config(size: int, patch: int) -> dict[str, Any]:
    return {"hidden_size": DIM, "image_size": size, "patch_size": patch, "mask_input_channels": 4}


def hf_sam_hq(seed: int = 0) -> nn.Module:
    needs_transformers_with("SamHQModel")
    from transformers import SamHQConfig, SamHQModel

    torch.manual_seed(seed)
    config = SamHQConfig(
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": IMAGE_SIZE // GRID,
            "hidden_size": 24,
            "output_channels": DIM,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "global_attn_indexes": [1],
            "window_size": 2,
            "mlp_dim": 32,
            "num_pos_feats": DIM // 2,
        },
        prompt_encoder_config=_prompt_config(IMAGE_SIZE, IMAGE_SIZE // GRID),
        mask_decoder_config=_decoder_config(vit_dim=24),
    )
    return spread(SamHQModel(config)).train()


def _hiera(size: int) -> dict[str, Any]:
    return {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 4,
        "image_size": [size, size],
        "window_positional_embedding_background_size": [2, 2],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [4, 8, 16, 32],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    }


def _levels(size: int) -> dict[str, Any]:
    return {
        "fpn_hidden_size": DIM,
        "backbone_feature_sizes": [[size // stride, size // stride] for stride in (4, 8, 16)],
    }


def hf_sam2(seed: int = 0) -> nn.Module:
    needs_transformers_with("Sam2Model")
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(seed)
    vision = {"backbone_config": _hiera(64), "backbone_channel_list": [32, 16, 8, 4], **_levels(64)}
    config = Sam2Config(
        vision_config={"model_type": "sam2_vision_model", **vision},
        prompt_encoder_config=_prompt_config(64, 16),
        mask_decoder_config=_decoder_config(),
    )
    return spread(Sam2Model(config)).train()


def hf_sam2_video(seed: int = 0) -> nn.Module:
    needs_transformers_with("Sam2VideoModel")
    from transformers import Sam2VideoConfig, Sam2VideoModel

    torch.manual_seed(seed)
    vision = {"backbone_config": _hiera(64), "backbone_channel_list": [32, 16, 8, 4], **_levels(64)}
    config = Sam2VideoConfig(
        vision_config={"model_type": "sam2_vision_model", **vision, "fpn_hidden_size": VIDEO_DIM},
        prompt_encoder_config={**_prompt_config(64, 16), "hidden_size": VIDEO_DIM},
        mask_decoder_config=_decoder_config(hidden_size=VIDEO_DIM),
        image_size=64,
        memory_attention_hidden_size=VIDEO_DIM,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=VIDEO_DIM,
        mask_downsampler_embed_dim=VIDEO_DIM,
        memory_fuser_embed_dim=VIDEO_DIM,
        memory_fuser_intermediate_dim=32,
        memory_fuser_num_layers=1,
    )
    # In training mode its forward lacks what it needs itself: the logits of the object score.
    return spread(Sam2VideoModel(config), 0.1).eval()


def hf_edge_tam(seed: int = 0) -> nn.Module:
    needs_transformers_with("EdgeTamModel")
    from transformers import EdgeTamConfig, EdgeTamModel, TimmWrapperConfig

    torch.manual_seed(seed)
    backbone = TimmWrapperConfig(
        architecture="test_convnext",
        do_pooling=False,
        model_args={"features_only": True, "out_indices": [0, 1, 2, 3], "in_chans": 3},
    )
    config = EdgeTamConfig(
        vision_config={
            "model_type": "edgetam_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": [64, 48, 32, 24],
            **_levels(64),
        },
        prompt_encoder_config=_prompt_config(64, 16),
        mask_decoder_config=_decoder_config(),
    )
    return spread(EdgeTamModel(config), 0.1).train()


def hf_sam3_tracker(seed: int = 0) -> nn.Module:
    needs_transformers_with("Sam3TrackerModel")
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    torch.manual_seed(seed)
    config = Sam3TrackerConfig(
        vision_config={"model_type": "sam3_vision_model", "backbone_config": _sam3_backbone(), **_sam3_levels()},
        prompt_encoder_config=_prompt_config(56, 14),
        mask_decoder_config=_decoder_config(),
    )
    return spread(Sam3TrackerModel(config)).train()


def _sam3_backbone() -> dict[str, Any]:
    return {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "pretrain_image_size": 28,
        "window_size": 2,
        "global_attn_indexes": [1],
    }


def _sam3_levels() -> dict[str, Any]:
    return {"fpn_hidden_size": DIM, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}


def hf_sam3(seed: int = 0) -> nn.Module:
    """Return the Sam3Model, which has a DETR and no mask tokens."""
    needs_transformers_with("Sam3Model")
    from transformers import Sam3Config, Sam3Model

    torch.manual_seed(seed)
    small = {"hidden_size": DIM, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Sam3Config(
        vision_config={"model_type": "sam3_vision_model", "backbone_config": _sam3_backbone(), **_sam3_levels()},
        text_config={
            "model_type": "clip_text_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "projection_dim": 16,
        },
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 4},
        mask_decoder_config={"hidden_size": DIM, "num_attention_heads": 2},
    )
    return Sam3Model(config)


def level_with_memory(level: int) -> Callable[[nn.Module, Any], Tensor]:
    """Return what takes a level of a neck's output and adds the embedding that stands for no memory."""

    def take(model: nn.Module, output: Any) -> Tensor:
        return output[0][level] + model.no_memory_embedding.view(1, -1, 1, 1)

    return take


HF_CASES = (
    Case("transformers SamModel", hf_sam, encoder="vision_encoder.neck", image=first, rows=SAM1, **hf_names()),
    Case("transformers SamHQModel", hf_sam_hq, encoder="vision_encoder.neck", image=first, rows=HQ, **hf_names()),
    Case(
        "transformers Sam2Model",
        hf_sam2,
        encoder="vision_encoder.neck",
        image=level_with_memory(1),
        rows=SAM2,
        **hf_names(64),
    ),
    Case(
        "transformers EdgeTamModel",
        hf_edge_tam,
        encoder="vision_encoder.neck",
        image=level_with_memory(1),
        rows=SAM2,
        **{**hf_names(64), "install": "pip install --no-deps timm"},
    ),
    Case(
        "transformers Sam3TrackerModel",
        hf_sam3_tracker,
        encoder="vision_encoder.neck",
        # The embedding of no memory is added to the level below, which the decoder does not get.
        image=lambda _model, output: output[0][2],
        rows=SAM2,
        **hf_names(56),
    ),
)


# Meta's interface: parts that a loop over the images calls


def per_image(**decoder_arguments: Any) -> Callable[[nn.Module, Any], list[Any]]:
    """Return a loop with gradients that calls the decoder once per image, with further arguments of the family."""

    def run(sam: nn.Module, batch: list[dict[str, Any]]) -> list[Any]:
        features = sam.image_encoder(torch.stack([item["image"] for item in batch]))
        features, intermediate = features if isinstance(features, tuple) else (features, None)
        outputs = []
        for index, item in enumerate(batch):
            more = dict(decoder_arguments)
            if "hq_token_only" in more:
                more["interm_embeddings"] = [level[index : index + 1] for level in intermediate]
            sparse, dense = sam.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
            outputs.append(
                sam.mask_decoder(
                    image_embeddings=features[index : index + 1],
                    image_pe=sam.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    **more,
                )
            )
        return outputs

    return run


def meta_names(size: int = IMAGE_SIZE) -> dict[str, Any]:
    return {
        "batch": partial(list_of_dicts, size),
        "encoder": "image_encoder",
        "image": first,
        "decoder": "mask_decoder",
        "compiled": ("image_encoder", "mask_decoder"),
    }


def sam_hq(seed: int = 0) -> nn.Module:
    modeling = import_quietly("segment_anything_hq.modeling")
    hq = import_quietly("segment_anything_hq.modeling.mask_decoder_hq").MaskDecoderHQ
    torch.manual_seed(seed)
    return spread(assemble(modeling, vit(modeling), DIM, IMAGE_SIZE, GRID, decoder=hq, vit_dim=24)).train()


def mobile_sam(seed: int = 0) -> nn.Module:
    modeling = import_quietly("mobilesam_lite.mobile_sam.modeling")
    torch.manual_seed(seed)
    # Its encoder has the 64 x 64 grid of 1024 pixels written into its forward.
    encoder = modeling.TinyViT(
        img_size=1024,
        # It halves the grid at every stage but that of 320 channels.
        embed_dims=[4, 4, 8, 320],
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 5],
        window_sizes=[8, 8, 8, 8],
        drop_path_rate=0.0,
    )
    return spread(assemble(modeling, encoder, 256, 1024, 64), 0.02).train()


def kornia_sam(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    encoder = import_quietly("kornia.models.sam.architecture.image_encoder").ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // GRID,
        embed_dim=24,
        depth=2,
        num_heads=2,
        out_chans=DIM,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )

    class Modeling:
        Sam = import_quietly("kornia.models.sam").Sam
        MaskDecoder = import_quietly("kornia.models.sam.architecture.mask_decoder").MaskDecoder
        PromptEncoder = import_quietly("kornia.models.sam.architecture.prompt_encoder").PromptEncoder
        TwoWayTransformer = import_quietly("kornia.models.sam.architecture.transformer").TwoWayTransformer

    return spread(assemble(Modeling, encoder, DIM, IMAGE_SIZE, GRID)).train()


def rep_vit_sam(seed: int = 0) -> nn.Module:
    modeling = import_quietly("x_segment_anything.modeling")
    torch.manual_seed(seed)
    # kernel, expansion, channels, squeeze-and-excite, activation, stride
    stages = [[3, 2, 8, 1, 0, 1], [3, 2, 16, 0, 1, 2], [3, 2, 24, 0, 1, 2]]
    encoder = import_quietly("x_segment_anything.modeling.repvit").RepViT(stages)
    return spread(assemble(modeling, encoder, 256, 64, 4), 0.02).train()


def edge_sam(seed: int = 0) -> nn.Module:
    modeling = import_quietly("x_segment_anything.modeling")
    torch.manual_seed(seed)

    class Encoder(modeling.RepViT):
        arch_settings = {  # noqa: RUF012
            "m1": [[3, 2, 8, 1, 0, 1], [3, 2, 16, 0, 1, 2], [3, 2, 24, 0, 1, 2], [3, 2, 32, 0, 1, 2]]
        }

    return spread(assemble(modeling, Encoder("m1", 64, "bilinear"), 256, 64, 4), 0.02).train()


def efficient_vit_sam(seed: int = 0) -> nn.Module:
    sam = import_quietly("efficientsam.models.efficientvit.sam")
    backbone = import_quietly("efficientsam.models.efficientvit.backbone").EfficientViTLargeBackbone
    torch.manual_seed(seed)
    neck = sam.SamNeck(
        fid_list=["stage4", "stage3", "stage2"],
        in_channel_list=[8, 8, 8],
        head_width=8,
        head_depth=1,
        expand_ratio=1,
        middle_op="fmb",
    )
    encoder = sam.EfficientViTSamImageEncoder(backbone([4, 4, 8, 8, 8], [1, 1, 1, 1, 1], qkv_dim=4), neck)

    class Modeling:
        MaskDecoder, PromptEncoder, TwoWayTransformer = sam.MaskDecoder, sam.PromptEncoder, sam.TwoWayTransformer
        Sam = partial(sam.EfficientViTSam, image_size=(1024, 64))

    # Its neck resizes every level to 64 x 64.
    return spread(assemble(Modeling, encoder, 256, 1024, 64), 0.02).train()


def plain_forward(sam: nn.Module, batch: Any) -> Any:
    return sam(batch, multimask_output=True)


META_CASES = (
    Case(
        "segment_anything",
        meta_sam,
        call=per_image(multimask_output=False),
        rows=SAM1,
        module=("segment_anything", "segment-anything"),
        **meta_names(),
    ),
    Case(
        "segment_anything_hq",
        sam_hq,
        call=per_image(multimask_output=False, hq_token_only=False),
        rows=HQ,
        module=("segment_anything_hq", "segment-anything-hq"),
        install="pip install --no-deps segment-anything-hq==0.3 timm",
        **meta_names(),
    ),
    Case(
        "MobileSAM (mobilesam-lite)",
        mobile_sam,
        call=per_image(multimask_output=True),
        rows=SAM1,
        dim=256,
        module=("mobilesam_lite.mobile_sam", "mobilesam-lite"),
        install="pip install --no-deps mobilesam-lite==0.1.2 timm",
        **meta_names(1024),
    ),
    Case("TinySAM", tiny_sam, call=per_image(), rows=SAM1, **meta_names()),
    Case(
        "RepViT-SAM (x-segment-anything)",
        rep_vit_sam,
        call=per_image(num_multimask_outputs=1),
        rows=SAM1,
        dim=256,
        module=("x_segment_anything", "x-segment-anything"),
        install="pip install --no-deps x-segment-anything==0.0.8 timm",
        **meta_names(64),
    ),
    Case(
        "EfficientViT-SAM (efficientsam)",
        efficient_vit_sam,
        call=plain_forward,
        rows=SAM1,
        dim=256,
        module=("efficientsam.models.efficientvit", "efficientsam"),
        install="pip install --no-deps efficientsam==1.0.0",
        **meta_names(64),
    ),
    Case(
        "EfficientSAM",
        efficient_sam,
        batch=lambda n_images, n_prompts: (
            torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE),
            torch.rand(n_images, n_prompts, 2, 2) * IMAGE_SIZE,
            torch.ones(n_images, n_prompts, 2),
        ),
        call=None,
        encoder="image_encoder",
        image=first,
        decoder="mask_decoder",
        rows=SAM1,
    ),
    Case(
        "EdgeSAM (x-segment-anything)",
        edge_sam,
        call=per_image(num_multimask_outputs=3),
        rows=SAM1,
        dim=256,
        module=("x_segment_anything", "x-segment-anything"),
        install="pip install --no-deps x-segment-anything==0.0.8 timm",
        **meta_names(64),
    ),
    Case(
        "EdgeSAM, as published",
        edge_sam_decoder,
        call=per_image(num_multimask_outputs=1),
        rows=SAM1,
        **meta_names(),
    ),
    Case(
        "kornia Sam",
        kornia_sam,
        call=per_image(multimask_output=False),
        rows=SAM1,
        module=("kornia.models.sam", "kornia"),
        install="pip install --no-deps kornia==0.9.0 kornia-rs",
        **meta_names(),
    ),
    Case(
        "SAMed (9 mask tokens)",
        samed,
        batch=lambda n_images, _: torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE),
        call=None,
        encoder="image_encoder",
        image=first,
        decoder="mask_decoder",
        rows=slice(1, 10),
        prompts=1,
    ),
    Case(
        "AutoGluon Conv-LoRA (all tokens at once)",
        auto_gluon,
        batch=lambda n_images, _: {"pixel_values": torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE)},
        call=None,
        encoder="vision_encoder",
        image=first,
        decoder="mask_decoder",
        rows=slice(1, 6),
        prompts=1,
    ),
)


# sam2


def _sam2_parts(size: int = 64) -> dict[str, Any]:
    backbones = importlib.import_module("sam2.modeling.backbones.image_encoder")
    hiera = importlib.import_module("sam2.modeling.backbones.hieradet").Hiera
    sine = importlib.import_module("sam2.modeling.position_encoding").PositionEmbeddingSine
    attention = importlib.import_module("sam2.modeling.memory_attention")
    rope = partial(
        importlib.import_module("sam2.modeling.sam.transformer").RoPEAttention,
        feat_sizes=[size // 16, size // 16],
        embedding_dim=DIM,
        num_heads=1,
        dropout=0.0,
    )
    memory = importlib.import_module("sam2.modeling.memory_encoder")
    trunk = hiera(
        embed_dim=4,
        num_heads=1,
        stages=(1, 1, 2, 1),
        global_att_blocks=(3,),
        window_pos_embed_bkg_spatial_size=(2, 2),
        window_spec=(8, 4, 4, 2),
    )
    neck = backbones.FpnNeck(
        sine(num_pos_feats=DIM), d_model=DIM, backbone_channel_list=[32, 16, 8, 4], fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )  # fmt: skip
    layer = attention.MemoryAttentionLayer(
        activation="relu",
        cross_attention=rope(rope_k_repeat=True, kv_in_dim=8),
        d_model=DIM,
        dim_feedforward=32,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=rope(),
    )
    return {
        "image_encoder": backbones.ImageEncoder(trunk, neck, scalp=1),
        "memory_attention": attention.MemoryAttention(DIM, True, layer, num_layers=1),
        "memory_encoder": memory.MemoryEncoder(
            out_dim=8,
            mask_downsampler=memory.MaskDownSampler(DIM, kernel_size=3, stride=2, padding=1),
            fuser=memory.Fuser(memory.CXBlock(DIM), num_layers=1),
            position_encoding=sine(num_pos_feats=8),
            in_dim=DIM,
        ),
        "image_size": size,
        "directly_add_no_mem_embed": True,
        "use_high_res_features_in_sam": True,
        "multimask_output_in_sam": True,
        "multimask_min_pt_num": 0,
        "multimask_max_pt_num": 1,
        "use_obj_ptrs_in_encoder": True,
        "pred_obj_scores": True,
        "pred_obj_scores_mlp": True,
        "fixed_no_obj_ptr": True,
        "iou_prediction_use_sigmoid": True,
        "use_mlp_for_obj_ptr_proj": True,
    }


def sam2_base(seed: int = 0) -> nn.Module:
    base = importlib.import_module("sam2.modeling.sam2_base").SAM2Base
    torch.manual_seed(seed)
    return spread(base(**_sam2_parts())).train()


def sam2_train(seed: int = 0, clicks: int = 2) -> nn.Module:
    """Return SAM2Train, which is prompted on the first frame and clicks ``clicks`` times more to correct it."""
    train = import_quietly("training.model.sam2").SAM2Train
    torch.manual_seed(seed)
    settings = {
        "prob_to_use_pt_input_for_train": 1.0,
        "prob_to_use_pt_input_for_eval": 1.0,
        "pt_sampling_for_eval": "uniform",
    }
    return spread(train(**_sam2_parts(), **settings, num_correction_pt_per_frame=clicks), 0.1).train()


def sam2_video_batch(n_frames: int = 2, n_objects: int = 2) -> Any:
    data = import_quietly("training.utils.data_utils")
    frames = torch.arange(n_frames)[:, None, None].expand(n_frames, n_objects, 1)
    masks = torch.zeros(n_frames, n_objects, 64, 64, dtype=torch.bool)
    for number in range(n_objects):
        masks[:, number, 8 + 16 * number : 24 + 16 * number, 8:40] = True
    return data.BatchedVideoDatapoint(
        img_batch=torch.randn(n_frames, 1, 3, 64, 64),
        obj_to_frame_idx=torch.cat([frames, torch.zeros_like(frames)], -1).int(),
        masks=masks,
        metadata=data.BatchedVideoMetaData(
            unique_objects_identifier=torch.zeros(n_frames, n_objects, 3, dtype=torch.long),
            frame_orig_size=torch.full((n_frames, n_objects, 2), 64),
            batch_size=[n_frames],
        ),
        dict_key="test",
        batch_size=[n_frames],
    )


def sam2_images(sam: nn.Module, batch: list[dict[str, Any]]) -> list[Any]:
    """Run the image path of SAM2Base, as its image predictor does but with gradients."""
    output = sam.forward_image(torch.stack([item["image"] for item in batch]))
    _, flat, _, sizes = sam._prepare_backbone_features(output)
    flat[-1] = flat[-1] + sam.no_mem_embed
    maps = [level.permute(1, 2, 0).unflatten(2, size) for level, size in zip(flat, sizes, strict=True)]
    outputs = []
    for index, item in enumerate(batch):
        sparse, dense = sam.sam_prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        outputs.append(
            sam.sam_mask_decoder(
                image_embeddings=maps[-1][index : index + 1],
                image_pe=sam.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
                repeat_image=True,
                high_res_features=[level[index : index + 1] for level in maps[:-1]],
            )
        )
    return outputs


SAM2_INSTALL = (
    "SAM2_BUILD_CUDA=0 pip install --no-deps --no-build-isolation sam2==1.1.0 and "
    "pip install hydra-core iopath omegaconf"
)
SAM2_TRAIN_INSTALL = f"{SAM2_INSTALL}, and pip install --no-deps tensordict orjson pyvers cloudpickle"

CASES = (
    *META_CASES,
    Case(
        "sam2 SAM2Base, images",
        sam2_base,
        batch=partial(list_of_dicts, 64),
        call=sam2_images,
        encoder="image_encoder",
        image=lambda model, output: output["vision_features"] + model.no_mem_embed.view(1, -1, 1, 1),
        decoder="sam_mask_decoder",
        rows=SAM2,
        module=("sam2.modeling.sam2_base", "sam2"),
        install=SAM2_INSTALL,
        compiled=("image_encoder", "sam_mask_decoder"),
    ),
    *HF_CASES,
)


# not in the common form


def track(model: nn.Module, batch: dict[str, Tensor], with_gradient: bool = True) -> None:
    """Track the points of the first frame through the video; its forward, an inference one, without the decorator."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(batch["video"], *batch["video"].shape[-2:], dtype=torch.float32)
    for number, point in enumerate(batch["points"]):
        index = session.obj_id_to_idx(number)
        labels = torch.ones(1, 1, 1, dtype=torch.int32)
        session.add_point_inputs(index, 0, {"point_coords": point.reshape(1, 1, 1, 2), "point_labels": labels})
        session.obj_with_new_inputs.append(number)
    for frame in range(len(batch["video"])):
        if with_gradient:
            type(model).forward.__wrapped__(model, session, frame_idx=frame)
        else:
            model(session, frame_idx=frame)


def clip(seed: int = 0) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 31},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": IMAGE_SIZE // GRID},
        projection_dim=DIM,
    )
    return spread(CLIPModel(config)).train()
