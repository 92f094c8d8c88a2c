"""The loss against values of the official implementation; tests/data/README.md says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from renyi_kd import InfoSAMLoss, RelationModule, SAMFeatures, infosam_terms
from tests.support import gradients
from tests.support.tolerance import assert_close_on_scale

FILE = Path(__file__).parent / "data" / "infosam_golden.safetensors"
with safe_open(FILE, "pt") as _file:
    CASES = {name: json.loads(text) for name, text in sorted(_file.metadata().items())}
# Relative to the largest entry of each tensor: fp64 rounding, and fp32 rounding through norms, logs and quotients.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5}


def load_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Return the settings and tensors of a case."""
    with safe_open(FILE, "pt") as file:
        tensors = {k.split("/")[1]: file.get_tensor(k) for k in file.keys() if k.startswith(f"{name}/")}  # noqa: SIM118
    return CASES[name], tensors


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=["channel-last", "channel-first"])
def as_map(request):
    """Turn stored features [B, HW, D] into a map [B, D, HW, 1], as they lie in memory or copied."""
    contiguous = request.param == "channel-first"
    return lambda x: x.mT.unsqueeze(-1).contiguous() if contiguous else x.mT.unsqueeze(-1)


def relation_of(tensors: dict[str, Tensor], dim: int) -> RelationModule:
    relation = RelationModule(dim)
    state = {name.removeprefix("relation."): t for name, t in tensors.items() if name.startswith("relation.")}
    relation.load_state_dict(state, strict=True)
    return relation


def features_of(tensors: dict[str, Tensor], who: str, dtype: torch.dtype, as_map) -> SAMFeatures:
    features, tokens = (tensors[f"{who}_{name}"].to(dtype) for name in ("features", "tokens"))
    return SAMFeatures(as_map(features), tokens)


def check_values(terms, tensors, dtype):
    for name in ("loss", "compression", "distillation"):
        value = getattr(terms, name)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(tensors[name].item(), rel=TOLERANCES[dtype])


def check_gradients(features, parameters, tensors, dtype):
    rtol = TOLERANCES[dtype]
    gradient = features["image_features"].squeeze(-1).mT
    assert_close_on_scale(gradient, tensors["grad_student_features"], name="student features", rtol=rtol)
    assert_close_on_scale(features["mask_tokens"], tensors["grad_student_tokens"], name="student tokens", rtol=rtol)
    expected = {name: tensors[f"grad_relation.{name}"] for name in parameters}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in parameters.items():
        # A gradient that is zero in exact arithmetic is noise here as it was there.
        scale = largest if expected[name].abs().max() < 1e-12 * largest else 0.0
        assert_close_on_scale(gradient, expected[name], name=name, rtol=rtol, scale=scale)


def test_values_and_gradients(case, dtype, as_map):
    settings, tensors = case
    relation = relation_of(tensors, settings["D"]).to(dtype)
    teacher, student = (features_of(tensors, who, dtype, as_map) for who in ("teacher", "student"))
    student = SAMFeatures(student.image_features.requires_grad_(), student.mask_tokens.requires_grad_())
    weights = {"lambda_r": settings.get("wr", 1.0), "lambda_d": settings.get("wd", 0.5)}
    terms = infosam_terms(relation, teacher, student, **weights)
    check_values(terms, tensors, dtype)
    check_gradients(*gradients(terms.loss, student, relation), tensors, dtype)


def test_module_gives_the_same(case, dtype, as_map):
    settings, tensors = case
    weights = {"lambda_r": settings["wr"], "lambda_d": settings["wd"]} if "wr" in settings else {}
    infosam = InfoSAMLoss(settings["D"], token="all", **weights)
    infosam.relation.load_state_dict(relation_of(tensors, settings["D"]).state_dict())
    infosam.to(dtype)
    teacher, student = (features_of(tensors, who, dtype, as_map) for who in ("teacher", "student"))
    student = SAMFeatures(student.image_features.requires_grad_(), student.mask_tokens.requires_grad_())
    check_values(infosam.terms(teacher, student), tensors, dtype)
    check_gradients(*gradients(infosam(teacher, student), student, infosam.relation), tensors, dtype)


def test_relation_maps(case, dtype, as_map):
    settings, tensors = case
    relation = relation_of(tensors, settings["D"]).to(dtype)
    for who in ("teacher", "student"):
        maps = relation(*features_of(tensors, who, dtype, as_map))
        assert maps.shape == (settings["B"], settings["N"], settings["HW"], 1)
        assert_close_on_scale(maps.flatten(1), tensors[f"{who}_relation"], name=who, rtol=TOLERANCES[dtype])


def test_the_relation_module_has_the_official_parameters():
    relation = RelationModule()
    layers = ("query_proj", "key_proj", "layer_norm_feat", "layer_norm_mask")
    assert set(relation.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert sum(parameter.numel() for parameter in relation.parameters()) == 132_608
