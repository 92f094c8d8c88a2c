"""The script for a GPU, as far as none is needed: what it runs and when, what it reads, and what it counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import cases, gpu, gpu_steps, kernels, measure
from tests.support.command_line import help_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def test_the_largest_batch_is_first_and_the_textbook_compiled_once_a_layout_of_it():
    steps = gpu.steps(Path("out"))
    assert [step.name for step in steps[:3]] == ["steps", "loss_64", "tests"]
    assert gpu_steps.Options().batches[0] == 64
    compiled = [step for step in steps if "benchmarks.kernels" in step.command and "infosam_terms" in step.command]
    compiled = [step for step in compiled if "--providers" not in step.command]
    # In fp32 alone, at one batch a step.
    assert [step.command[-1] for step in compiled] == ["64", "4"]
    assert all("--dtype" not in step.command for step in compiled)


def test_words_of_the_steps_are_those_of_their_programs(capsys):
    for step in gpu.steps(Path("out")):
        if "benchmarks.gpu_steps" in step.command:
            words = step.command[step.command.index("benchmarks.gpu_steps") + 1 :]
            with pytest.raises(SystemExit, match="2" if not torch.cuda.is_available() else "0"):
                gpu_steps.main([*words, *(["--help"] if torch.cuda.is_available() else [])])
            said = capsys.readouterr().err
            assert torch.cuda.is_available() or "a GPU must be there, got none" in said


@pytest.mark.parametrize(
    ("last", "failed"),
    [
        ("3 failed, 240 passed, 2 skipped in 80.12s", 3),
        ("240 passed in 80.12s", 0),
        ("3 failed, 2 errors in 1.00s", 0),
        ("ERROR: file not found", 0),
    ],
)
def test_failed_tests_are_counted_by_the_last_line(last, failed, tmp_path):
    log = tmp_path / "tests.log"
    log.write_text(f"9 failed\n{last}\n\n")
    assert gpu.failed_tests(log) == failed
    assert gpu.failed_tests(tmp_path / "none.log") == 0


@pytest.mark.parametrize(("last", "good"), [("3 failed, 240 passed in 8s", True), ("1 failed, 1 error in 1s", False)])
def test_failed_tests_are_said_and_not_fatal_but_errors_are(last, good, tmp_path, capsys):
    command = [sys.executable, "-c", f"print({last!r}); raise SystemExit(1)"]
    assert gpu.run_all([gpu.Step("some_tests", command, 60, is_check=True, is_tests=True)], tmp_path) is good
    said = capsys.readouterr().out
    assert ("3 tests failed: see" in said) is good
    assert (tmp_path / "some_tests.log").is_file()


def test_clocks_are_read_and_noted_and_never_set(tmp_path, monkeypatch):
    asked = []

    def nvidia_smi(command, **_):
        asked.append(command)
        return SimpleNamespace(
            stdout="1980, 2619, 85.41, 34, 0x0000000000000000\n[N/A], 2619, [N/A], 35, 0x1\nno GPU\n"
        )

    monkeypatch.setattr(gpu.subprocess, "run", nvidia_smi)
    gpu.note_clocks(tmp_path, "at the start")
    gpu.note_clocks(tmp_path, "after tests")
    rows = measure.read_rows(tmp_path / "clocks.csv")
    assert list(rows["when"]) == ["at the start"] * 2 + ["after tests"] * 2
    assert list(rows["clocks.sm"]) == ["1980", ""] * 2
    assert list(rows["temperature.gpu"]) == ["34", "35"] * 2
    assert all(command[1].startswith("--query-gpu=") for command in asked)


def test_without_nvidia_smi_no_clocks_are_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    gpu.note_clocks(tmp_path, "at the start")
    assert not (tmp_path / "clocks.csv").exists()


def test_the_picture_is_drawn_of_the_rows(tmp_path):
    gpu.draw(tmp_path)
    (tmp_path / "kernels_cuda.csv").write_bytes((RESULTS / "kernels_cpu.csv").read_bytes())
    gpu.draw(tmp_path)
    assert (tmp_path / "kernels_cuda.png").read_bytes().startswith(b"\x89PNG")


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("RENYI_KD_COMMIT", "0123456789ab")
    assert measure.environment()["commit"] != "0123456789ab"
    monkeypatch.setenv("PATH", "")
    environment = measure.environment()
    assert (environment["commit"], environment["dirty"]) == ("0123456789ab", "")


# A step taken apart.


def event(name: str, us: float) -> SimpleNamespace:
    return SimpleNamespace(name=lambda: name, duration_ns=lambda: 1000 * us)


def test_times_of_kernels_are_summed_in_a_step_and_the_median_of_steps(monkeypatch):
    steps = iter([[event("a", 9), event("b", 1)], [event("a", 1), event("a", 2), event("b", 2)], [event("a", 4)]])
    monkeypatch.setattr(measure, "_on_gpu", lambda run: next(steps))
    assert measure.kernel_us(lambda: None, steps=3) == {"a": 4.0, "b": 1.5}


def test_bandwidth_is_that_of_the_arguments_beside_a_copy():
    rows = gpu_steps.kernel_rows({"short": 1.0, "long": 100.0}, Counter({"long": 150_000_000}), 3000.0)
    assert [row["kernel"] for row in rows] == ["long", "short"]
    assert rows[0]["gb_s"] == pytest.approx(1500)
    assert rows[0]["of_copy"] == pytest.approx(0.5)
    assert math.isnan(rows[1]["gb_s"])


def test_bytes_of_a_launch_are_those_of_its_tensors(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    launched = []
    monkeypatch.setattr(runtime.JITFunction, "run", lambda self, *args, **keywords: launched.append(args))

    def some_kernel(x_ptr, y_ptrs, n):
        pass

    kernel = runtime.JITFunction(some_kernel)
    x, y = torch.zeros(6, 4), torch.zeros(3, dtype=torch.float16)
    with gpu_steps.bytes_of_launches() as counted:
        kernel[(2,)](x[::2], (y, y.expand(5, 3)), n=7)
        kernel[(2,)](None, (y,), n=7)
    assert counted == {"some_kernel": 3 * 4 * 4 + 6 + 6 + 6}
    assert len(launched) == 2


def test_constants_of_launches_are_found():
    pytest.importorskip("triton")
    found = gpu_steps.constants()
    assert len({str(constant) for constant in found}) == len(found) > 5
    assert any("WARPS" in constant.name for constant in found)
    assert not any("MAX" in constant.name for constant in found)


def test_a_sweep_tries_half_and_twice_and_ends_in_time(monkeypatch, capsys):
    module = ModuleType("renyi_kd.ops.some.triton")
    module.TILE, module.WARPS = 64, 4
    monkeypatch.setattr(
        gpu_steps, "constants", lambda: [gpu_steps.Constant(module, "TILE"), gpu_steps.Constant(module, "WARPS")]
    )
    seconds = itertools.count(0, 2)

    def step_us():
        if module.WARPS == 2:
            raise RuntimeError("out of resources")
        return {"us": float(module.TILE)}

    rows = gpu_steps.sweep(gpu_steps.tries(), step_us, 5, lambda: next(seconds))
    assert rows == [
        {"constant": "as they are", "value": "", "us": 64.0},
        {"constant": "some.triton.TILE", "value": 32, "us": 32.0},
    ]
    said = capsys.readouterr().out
    assert "some.triton.WARPS = 2: RuntimeError: out of resources" in said
    assert "no time for some.triton.TILE = 128" in said
    assert (module.TILE, module.WARPS) == (64, 4)


def test_what_is_kept_of_launches_is_forgotten():
    from renyi_kd.samples import processes

    forgotten = []
    function = SimpleNamespace(cache_clear=lambda: forgotten.append(True))
    processes.some_plan = function
    try:
        gpu_steps.forget_plans()
    finally:
        del processes.some_plan
    assert forgotten == [True]


def test_steps_are_taken_apart_unless_they_are_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "HEIGHT", 5)
    monkeypatch.setattr(gpu_steps, "copy_gb_s", lambda: 3000.0)
    monkeypatch.setattr(gpu_steps, "times_of", lambda run: ({"host_us": 5.0}, {"a_kernel": 2.0}))
    monkeypatch.setattr(measure, "environment", lambda device: {"device": device})
    case = gpu_steps.loss_case(3, "channels_last", "float32", "cpu")
    monkeypatch.setattr(gpu_steps, "loss_case", lambda *_: case)

    def with_a_wrong_one(case, which):
        def off():
            loss, *gradients = runs["reference"]()
            return (1.01 * loss, *gradients)

        runs = kernels.runs_of(case, which)
        return {**runs, "triton": off}

    monkeypatch.setattr(gpu_steps, "runs_of", with_a_wrong_one)
    options = gpu_steps.Options(out=tmp_path, batches=(3,), dtype=("float32",), layouts=("channels_last",))
    gpu_steps.take_apart(options)
    said = capsys.readouterr().out
    assert "B 3, channels last, float32, triton\n    is not the reference's and is not timed" in said
    steps = measure.read_rows(tmp_path / "steps_cuda.csv")
    assert list(steps["provider"]) == ["textbook"]
    assert list(measure.read_rows(tmp_path / "step_kernels_cuda.csv")["kernel"]) == ["a_kernel"]


def test_help_says_what_every_option_does(monkeypatch, capsys):
    said = help_of(gpu_steps, monkeypatch, capsys)
    for field in dataclasses.fields(gpu_steps.Options):
        assert f"--{field.name.replace('_', '-')} " in said.replace(",", " ")
