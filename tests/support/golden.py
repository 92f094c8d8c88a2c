"""Cases of the official implementation; tests/data/README.md says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from renyi_kd import RelationModule, SAMFeatures
from tests.support.tolerance import assert_close_on_scale

FILE = Path(__file__).parent.parent / "data" / "infosam_golden.safetensors"
with safe_open(FILE, "pt") as _file:
    CASES = {name: json.loads(text) for name, text in sorted(_file.metadata().items())}
# Relative to the largest entry of each tensor: fp64 rounding, and fp32 rounding through norms, logs and quotients.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5}


def load_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Return the settings and tensors of a case."""
    with safe_open(FILE, "pt") as file:
        tensors = {k.split("/")[1]: file.get_tensor(k) for k in file.keys() if k.startswith(f"{name}/")}  # noqa: SIM118
    return CASES[name], tensors


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
