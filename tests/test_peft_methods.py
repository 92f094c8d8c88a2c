"""The PEFT methods of the benchmarks: what they train, where they start, and that the loss trains them.

MobileSAM's own package is not in the test extra: without it a stand-in has its place, and its tests are skipped.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peft_methods import METHODS, apply, trained_state_dict
from benchmarks.sam.models import mobile_sam_at
from renyi_kd import InfoSAMLoss, tap
from tests.support.families import CASES as SAM_FAMILIES
from tests.support.families import list_of_dicts, mobile_sam, run_with
from tests.support.loops import run_hf, task_loss
from tests.support.models import (
    DIM,
    hf_batch,
    hf_sam,
    meta_batch,
    meta_forward,
    meta_sam,
    needs_transformers_with,
)
from tests.support.stand_ins import tiny_sam, tiny_vit_sam

MOBILE_SAM_SIZE = 256
# Outside of the mask decoder.
TRAINED = {
    "decoder": r"(?!)",
    "bitfit": r".*bias$",
    "adaptformer": r".*\.\d\.mlp\.branch\.(down|up)\.",
    "lora": r".*\.\d\.attn\.qkv\.lora_[AB]\.",
    "adapter": r".*\.\d\.((attn\.proj|mlp)\.branch\.(down|up)|(layer_)?norm[12]|attn\.norm|mlp\.module\.norm)\.",
    "hq_sam": r"(?!)",
    "su_sam_series": r".*\.\d\.(attn\.proj|mlp)\.branch\.(down|up)\.",
    "su_sam_parallel": r".*\.\d\.(attn|mlp)\.branch\.(down|up)\.",
    "su_sam_mixed": r".*\.\d\.(attn\.proj|mlp)\.branch\.(down|up)\.",
    "conv_lora": r".*\.\d\.attn\.qkv\.branch\.(down|gate|experts\.\d|up)\.",
}


class Family(NamedTuple):
    """A kind of SAM.

    Attributes:
        make: returns a model from a seed.
        batch: returns a batch from numbers of images and of prompts for each.
        run: returns the masks of a model for a batch.
        blocks: the names of the encoder's blocks with attention, inside it.
        dim: the decoder's channels.

    """

    make: Callable[[int], nn.Module]
    batch: Callable[[int, int], Any]
    run: Callable[[nn.Module, Any], list[Tensor]]
    blocks: tuple[str, ...]
    dim: int = DIM


def mobile_sam_of_its_package(seed: int) -> nn.Module:
    run_with(next(case for case in SAM_FAMILIES if case.make is mobile_sam))
    # At its own size it takes a second to run. The table that its attention makes of its biases in eval() must be of
    # the weights it ends with.
    return mobile_sam_at(MOBILE_SAM_SIZE, mobile_sam(seed)).eval()


FAMILIES = {
    "hf": Family(hf_sam, hf_batch, run_hf, ("layers.0", "layers.1")),
    "meta": Family(meta_sam, meta_batch, meta_forward, ("blocks.0", "blocks.1")),
    "tiny_vit": Family(
        tiny_vit_sam, meta_batch, meta_forward, ("layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1")
    ),
    "mobile_sam": Family(
        mobile_sam_of_its_package,
        partial(list_of_dicts, MOBILE_SAM_SIZE),
        meta_forward,
        ("layers.1.blocks.0", "layers.2.blocks.0", "layers.3.blocks.0"),
        dim=256,
    ),
}
CASES = [(method, family) for method in METHODS for family in FAMILIES if method != "hq_sam" or family == "hf"]
each = pytest.mark.parametrize(("method", "family"), CASES, ids=[" ".join(case) for case in CASES])
with_tiny_vit = pytest.mark.parametrize(
    ("method", "family"), [case for case in CASES if case[1] in ("tiny_vit", "mobile_sam")]
)


def applied(method: str, family: str) -> nn.Module:
    if method == "hq_sam":
        needs_transformers_with("SamHQModel")
    return apply(FAMILIES[family].make(1), method, first_block=1, rank=2, n_experts=3)


def of_decoder(name: str) -> bool:
    return "mask_decoder." in name


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@each
def test_exactly_the_methods_parameters_and_the_decoder_are_trained_and_the_mode_is_kept(method, family):
    model = applied(method, family)
    assert model.training == FAMILIES[family].make(1).training
    outside = {name for name in trained(model) if not of_decoder(name)}
    wanted = {name for name, _ in model.named_parameters() if not of_decoder(name) and re.match(TRAINED[method], name)}
    blocks = FAMILIES[family].blocks
    if method == "adapter":
        wanted = {name for name in wanted if blocks[0] not in name}
        blocks = blocks[1:]
    assert outside == wanted
    reached = [block for block in blocks if any(f"_encoder.{block}." in name for name in wanted)]
    assert reached == ([] if method in ("decoder", "hq_sam") else list(blocks))
    decoder = {name for name, _ in model.named_parameters() if of_decoder(name) and "original_module" not in name}
    if method == "bitfit":
        decoder = {name for name in decoder if name.endswith("bias")}
    assert {name for name in trained(model) if of_decoder(name)} == decoder


@each
def test_an_untrained_method_changes_nothing(method, family):
    make, make_batch, run, _, _ = FAMILIES[family]
    batch = make_batch(2, 2)
    # torch multiplies some matrices in another order where a weight requires grad.
    before, after = (run(model.eval().requires_grad_(False), batch) for model in (make(1), applied(method, family)))
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    # The masks of HQ-SAM's token are added, with weights that are not trained yet.
    assert same == [method != "hq_sam"] * len(same)


@each
def test_the_loss_trains_every_part_of_a_method(method, family):
    make, make_batch, run, _, dim = FAMILIES[family]
    batch = make_batch(2, 2)
    model, infosam_loss = applied(method, family), InfoSAMLoss(dim)
    teacher, student = tap(make(0), call=run), tap(model, call=run)
    parameters = trained(model)
    optimizer = torch.optim.SGD([*parameters.values(), *infosam_loss.parameters()], lr=0.05)
    values, reached = [], set()
    for _ in range(3):
        optimizer.zero_grad()
        masks = student(batch)
        infosam = infosam_loss(teacher, student, batch)
        infosam.backward(retain_graph=True)
        reached |= {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        (0.01 * task_loss(masks)).backward()
        optimizer.step()
        values.append(infosam.item())
    assert len(set(values)) == 3
    outside = {name for name in parameters if not of_decoder(name)}
    unreached = outside - reached
    if method == "conv_lora":
        # The gate need not choose every expert of every block.
        assert any("experts" in name for name in reached)
        unreached = {name for name in unreached if "experts" not in name}
    if method == "bitfit":
        # Points and masks are not prompted with, and MobileSAM's encoder keeps a classifier that it does not use.
        unreached = {name for name in unreached if not re.search(r"prompt_encoder|image_encoder\.(norm_)?head\.", name)}
    assert unreached == set()
    assert any(re.search(r"mask_decoder.*transformer", name) for name in reached)
    if method == "hq_sam":
        assert any("hq_token" in name for name in reached)


@each
def test_what_is_trained_is_saved_and_loaded_apart(method, family):
    _, make_batch, run, _, _ = FAMILIES[family]
    batch = make_batch(2, 1)
    model = applied(method, family).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = run(model, batch)
        saved = copy.deepcopy(trained_state_dict(model))
        again = applied(method, family).eval()
        assert not torch.equal(run(again, batch)[0], expected[0])
        result = again.load_state_dict(saved, strict=False)
        assert result.unexpected_keys == []
        assert all(torch.equal(x, y) for x, y in zip(run(again, batch), expected, strict=True))


@with_tiny_vit
def test_a_tiny_vit_stays_in_eval_mode_with_the_biases_that_its_attention_looked_up(method, family):
    model = applied(method, family)
    resting = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) or hasattr(module, "ab")]
    assert len(resting) > len(FAMILIES[family].blocks)
    assert not any(module.training for module in resting)
    for attention in [module for module in resting if hasattr(module, "ab")]:
        assert not attention.attention_biases.requires_grad
        assert torch.equal(attention.ab, attention.attention_biases[:, attention.attention_bias_idxs])


def test_a_branch_beside_attention_or_mlp_takes_what_they_take_after_their_norm():
    block = applied("su_sam_parallel", "tiny_vit").image_encoder.layers[2].blocks[1]
    for beside, first in ((block.attn, block.attn.module.qkv), (block.mlp, block.mlp.module.fc1)):
        taken: list[Tensor] = []
        for module in (first, beside.branch.down):
            module.register_forward_pre_hook(lambda _module, args, taken=taken: taken.append(args[0]))
        beside(torch.randn(2, 16, 12))
        assert torch.equal(*taken)


def test_the_decoder_can_be_left_out_or_added():
    assert not any(of_decoder(name) for name in trained(apply(hf_sam(), "adaptformer", tune_decoder=False)))
    model = apply(hf_sam(), "bitfit", tune_decoder=True)
    assert all(parameter.requires_grad for parameter in model.mask_decoder.parameters())
    assert not any(of_decoder(name) for name in trained(apply(hf_sam(), "lora", tune_decoder=False)))


def test_conv_lora_in_half_precision():
    model = apply(hf_sam().to(torch.bfloat16), "conv_lora", n_experts=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    branch = model.vision_encoder.layers[0].attn.qkv.branch
    nn.init.normal_(branch.up.weight)
    x = torch.randn(5, 3, 3, 24, dtype=torch.bfloat16)
    assert branch(x).shape == (5, 3, 3, 72)


def test_conv_lora_sends_each_map_to_its_likeliest_expert():
    branch = apply(hf_sam(), "conv_lora", rank=2, n_experts=3).vision_encoder.layers[0].attn.qkv.branch
    nn.init.normal_(branch.up.weight)
    x = torch.randn(6, 4, 4, 24)
    low = branch.down(x).permute(0, 3, 1, 2)

    def by_hand(index: int) -> Tensor:
        probabilities = branch.gate(low[index].mean((1, 2))).softmax(-1)
        expert = int(probabilities.argmax())
        size = 4 * (expert + 1)
        resized = nn.functional.interpolate(low[index][None], (size, size), mode="bilinear")
        back = nn.functional.interpolate(branch.experts[expert](resized), (4, 4), mode="bilinear")
        return branch.up((probabilities[expert] * back[0]).permute(1, 2, 0))

    torch.testing.assert_close(branch(x), torch.stack([by_hand(index) for index in range(6)]))


def test_conv_lora_takes_the_tokens_of_a_window_as_a_square_map():
    branch = applied("conv_lora", "tiny_vit").image_encoder.layers[1].blocks[0].attn.qkv.branch
    nn.init.normal_(branch.up.weight)
    maps = torch.randn(5, 3, 3, 8)
    assert torch.equal(branch(maps.flatten(1, 2)), branch(maps).flatten(1, 2))
    with pytest.raises(ValueError, match=r"ConvLoRA: tokens .* must fill square maps, got 12 to a map; give maps"):
        branch(torch.randn(5, 12, 8))


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("method must be one of decoder, bitfit.*got 'prefix'", (hf_sam, "prefix", {})),
        ("first_block must be below the number of blocks, got 2 of 2", (hf_sam, "adapter", {})),
        ("must be transformers' SamModel for 'hq_sam', got Sam;", (meta_sam, "hq_sam", {})),
        ("must be transformers' SamModel for 'hq_sam', got Sam;", (tiny_vit_sam, "hq_sam", {})),
        ("first_block must be below the number of blocks, got 3 of 3", (tiny_vit_sam, "adapter", {"first_block": 3})),
        ("must have ViT blocks with attn.qkv.*got Sam", (tiny_sam, "lora", {})),
        ("tune_decoder must not be False with 'decoder'", (hf_sam, "decoder", {"tune_decoder": False})),
        ("must have ViT blocks with attn.qkv.*got Linear", (lambda: nn.Linear(1, 1), "adaptformer", {})),
    ],
)
def test_refusals(pattern, arguments):
    make, method, keywords = arguments
    with pytest.raises(ValueError, match=pattern):
        apply(make(), method, **keywords)
