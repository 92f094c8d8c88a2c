"""Each example runs as a user runs it, prints what it says, and can be copied out of this repository."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.run_example import SECONDS, run_in_fork

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
README = (FOLDER / "README.md").read_text()
TERMS = r"L_r (\S+), L_d (\S+), share (\S+)"
# What each prints, and how many lines of it.
PRINTED = {
    "accelerate_loop": (rf"epoch \d: task (\S+), {TERMS}", 3),
    "accumulation": (rf"epoch \d: task (\S+), {TERMS}", 3),
    "adapter_disabled": (rf"epoch \d: task (\S+), {TERMS}", 3),
    "any_model": (rf"epoch \d: task (\S+), {TERMS}", 5),
    "cached_teacher": (rf"epoch \d: teacher's encoder ran (\d+) times, task (\S+), {TERMS}", 3),
    "ddp": (rf"epoch \d, process \d: task (\S+), {TERMS}", 6),
    "entropies": (r"(?:pixels|layer \d) +(\S+) +(\S+)", 7),
    "lightning_loop": (rf"step +\d+: task (\S+), {TERMS}", 3),
    "other_teacher": (r"epoch \d: task (\S+), mean L_d (\S+), share (\S+)", 6),
    "sam2_loop": (rf"step \d: task (\S+), {TERMS}", 6),
    "segment_anything_loop": (rf"step +\d+: task (\S+), {TERMS}", 4),
    "trainer_loop": (rf"step +\d+: {TERMS}", 12),
}
# Those that train on images of 192 pixels.
SLOW = PRINTED.keys() - {"any_model", "entropies", "sam2_loop", "segment_anything_loop"}
NEEDED = {
    "accelerate_loop": "accelerate",
    "lightning_loop": "lightning",
    "sam2_loop": "sam2",
    "segment_anything_loop": "segment_anything",
    "trainer_loop": "accelerate",
}
NOTEBOOK = FOLDER / "walkthrough.ipynb"


def run(path: str, folder: Path) -> str:
    """Return what an example printed in a process of its own."""
    log = folder / "printed.txt"
    ended = run_in_fork(ROOT / path, log)
    assert ended == 0, log.read_text()
    return log.read_text()


def run_in_two_processes(path: str, folder: Path) -> str:
    """Return what an example printed in two processes, that of one after that of the other.

    Each has a file: where Python does not buffer, lines that two processes write to one pipe run into one another.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--log-dir", str(folder), "--redirects", "3", "-m", "tests.support.run_example", path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    logs = {name: [log.read_text() for log in sorted(folder.rglob(name))] for name in ("stdout.log", "stderr.log")}
    assert done.returncode == 0, (done.stderr, logs)
    assert len(logs["stdout.log"]) == 2
    return "".join(logs["stdout.log"])


def numbers(name: str, printed: str) -> list[list[float]]:
    """Return the numbers of the lines that an example is to print."""
    pattern, count = PRINTED[name]
    found = [[float(value) for value in match.groups()] for match in re.finditer(pattern, printed)]
    assert len(found) == count, printed
    assert all(math.isfinite(value) for line in found for value in line), printed
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PRINTED]
)
def test_example_runs_and_prints(name, tmp_path):
    module = NEEDED.get(name)
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    path = f"examples/{name}.py"
    lines = numbers(name, run_in_two_processes(path, tmp_path) if name == "ddp" else run(path, tmp_path))
    if name == "cached_teacher":
        assert [line[0] for line in lines] == [4, 0, 0]
    if name == "entropies":
        assert all(0 <= information <= entropy for entropy, information in lines)
    if name == "ddp":
        # Terms are of the samples of both processes.
        terms = sorted(tuple(line[1:3]) for line in lines)
        assert terms[::2] == terms[1::2]


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    printed = run("examples/walkthrough.ipynb", tmp_path)
    assert re.search(r"mean IoU .*with InfoSAM \d\.\d+", printed), printed


def test_notebook_is_small_and_was_run_in_order():
    assert NOTEBOOK.stat().st_size < 300 * 2**10
    counts = [cell["execution_count"] for cell in json.loads(NOTEBOOK.read_text())["cells"] if "outputs" in cell]
    assert counts in (list(range(1, len(counts) + 1)), [None] * len(counts))


def test_every_example_is_run():
    """That of the README has tests of its own."""
    assert {path.stem for path in FOLDER.glob("*.py")} == PRINTED.keys() | {"finetune", "__init__"}


@pytest.mark.parametrize("name", PRINTED)
def test_example_can_be_copied(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert 40 <= text.count("\n") <= 90
    ours = {"benchmarks", "examples", "tests"} | {path.stem for path in FOLDER.glob("*.py")}
    assert not {package.partition(".")[0] for package in imported(text)} & ours


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", PRINTED)
def test_example_says_how_it_is_run(name):
    command = f"examples/{name}.py"
    said = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    for text in (said, README):
        assert re.search(rf"(?:python|torchrun --nproc_per_node 2) {command}", text)


def test_gallery_links_exist():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert all((FOLDER / target).exists() for target in targets)
