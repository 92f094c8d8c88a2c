"""The loss against values of the official implementation; tests/data/README.md says which."""

from __future__ import annotations

import pytest

from renyi_kd import InfoSAMLoss, RelationModule, SAMFeatures, infosam_terms
from tests.support import gradients
from tests.support.golden import CASES, TOLERANCES, check_gradients, check_values, features_of, load_case, relation_of
from tests.support.tolerance import assert_close_on_scale


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
