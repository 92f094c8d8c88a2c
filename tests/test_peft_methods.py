"""The PEFT methods of the benchmarks: what they train, where they start, and that the loss trains them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peft_methods import METHODS, apply, trained_state_dict
from renyi_kd import InfoSAMLoss, tap
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

# Outside of the mask decoder.
TRAINED = {
    "decoder": r"(?!)",
    "bitfit": r".*bias$",
    "adaptformer": r".*\.\d\.mlp\.branch\.(down|up)\.",
    "lora": r".*\.\d\.attn\.qkv\.lora_[AB]\.",
    "adapter": r".*\.1\.((attn\.proj|mlp)\.branch\.(down|up)|(layer_)?norm[12])\.",
    "hq_sam": r"(?!)",
    "su_sam_series": r".*\.\d\.(attn\.proj|mlp)\.branch\.(down|up)\.",
    "su_sam_parallel": r".*\.\d\.(attn|mlp)\.branch\.(down|up)\.",
    "su_sam_mixed": r".*\.\d\.(attn\.proj|mlp)\.branch\.(down|up)\.",
    "conv_lora": r".*\.\d\.attn\.qkv\.branch\.(down|gate|experts\.\d|up)\.",
}
FAMILIES = {"hf": (hf_sam, hf_batch, run_hf), "meta": (meta_sam, meta_batch, meta_forward)}
CASES = [(method, family) for method in METHODS for family in FAMILIES if (method, family) != ("hq_sam", "meta")]
each = pytest.mark.parametrize(("method", "family"), CASES, ids=[" ".join(case) for case in CASES])


def applied(method: str, family: str) -> nn.Module:
    if method == "hq_sam":
        needs_transformers_with("SamHQModel")
    return apply(FAMILIES[family][0](1), method, first_block=1, rank=2, n_experts=3)


def of_decoder(name: str) -> bool:
    return "mask_decoder." in name


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@each
def test_exactly_the_methods_parameters_and_the_decoder_are_trained(method, family):
    model = applied(method, family)
    outside = {name for name in trained(model) if not of_decoder(name)}
    wanted = {name for name, _ in model.named_parameters() if not of_decoder(name) and re.match(TRAINED[method], name)}
    assert outside == wanted
    assert bool(wanted) == (method not in ("decoder", "hq_sam"))
    decoder = {name for name, _ in model.named_parameters() if of_decoder(name) and "original_module" not in name}
    if method == "bitfit":
        decoder = {name for name in decoder if name.endswith("bias")}
    assert {name for name in trained(model) if of_decoder(name)} == decoder


@each
def test_an_untrained_method_changes_nothing(method, family):
    make, make_batch, run = FAMILIES[family]
    batch = make_batch(2, 2)
    with torch.no_grad():
        before, after = run(make(1).eval(), batch), run(applied(method, family).eval(), batch)
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    # The masks of HQ-SAM's token are added, with weights that are not trained yet.
    assert same == [method != "hq_sam"] * len(same)


@each
def test_the_loss_trains_every_part_of_a_method(method, family):
    make, make_batch, run = FAMILIES[family]
    batch = make_batch(2, 2)
    model, infosam_loss = applied(method, family), InfoSAMLoss(DIM)
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
        # Points and masks are not prompted with.
        unreached = {name for name in unreached if "prompt_encoder" not in name}
    assert unreached == set()
    assert any(re.search(r"mask_decoder.*transformer", name) for name in reached)
    if method == "hq_sam":
        assert any("hq_token" in name for name in reached)


@each
def test_what_is_trained_is_saved_and_loaded_apart(method, family):
    _, make_batch, run = FAMILIES[family]
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


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("method must be one of decoder, bitfit.*got 'prefix'", (hf_sam, "prefix", {})),
        ("first_block must be below the number of blocks, got 2 of 2", (hf_sam, "adapter", {})),
        ("must be transformers' SamModel for 'hq_sam', got Sam;", (meta_sam, "hq_sam", {})),
        ("tune_decoder must not be False with 'decoder'", (hf_sam, "decoder", {"tune_decoder": False})),
        ("must have ViT blocks with attn.qkv.*got Linear", (lambda: nn.Linear(1, 1), "adaptformer", {})),
    ],
)
def test_refusals(pattern, arguments):
    make, method, keywords = arguments
    with pytest.raises(ValueError, match=pattern):
        apply(make(), method, **keywords)
