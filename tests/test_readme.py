"""The code of README and documents runs and prints what it says, links lead somewhere, and tables are those of rows."""

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
DOCS = sorted(ROOT.glob("docs/*.md"))
BASH = dict(re.findall(r"<!-- command: (\w+) -->\n\n```bash\n(.*?)```", README, re.DOTALL))
(DIFF,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


def blocks_of(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def run(code: str, name: str, namespace: dict) -> None:
    """Run a block; what it prints must be what the comments after its prints say."""
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), namespace)
    if expected:
        assert printed.getvalue().splitlines() == expected, code


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """Return what a user has at the beginning: models, batches, a task loss; in an empty folder."""

    def task_loss(output: object, masks: Tensor) -> Tensor:
        logits = F.interpolate(output.pred_masks[:, :, 0], masks.shape[-2:])
        return F.binary_cross_entropy_with_logits(logits, masks)

    def batch(seed: int) -> dict:
        inputs = {name: value for name, value in hf_batch(2, 2, seed).items() if name != "ground_truth"}
        # A loop finds what the forward takes under its names, or all of it under one.
        ids = [f"{seed} {i}" for i in range(2)]
        return {**inputs, "inputs": inputs, "masks": torch.ones(2, 2, 32, 32), "sample_id": ids}

    monkeypatch.chdir(tmp_path)
    student = with_lora(hf_sam(dim=256))
    loader = [batch(seed) for seed in range(2)]
    return {
        "load_sam": lambda: hf_sam(dim=256),
        "add_lora": with_lora,
        "pretrained_sam": hf_sam(dim=256),
        "finetuned_sam": student,
        "trainable": [parameter for parameter in student.parameters() if parameter.requires_grad],
        "loader": loader,
        "batch": loader[0],
        "task_loss": task_loss,
    }


# The README.


def test_the_readme_fits():
    assert len(README.splitlines()) <= 150


def test_the_first_example_is_a_diff_of_five_lines_and_early():
    before, _, _ = README.partition("```diff\n")
    assert "```" not in before
    assert before.count("\n") <= 8
    assert DIFF.count("\n") <= 20
    assert {line[:1] for line in DIFF.splitlines()} == {" ", "+", ""}
    assert len(re.findall(r"^\+", DIFF, re.MULTILINE)) == 5


def test_the_diff_leaves_a_loop_that_runs_and_adds_infosam_to_it(namespace):
    """Without its five lines it is the user's own training, with them it trains student and relation module by both."""
    losses = []
    own = namespace["task_loss"]

    def task_loss(*args: object) -> Tensor:
        losses.append(own(*args))
        # The loop adds to it in place.
        return losses[-1].clone()

    namespace["task_loss"] = task_loss
    before = "\n".join(line[1:] for line in DIFF.splitlines() if not line.startswith("+"))
    after = "\n".join(line[1:] for line in DIFF.splitlines())
    plain, infosam = dict(namespace), dict(namespace)
    run(before, "the diff without its lines", plain)
    run(after, "the diff with its lines", infosam)
    assert len(losses) == 2 * len(namespace["loader"])
    # The same before the first step: taps change nothing.
    assert torch.equal(losses[0], losses[len(namespace["loader"])])
    assert infosam["loss"] != losses[-1]
    module, state = infosam["infosam_loss"], infosam["optimizer"].state
    assert all(parameter in state for parameter in module.parameters())
    # Drawn like it, so that what differs was trained.
    start = InfoSAMLoss(dim=256)
    assert not torch.equal(module.relation.key_proj.weight, start.relation.key_proj.weight)
    trained = [
        dict(loop["sam"].named_parameters())[name]
        for loop in (plain, infosam)
        for name, _ in loop["sam"].named_parameters()
        if "lora_B" in name
    ]
    ours, theirs = trained[len(trained) // 2 :], trained[: len(trained) // 2]
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(parameter in state for parameter in ours)
    # What a reader would do next: watch it.
    scalars = module.scalars()
    assert scalars["image_features_share"] > 0
    assert scalars["mask_tokens_share"] > 0


def test_python_blocks_run_in_order_and_print_what_they_say(namespace):
    blocks = blocks_of(ROOT / "README.md")
    assert len(blocks) >= 3
    for index, block in enumerate(blocks):
        run(block, f"README.md block {index}", namespace)
    assert Path("relations.png").is_file()


def test_a_printed_loss_has_a_gradient_and_is_not_at_its_floor(namespace):
    run(blocks_of(ROOT / "README.md")[0], "README.md block 0", namespace)
    terms, student = namespace["terms"], namespace["student"]
    floor = namespace["InfoSAMLoss"](dim=256, distillation="jensen_renyi").terms(
        namespace["teacher"], namespace["teacher"]._replace(image_features=namespace["maps"].clone().requires_grad_())
    )
    assert terms.distillation > floor.distillation + 0.1
    terms.loss.backward()
    assert student.image_features.grad.norm() > 1e-3


def test_ci_runs_what_the_test_command_leaves_out():
    ci = (ROOT / ".ci/run").read_text()
    assert "$(python .ci/readme_command.py tests)" in ci
    # The last of several -m counts, and this one leaves out what is long alone.
    assert 'else chosen="not long"; fi\n' in ci
    assert """PYTEST_ADDOPTS="-m '$chosen' --dist worksteal" bash -euo pipefail -c "$test_command"\n""" in ci


def test_shell_blocks_are_the_two_commands():
    assert re.findall(r"```bash\n(.*?)```", README, re.DOTALL) == list(BASH.values())
    assert BASH.keys() == {"example", "tests"}
    assert BASH["tests"].strip() == 'pip install -e ".[test]" -c constraints.txt && pytest -n auto'


@pytest.mark.long
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


def test_figures_of_the_readme_are_those_of_the_tables():
    speed, comparison = ((ROOT / "docs" / name).read_text() for name in ("speed.md", "does_it_help.md"))
    faster = [float(each) for each in re.findall(r"\| ([\d.]+) x \|", speed)]
    assert len(faster) == 4
    assert f"{min(faster):.0f} to {max(faster):.0f} times as fast" in README
    (of_a_step,) = re.findall(r"^\| cached \|.* ([\d.]+ %) \|$", speed, re.MULTILINE)
    assert f"takes {of_a_step} of a step" in README
    # The paper's form with MobileSAM's weights and the encoder trained: the first table of differences after its title.
    table = comparison.split("mobile_sam at 448 pixels")[1].split("Differences in IoU")[1]
    rows = re.findall(r"^\| (?:lora|adapter) \| infosam \|(.*)$", table, re.MULTILINE)
    cells = re.findall(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\], 3 seeds", "".join(rows))
    means, lows, highs = zip(*(map(float, cell) for cell in cells), strict=True)
    assert len(means) == 6
    assert sum(high < 0 for high in highs) == 1
    assert f"form was {-max(means):.1f} to {-min(means):.1f} points lower, once beyond chance" in README
    halves = [(high - low) / 2 for low, high in zip(lows, highs, strict=True)]
    assert f"intervals of {min(halves):.1f} to {max(halves):.0f} points to either side" in README
    # Nothing helped beyond chance: no interval of a difference, of any method and setting, lies above zero.
    assert not re.search(r"\[\+[\d.]*[1-9]", comparison)


# The documents.


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_measured_tables_are_those_of_the_rows(name):
    text = (ROOT / name).read_text()
    assert with_tables(name, text) == text


def test_a_document_without_the_place_of_a_table_is_refused():
    with pytest.raises(ValueError, match=r"docs/models\.md must have one place for families, got 0"):
        with_tables("docs/models.md", "no table")


@pytest.mark.parametrize("path", [path for path in DOCS if blocks_of(path)], ids=lambda path: path.name)
def test_python_blocks_of_the_documents_run_in_order(namespace, path):
    namespace |= {
        "teacher": tap(namespace["pretrained_sam"]),
        "student": tap(namespace["finetuned_sam"]),
        "infosam_loss": InfoSAMLoss(256),
        "optimizer": torch.optim.AdamW(namespace["trainable"], lr=1e-4),
        "other_batch": hf_batch(3),
        "torch": torch,
        "InfoSAMLoss": InfoSAMLoss,
        "tap": tap,
    }
    for index, block in enumerate(blocks_of(path)):
        before = namespace.get("loss")
        run(block, f"{path.name} block {index}", namespace)
        if (loss := namespace.get("loss")) is not before and ".backward(" not in block:
            loss.backward()


def test_documents_have_code_and_none_of_it_is_hidden_from_the_tests():
    """Every block in a language of its own, so that no Python is left out."""
    languages = [word for path in DOCS for word in re.findall(r"^\s*```(\S*)$", path.read_text(), re.MULTILINE) if word]
    assert languages.count("python") == sum(len(blocks_of(path)) for path in DOCS) > 0
    # `py` is what needs a package, processes or a device that the tests do not have.
    assert not {"python3", "pycon", "Python"} & set(languages)


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_what_is_linked_to_is_there(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]
