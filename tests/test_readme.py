"""The README's code runs, prints what it says it prints, and its table is that of the measured rows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.readme import DOCUMENTS, with_tables
from renyi_kd import InfoSAMLoss, tap
from tests.support.models import hf_batch, hf_sam, with_lora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = dict(re.findall(r"<!-- command: (\w+) -->\n\n```bash\n(.*?)```", README, re.DOTALL))


@pytest.fixture
def namespace():
    """Return what a user has when the README begins: two models, their batches and a task loss."""

    def task_loss(output: object, masks: Tensor) -> Tensor:
        logits = F.interpolate(output.pred_masks[:, :, 0], masks.shape[-2:])
        return F.binary_cross_entropy_with_logits(logits, masks)

    student = with_lora(hf_sam(dim=256))
    batches = [
        {**hf_batch(2, 2, seed), "masks": torch.ones(2, 2, 32, 32), "sample_id": [f"{seed} {i}" for i in range(2)]}
        for seed in range(2)
    ]
    return {
        "pretrained_sam": hf_sam(dim=256),
        "finetuned_sam": student,
        "trainable": [parameter for parameter in student.parameters() if parameter.requires_grad],
        "loader": batches,
        "task_loss": task_loss,
    }


def test_python_blocks_run_in_order_print_what_they_say_and_train(namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, block in enumerate(PYTHON):
        expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, f"README.md block {index}", "exec"), namespace)
        if expected:
            assert printed.getvalue().splitlines() == expected, block
    state = namespace["optimizer"].state
    assert any(parameter in state for parameter in namespace["infosam_loss"].parameters())
    assert all(
        parameter in state for name, parameter in namespace["finetuned_sam"].named_parameters() if "lora_B" in name
    )


def test_the_first_example_is_short_and_early():
    before, _, rest = README.partition("```python\n")
    assert before.count("\n") <= 8
    assert rest.partition("```")[0].count("\n") <= 12


def test_ci_runs_what_the_test_command_leaves_out():
    ci = (ROOT / ".ci/run").read_text()
    assert "readme_command.py tests" in ci
    assert "\npytest -n auto -m slow\n" in ci


def test_shell_blocks_are_the_two_commands():
    assert re.findall(r"```bash\n(.*?)```", README, re.DOTALL) == list(BASH.values())
    assert BASH.keys() == {"example", "tests"}
    assert BASH["tests"].strip() == 'pip install -e ".[test]" -c constraints.txt && pytest -n auto'


@pytest.mark.slow
def test_the_example_command_runs(tmp_path):
    install, _, example = BASH["example"].strip().partition(" && ")
    assert install == 'pip install -e ".[examples]" -c constraints.txt'
    program, option, module = shlex.split(example)
    assert (program, option) == ("python", "-m")
    small = ["--limit", "4", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    # In the tests' environment there is torchvision, which users of the example do not need.
    launcher = [sys.executable, "-m", "benchmarks.torchvision_compat", module]
    subprocess.run([*launcher, *small], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "comparison.png").is_file()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_measured_tables_are_those_of_the_rows(name):
    text = (ROOT / name).read_text()
    assert with_tables(name, text) == text


# The documents.


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_python_blocks_of_the_documents_run_in_order(namespace, path):
    namespace |= {
        "teacher": tap(namespace["pretrained_sam"]),
        "student": tap(namespace["finetuned_sam"]),
        "infosam_loss": InfoSAMLoss(256),
        "batch": namespace["loader"][0],
        "other_batch": hf_batch(3),
        "torch": torch,
        "InfoSAMLoss": InfoSAMLoss,
    }
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    for index, block in enumerate(blocks):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, f"{path.name} block {index}", "exec"), namespace)
        if ".backward()" not in block:
            namespace["loss"].backward()
    assert blocks


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_what_is_linked_to_is_there(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert all((path.parent / link).exists() for link in links if "://" not in link), links
