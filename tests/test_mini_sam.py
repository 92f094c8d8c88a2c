"""The mini SAM: the one that ships, and how it is trained again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.mini_sam import pretrain
from benchmarks.sam.models import MINI_SAM, load_sam
from tests.support.command_line import help_of

ROOT = Path(__file__).parent.parent


def test_it_can_be_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT_SCENES", 2)
    pretrain.main(["--steps", "2", "--batch-size", "1", "--out", str(tmp_path)])
    written, committed = load_file(tmp_path / "model.safetensors"), load_file(MINI_SAM / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in committed.items()}
    assert all(value.dtype == torch.float16 for value in committed.values() if value.is_floating_point())
    assert load_sam(str(tmp_path), None, None).image_size == load_sam("mini", None, None).image_size
    assert load_sam("mini", None, None).image_size == pretrain.IMAGE_SIZE


def test_it_is_small():
    assert sum(path.stat().st_size for path in MINI_SAM.iterdir()) < 8e6


def test_help_says_what_every_option_does(monkeypatch, capsys):
    said = help_of(pretrain, monkeypatch, capsys)
    for field in dataclasses.fields(pretrain.Options):
        assert f"--{field.name.replace('_', '-')} " in said
    assert "of the optimiser" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "0"), "--steps must be at least 1, got 0; leave it out for 2400"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0; leave it out for 4"),
        (("--out", __file__), "--out must be a folder, got the file"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_bad_options_of_the_training_end_in_one_sentence(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--out", str(tmp_path / "new"), *words])
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
