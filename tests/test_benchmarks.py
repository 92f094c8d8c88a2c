"""The benchmarks: what is wrong is not timed, rows are whole, the picture is drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accumulation, busy, cases, descent, gpu, kernels, many_samples, measure, processes, teachers
from benchmarks.readme import accumulation_table, busy_table, many_samples_table, processes_table
from benchmarks.segmentation import __main__ as segmentation
from benchmarks.segmentation import grid
from tests.support.command_line import help_of
from tests.support.models import hf_sam

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture
def case():
    case = cases.moment_case(48, torch.float32, "cpu")
    # Compiling takes a C++ compiler and a while.
    functions = {name: case.functions[name] for name in ("textbook", "reference", "triton")}
    return case._replace(functions=functions)


@pytest.mark.parametrize("which", ["forward", "forward+backward"])
def test_rows_say_what_was_measured_and_where(case, which, tmp_path):
    rows = kernels.rows_of(case, which, torch.float32, 2, measure.environment())
    assert [row["provider"] for row in rows] == ["textbook", "reference"]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert rows[0]["speed_up"] == 1
    measure.append_rows(tmp_path / "rows.csv", rows)
    measure.append_rows(tmp_path / "rows.csv", rows)
    written = measure.read_rows(tmp_path / "rows.csv")
    assert list(written.columns) == list(measure.read_rows(RESULTS / "kernels_cpu.csv").columns)
    assert list(written["provider"]) == ["textbook", "reference"] * 2
    assert set(written["n"]) == {"48"}
    assert set(written["b"]) == {""}


@pytest.mark.parametrize("name", ["loss_cpu", "kernels_cpu", "teachers_cpu", "families"])
def test_rows_that_are_there_stay_letter_by_letter(name, tmp_path):
    path, before = tmp_path / "rows.csv", (RESULTS / f"{name}.csv").read_bytes()
    path.write_bytes(before)
    measure.append_rows(path, [{"torch": "2.13.0", "b": 65536, "another": 0.123456}])
    header, *lines = before.decode().splitlines()
    new_header, *new_lines = path.read_text().splitlines()
    added = new_header.removeprefix(header)
    assert set(added.split(",")) <= {"", "b", "another"}
    assert new_lines[:-1] == [line + "," * added.count(",") for line in lines]
    last = measure.read_rows(path).iloc[-1]
    assert (last["torch"], last["b"], last["another"]) == ("2.13.0", "65536", "0.1235")


def test_processes_append_to_one_file_and_lose_nothing(tmp_path):
    path = tmp_path / "rows.csv"
    code = "import sys, pathlib; from benchmarks.measure import append_rows\n"
    code += "for i in range(20): append_rows(pathlib.Path(sys.argv[1]), [{'process': sys.argv[2], 'i': i}])"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    written = measure.read_rows(path)
    for name in "ab":
        assert list(written[written["process"] == name]["i"]) == [str(i) for i in range(20)]


def test_rows_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    measure.append_rows(path, [{"a": 1}])

    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr("pandas.DataFrame.to_csv", fail)
    with pytest.raises(OSError, match="no space"):
        measure.append_rows(path, [{"a": 2}])
    assert path.read_text() == "a\n1\n"


def test_what_is_wrong_or_fails_is_not_timed(case, capsys):
    def fails(*_):
        raise RuntimeError("no such device\nand more")

    def without_gradient(*x):
        value = case.functions["textbook"](*x)
        value.register_hook(lambda grad: math.nan * grad)
        return value

    functions = case.functions | {"off": lambda *x: 1.001 * case.functions["textbook"](*x), "fails": fails}
    functions |= {"without": without_gradient}
    runs = kernels.agreeing(case._replace(functions=functions), "forward+backward", torch.float32)
    assert set(runs) == {"textbook", "reference"}
    said = capsys.readouterr().out
    assert "off is off by 1.0e-03 of the scale and is not timed" in said
    assert "without is off by nan of the scale and is not timed" in said
    assert "fails does not run here: RuntimeError: no such device\n" in said


def test_what_is_nearer_to_fp64_than_the_textbook_is_timed(case, capsys):
    functions = case.functions | {"textbook": lambda *x: 1.0001 * case.functions["textbook"](*x)}
    functions["off"] = lambda *x: 1.001 * case.functions["reference"](*x)
    assert set(kernels.agreeing(case._replace(functions=functions), "forward", torch.float32)) == {
        "textbook",
        "reference",
    }
    assert "off is off by 1.0e-03 of the scale" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["relation_scores", "batch_gram", "infosam_terms"])
def test_the_truth_is_in_fp64_and_of_the_same_inputs(op, monkeypatch):
    monkeypatch.setattr(cases, "HEIGHT", 9)
    case = next(case for case in cases.map_cases(3, "channels_last", torch.float16, "cpu") if case.op == op)
    exact = kernels.exact_values(case, "forward+backward")
    runs = kernels.runs_of(case, "forward+backward")
    for value, wanted in zip(runs["reference"](), exact, strict=True):
        assert wanted.dtype == torch.float64
        # Gradients of the map are rounded to its fp16.
        assert (value.double() - wanted).abs().max() < 1e-3 * exact[1].abs().max().clamp(min=wanted.abs().max())
    case = case._replace(functions={name: case.functions[name] for name in ("textbook", "reference")})
    assert set(kernels.agreeing(case, "forward+backward", torch.float16)) == {"textbook", "reference"}


def test_where_the_textbook_does_not_fit_the_reference_is_the_measure(case, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("three matrices")

    functions = case.functions | {"textbook": too_large, "off": lambda *x: 1.001 * case.functions["reference"](*x)}
    wide = case.wide()
    wide = wide._replace(functions=wide.functions | {"textbook": too_large})
    case = case._replace(functions=functions, wide=lambda: wide)
    rows = kernels.rows_of(case, "forward", torch.float32, 2, measure.environment())
    assert [row["provider"] for row in rows] == ["reference"]
    assert math.isnan(rows[0]["speed_up"])
    said = capsys.readouterr().out
    assert "textbook does not run here: OutOfMemoryError: three matrices\n" in said
    assert "off is off by 1.0e-03 of the scale" in said


def test_every_operation_has_a_case():
    of_maps = list(cases.map_cases(2, "channels_first", torch.float32, "cpu"))
    assert [case.op for case in of_maps] == ["relation_scores", "batch_gram", "infosam_terms"]
    assert {"textbook", "textbook compiled", "reference", "triton"} <= set(of_maps[-1].functions)


def test_picture(case, tmp_path):
    rows = kernels.rows_of(case, "forward+backward", torch.float32, 2, measure.environment())
    kernels.draw(rows, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


# The GPU script, with steps that need none.


def python(name: str, code: str, seconds: float = 60, is_check: bool = False) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], seconds, is_check)


@pytest.mark.parametrize("is_check", [False, True])
def test_every_step_runs_whatever_became_of_the_others(is_check, tmp_path, capsys):
    endless = "import subprocess, sys, time; print('begun', flush=True); time.sleep(60)"
    environment = "import os; print(os.environ['PASSED'], 'passed')"
    steps = [
        python("good", environment)._replace(environment={"PASSED": "5"}),
        python("endless", endless, 5, is_check),
        gpu.Step("absent", ["no-such-program"], 5, True),
        python("last", "print('the end')"),
    ]
    assert gpu.run_all(steps, tmp_path / "out") is not is_check
    said = capsys.readouterr().out.splitlines()
    for line, words in zip(said, ["passed", "out of time", "not installed", "passed"], strict=True):
        assert words in line
    assert said[0].endswith("5 passed")
    assert said[1].endswith("KeyboardInterrupt")
    assert (tmp_path / "out" / "endless.log").read_text().startswith("begun")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"good.log", "endless.log", "last.log"}


def test_what_failed_fails_the_whole(tmp_path, capsys):
    assert not gpu.run_all([python("bad", "raise SystemExit('1 failed')"), python("good", "")], tmp_path)
    assert "failed" in capsys.readouterr().out.splitlines()[0]


def test_what_a_step_has_started_ends_with_it(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert gpu.run(python("parent", code, 2), tmp_path) == "out of time"
    time.sleep(4)
    assert not mark.exists()


def test_what_a_step_has_seen_by_the_end_of_its_time_is_kept(tmp_path):
    test = tmp_path / "test_slow.py"
    test.write_text("import time\n\ndef test_a():\n    assert 1 == 2\n\ndef test_b():\n    time.sleep(60)\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(tmp_path / "none.ini"),
        str(test),
    ]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    assert gpu.run(gpu.Step("tests", command, 3), tmp_path) == "out of time"
    assert "assert 1 == 2" in (tmp_path / "tests.log").read_text()


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = measure.environment()
    assert environment["commit"] == ""
    assert environment["dirty"] == ""


def test_a_machine_without_triton_is_described(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert measure.environment()["triton"] == ""


def test_steps_fit_in_eight_minutes(tmp_path):
    steps = gpu.steps(tmp_path)
    assert sum(step.seconds + gpu._SECONDS_TO_END for step in steps) <= 480
    for step in steps:
        if step.command[2] == "benchmarks.kernels":
            options = kernels.options_of(step.command[3:])
            assert options.device == "cuda"
            assert not options.batches or not options.samples


@pytest.mark.long
def test_the_tests_that_are_checked_for_faults_exist():
    selected = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", gpu.TESTS]
    found = subprocess.run([*selected, "-k", gpu.CHECKED], capture_output=True, text=True, check=True).stdout
    assert all(f"::{name}[" in found for name in ("test_scores_in_every_layout", "test_teacher_pass_in_every_layout"))
    assert "::test_the_loss_is_that_of_the_reference[" in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "gpu")])
    assert "a GPU must be there, got none that PyTorch sees" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_a_step_that_there_is_not_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "gpu"), "--only", "loss_4", "los"])
    assert "--only must name steps of ['steps', 'loss_64'" in capsys.readouterr().err


@pytest.mark.parametrize("module", [kernels, busy, gpu, teachers, grid, descent, many_samples, processes, accumulation])
def test_help_says_what_every_option_does(module, monkeypatch, capsys):
    words = ["run"] if module is grid else []
    said = help_of(segmentation if module is grid else module, monkeypatch, capsys, *words)
    for field in dataclasses.fields(module.Options):
        assert f"--{field.name.replace('_', '-')} " in said.replace(",", " ")


def test_a_busy_cpu_stands_beside_a_quiet_one(tmp_path, monkeypatch, capsys):
    for name, value in {"DIM": 8, "HEIGHT": 4, "WIDTH": 4}.items():
        monkeypatch.setattr(cases, name, value)
    beside: list[int] = []
    started = busy.busy_processes

    def counted(n: int) -> contextlib.AbstractContextManager[None]:
        beside.append(n)
        return started(n)

    monkeypatch.setattr(busy, "busy_processes", counted)
    out = tmp_path / "busy.csv"
    busy.main(["--out", str(out), "--batches", "2", "--layouts", "channels_last", "--threads", "1", "--trials", "1"])
    assert beside == [0, busy.cores()]
    assert capsys.readouterr().out.count("B 2 channels_last") == 4
    table = busy_table(measure.read_rows(out))
    assert "| textbook, quiet | textbook, busy | renyi_kd, quiet | renyi_kd, busy | renyi_kd, busy / quiet |" in table
    assert "| 2 | channels last |" in table


def test_a_batch_in_micro_batches(tmp_path, monkeypatch, capsys):
    hf_sam().save_pretrained(tmp_path / "sam")
    monkeypatch.setattr(accumulation, "MINI_SAM", tmp_path / "sam")
    monkeypatch.setattr(measure, "_calls_ms", lambda run, seconds, at_least: [run() or 1.0])
    out = tmp_path / "accumulation.csv"
    accumulation.main(["--out", str(out), "--counts", "2", "--image-size", "32", "--trials", "1"])
    assert capsys.readouterr().out.count("1 ms, 1.00, ") == 3
    table = accumulation_table(measure.read_rows(out))
    assert "| micro-batches | a loss each | all graphs in memory | Accumulation |" in table


def test_descents_are_written_drawn_and_printed(tmp_path, capsys):
    words = ["--samples", "2", "3", "--pixels", "8", "--steps", "20", "--points", "5"]
    descent.main(["--out", str(tmp_path / "new"), *words])
    said = capsys.readouterr().out
    table = measure.read_rows(tmp_path / "new/results/descent.csv")
    assert tuple(table.columns) == ("form", "start", "samples", *descent.State._fields)
    descents = table.groupby(["form", "start", "samples"])
    assert len(descents) == 4 * 3 * 2
    for (form, start, _), one in descents:
        steps = one["step"].astype(int).tolist()
        assert steps == sorted(set(steps))
        assert steps[0] == 0
        # One that begins where the form has its minimum has ended.
        assert steps[-1] == 0 if start == "teacher" and form != "mutual_information" else len(steps) == 5
    assert said.count("| jensen_renyi |") == 6
    assert (tmp_path / "new/assets/descent.png").read_bytes().startswith(b"\x89PNG")
    descent.main(["--out", str(tmp_path / "again"), *words])
    again = tmp_path / "again/results/descent.csv"
    assert again.read_bytes() == (tmp_path / "new/results/descent.csv").read_bytes()


def test_the_cost_of_many_samples_is_written_drawn_and_explained(tmp_path, monkeypatch, capsys):
    def found(n: int, d: int, processes: int) -> list[dict[str, dict[str, float]]]:
        """Return what processes take of which each pair costs 2 + d / 4 ns, and the last a little more memory."""
        seconds = 1e-9 * (2 + d / 4) * n**2 / processes
        return [
            {
                name: {"cpu_s": share * seconds, "wall_s": 1.0, "peak_mib": 8.0 + rank, "received_mib": n / 2}
                for name, share in (("forward", 0.25), ("forward+backward", 1.0))
            }
            for rank in range(processes)
        ]

    monkeypatch.setattr(many_samples, "run_processes", found)
    many_samples.main(["--out", str(tmp_path), "--samples", "8192", "16384", "--processes", "1", "2"])
    assert capsys.readouterr().out.count("n 16384 d 64 P 2 forward+backward: 2.42 s a process, 18 ns a pair, ") == 1
    rows = measure.read_rows(tmp_path / "results/many_samples.csv")
    assert len(rows) == 2 * 2 * (2 + 3)
    assert many_samples.pair_model(many_samples.newest(rows)) == pytest.approx((2, 0.25), rel=1e-3)
    table = many_samples_table(rows)
    assert "| 16,384 | 2 | 0.604 s | 2.42 s | 18.0 ns | 9 MiB | 8192.0 MiB |" in table
    assert "Forward + backward takes 2.0 + 0.250 d ns a pair." in table
    assert (tmp_path / "assets/many_samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_of_the_ring_says_what_it_took():
    (found,) = many_samples.run_processes(64, 4, 1)
    assert list(found) == ["forward", "forward+backward"]
    for numbers in found.values():
        assert numbers["cpu_s"] > 0
        assert numbers["received_mib"] == 0


def batch_of(n: int, images: int = 4) -> processes.Batch:
    return processes.Batch((images,) * n, (images,) * n, 256, 4096)


@pytest.mark.parametrize("n", [2, 3, 8, 48, 64])
def test_a_process_receives_its_own_share_of_maps(n):
    batch = batch_of(n)
    channel = batch.pixels * batch.element_bytes
    own = batch.images[0] * batch.channels * channel
    one_more = sum(batch.images) * channel if batch.channels % n else 0
    received = [processes.traffic(batch, rank, "channels")["maps"].received for rank in range(n)]
    assert max(received) <= own * (n - 1) / n + one_more
    # All that is sent is received.
    assert sum(received) == sum(processes.traffic(batch, rank, "channels")["maps"].sent for rank in range(n))
    assert processes.traffic(batch, 0, "whole maps")["maps"].received == (n - 1) * own


def run_without_processes(monkeypatch, *, wrong_by: int = 0) -> None:
    """Let the formula stand in for processes, in which everything else was tested."""

    def spawn(_: object, args: tuple[int, processes.Options, str], nprocs: int) -> None:
        n, options, folder = args
        assert n == nprocs
        batch = processes.Batch((options.images,) * n, (options.images,) * n, options.channels, options.side**2)
        for rank in range(n):
            rows = []
            for exchange in ("whole maps", "channels"):
                sent, received = processes.total(processes.traffic(batch, rank, exchange))
                of_numbers = {"sent_bytes": sent, "received_bytes": received + wrong_by}
                headers = {"header_sent_bytes": 9, "header_received_bytes": 9}
                of_messages = {"collectives": 5, "messages": 5 * (n - 1)}
                rows.append({"exchange": exchange, **of_messages, **of_numbers, **headers, "time_ratio": 2.0})
            torch.save(rows, f"{folder}/{rank}.pt")

    monkeypatch.setattr(processes.multiprocessing, "spawn", spawn)


def test_what_processes_exchange_is_written_drawn_and_printed(tmp_path, monkeypatch, capsys):
    run_without_processes(monkeypatch)
    processes.main(["--out", str(tmp_path), "--processes", "2", "3", "--channels", "7", "--side", "4"])
    assert "3 processes, channels: 0.0 MiB received" in capsys.readouterr().out
    written = measure.read_rows(tmp_path / "results/processes.csv")
    assert list(written.columns) == list(measure.read_rows(RESULTS / "processes.csv").columns)
    assert list(written["exchange"]) == ["whole maps", "channels"] * 2
    assert (tmp_path / "assets/processes.png").read_bytes().startswith(b"\x89PNG")
    table = processes_table(written)
    assert "| processes | whole maps | channels | of these maps |" in table
    assert [line.split(" | ")[0] for line in table.splitlines()[2:8]] == [f"| {n}" for n in (2, 3, 8, 16, 32, 64)]


def test_a_count_that_is_not_that_of_the_formula_is_not_written(tmp_path, monkeypatch, capsys):
    run_without_processes(monkeypatch, wrong_by=1)
    with pytest.raises(SystemExit):
        processes.main(["--out", str(tmp_path)])
    assert "error: benchmarks.processes: the count must be that of the formula, got" in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.long
def test_processes_exchange_what_the_formula_says(tmp_path):
    processes.main(["--out", str(tmp_path), "--processes", "2", "--channels", "7", "--side", "4", "--trials", "1"])
    assert len(measure.read_rows(tmp_path / "results/processes.csv")) == 2
