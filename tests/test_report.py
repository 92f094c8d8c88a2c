"""``python -m renyi_kd MODEL``: what it says of models that attach, and of those that do not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from renyi_kd.__main__ import main
from renyi_kd.sam.report import _count, report
from tests.support.models import hf_batch, hf_sam, hooks_of, meta_batch, meta_sam, needs_transformers_with, with_lora

ROOT = Path(__file__).parent.parent
MODELS = "tests.support.models"


def lines(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        found.setdefault(line[:15].strip(), []).append(line[16:])
    return found


def frozen_sam() -> nn.Module:
    return hf_sam().requires_grad_(False)


def lora_sam() -> nn.Module:
    return with_lora(hf_sam())


def fails() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def test_a_model_and_its_batch(capsys):
    assert main([f"{MODELS}:hf_sam", "--batch", f"{MODELS}:hf_batch"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["model"] == ["SamModel, 27.1 k parameters"]
    assert found["family"] == [
        "SAM, by iou_token, mask_tokens, output_hypernetworks_mlps, transformer of its mask decoder"
    ]
    assert found["mask decoder"] == ["mask_decoder"]
    assert found["image features"] == ["image_embeddings= of mask_decoder, [2, 16, 4, 4] in float32, with gradient"]
    assert found["mask tokens"] == [
        "input of mask_decoder.output_hypernetworks_mlps, 4 of them, [2, 4, 16] in float32, with gradient"
    ]
    assert found["token layout"] == ["0 iou | 1 to 4 mask | from 5 on prompts"]
    assert found["loss"] == ["InfoSAMLoss(dim=16)"]
    assert found["image encoder"] == ["vision_encoder"]
    assert "10.7 k in mask_decoder" in found["trainable"]
    assert found["missing"] == ["nothing"]


@pytest.mark.parametrize(
    ("kind", "variant", "layout", "grid"),
    [
        ("SamModel", "SAM,", "0 iou | 1 to 4 mask | from 5 on prompts", 64),
        ("SamHQModel", "SAM-HQ,", "0 iou | 1 to 4 mask | 5 HQ | from 6 on prompts", 64),
        ("Sam2Model", "SAM 2 or 3,", "0 object score | 1 iou | 2 to 5 mask | from 6 on prompts", 64),
    ],
)
def test_a_transformers_folder_is_looked_at_without_its_weights(kind, variant, layout, grid, tmp_path, capsys):
    import transformers

    needs_transformers_with(kind)
    config = getattr(transformers, kind).config_class()
    config.architectures = [kind]
    config.save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 0
    found = lines(capsys.readouterr().out)
    assert found["family"][0].startswith(variant)
    assert found["token layout"] == [layout]
    if transformers.__version__.startswith("4."):
        # Its models read a number back in their forward, which the meta device refuses.
        assert "a run as a student: Tensor.item() cannot be called on meta tensors" in found["missing"]
        return
    assert f"[2, 256, {grid}, {grid}]" in found["image features"][0]
    assert found["missing"] == ["nothing"]


def test_meta_style_models_run_by_a_function(capsys):
    arguments = [f"{MODELS}:meta_sam", "--batch", f"{MODELS}:meta_batch"]
    assert main([*arguments, "--call", f"{MODELS}:meta_forward"]) == 0
    assert lines(capsys.readouterr().out)["missing"] == ["nothing"]
    assert main(arguments) == 0
    found = lines(capsys.readouterr().out)
    assert "[2, 16, 4, 4] in float32, without gradient" in found["image features"][0]
    assert "must run with gradient to be a student" in found["missing"][0]


def test_what_peft_trains_and_what_a_teacher_does_not():
    found = lines(report(lora_sam(), hf_batch()))
    assert found["mask decoder"] == [
        "base_model.model.mask_decoder.original_module and base_model.model.mask_decoder.modules_to_save.default"
    ]
    assert found["image encoder"] == ["vision_encoder"]
    assert sorted(line.split(" in ")[1] for line in found["trainable"]) == ["mask_decoder", "vision_encoder"]
    found = lines(report(frozen_sam(), hf_batch()))
    assert found["trainable"] == ["nothing"]
    assert any("every parameter is frozen" in line for line in found["missing"])


def test_a_model_that_cannot_be_run_is_still_described():
    found = lines(report(meta_sam(), [{"image": torch.zeros(3, 7, 7), "original_size": (7, 7)}]))
    assert found["mask decoder"] == ["mask_decoder"]
    assert found["missing"][0].startswith("a run as a student: ")
    assert lines(report(meta_sam()))["missing"] == ["shapes: no batch to run the model on"]


def test_running_statistics_stay_as_they_are():
    model = hf_sam()
    norm = nn.BatchNorm2d(16)
    model.vision_encoder.neck.register_module("norm", norm)
    model.vision_encoder.neck.register_forward_hook(lambda module, _args, output: module.norm(output))
    report(model, hf_batch())
    assert norm.num_batches_tracked == 0
    assert model.training


def test_the_model_is_left_without_hooks():
    model = meta_sam()
    report(model, meta_batch())
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["torch.nn:Identity"], "tap: model must hold a mask decoder that is known, got Identity"),
        (
            ["nowhere:model"],
            "'nowhere' must be a module of this folder or an installed one, got none of that name; run",
        ),
        (
            ["torch.nn:Modul"],
            "torch.nn must hold what 'torch.nn:Modul' names, got nothing called 'Modul'; near it: Module",
        ),
        (["torch.nn:qqqq"], "got nothing called 'qqqq'; name a function that it defines"),
        (
            ["runs/nowhere/sam"],
            "must be a folder, a name at the Hugging Face hub or module:factory, got 'runs/nowhere/sam'",
        ),
        (["./sam"], "which is no folder here; look at the path"),
        ([f"{MODELS}:hf_batch"], "must return a torch.nn.Module, got dict"),
        (["tests.test_report:fails"], "no such checkpoint"),
        ([f"{MODELS}:hf_sam", "--batch", "hf_batch"], "must be given as module:function, got 'hf_batch'"),
    ],
)
def test_what_does_not_attach_is_one_line_and_status_one(arguments, pattern, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert pattern in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("name", ["train", "train.py"])
def test_a_file_is_named_by_its_function(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main([name]) == 1
    said = f"renyi_kd: a model of train.py must be named by its function, got {name!r}; as in train:make_model\n"
    assert capsys.readouterr().err == said


def test_a_module_that_a_module_lacks_is_named_as_it_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "lacks_a_module.py").write_text("import nowhere_at_all\n")
    monkeypatch.chdir(tmp_path)
    assert main(["lacks_a_module:model"]) == 1
    assert capsys.readouterr().err == "No module named 'nowhere_at_all'\n"


def test_the_hub_is_announced(capsys, monkeypatch):
    # A wrong name waits for the hub for a while.
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda _name: fails())
    assert main(["somebody/sam"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "renyi_kd: no folder 'somebody/sam' is here, so it is looked up at the Hugging Face hub"
    assert "no such checkpoint" in second


def test_as_a_command(tmp_path):
    (tmp_path / "train.py").write_text("from torch import nn\n\ndef make_model():\n    return nn.Linear(2, 2)\n")
    command = [sys.executable, "-m", "renyi_kd", "train:make_model"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "must hold a mask decoder that is known, got Linear" in result.stderr


def test_a_torchvision_that_does_not_fit_torch_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    )
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam/config.json").write_text('{"architectures": ["SamModel"], "model_type": "sam"}')
    command = [sys.executable, "-m", "renyi_kd", "sam"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert "torchvision must be built for the torch that is installed" in said
    assert f"got torchvision 0.1 beside torch {torch.__version__}" in said
    assert "operator torchvision::nms does not exist" in said
    assert "pip uninstall torchvision" in said
    assert "Traceback" not in result.stderr


def test_an_import_that_fails_for_another_reason_tells_the_cause(tmp_path, capsys, monkeypatch):
    (tmp_path / "hidden_cause.py").write_text(
        "try:\n    raise RuntimeError('no CUDA here')\nexcept RuntimeError as error:\n"
        "    raise ImportError('could not import model') from error\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["hidden_cause:model"]) == 1
    assert capsys.readouterr().err == "could not import model; caused by RuntimeError: no CUDA here\n"


# The page that says what to do about every error of the taps and the teachers.


def rules_of_errors() -> set[str]:
    """Return what must hold by each message of an error, with ``...`` for what varies."""
    rules = set()
    for path in sorted([*ROOT.glob("renyi_kd/sam/*.py"), *ROOT.glob("renyi_kd/teachers/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [getattr(part, "value", "...") if isinstance(part, ast.Constant) else "..." for part in parts]
            found = re.match(r"(\w+|\.\.\.): ([^\n]*? must [^\n]*?),( got| \.\.\.[:;])", "".join(map(str, texts)))
            if found:
                # A member of something that varies, and a varying member of it.
                rules.add(re.sub(r"^\.{7}", "...", re.sub(r"\.{4}(?=\w)", ".", found[2])))
    return rules


def test_every_error_has_a_way_out_in_the_documents():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rules = rules_of_errors()
    assert len(rules) > 70
    assert {rule for rule in rules if f"| {rule} |" not in page} == set()


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (999_949, "999.9 k"), (10**6, "1.0 M"), (9_400_000, "9.4 M")],
)
def test_numbers_of_parameters(number, said):
    # No memory: all elements are one.
    assert _count([torch.zeros(1).expand(number)]) == said
