"""The benchmarks: what is wrong is not timed, rows are whole, the picture is drawn."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import kernels, measure


@pytest.fixture
def case():
    case = kernels.moment_case(48, torch.float32, "cpu")
    # Compiling takes a C++ compiler and a while.
    functions = {name: case.functions[name] for name in ("textbook", "reference", "triton")}
    return case._replace(functions=functions)


@pytest.mark.parametrize("which", ["forward", "forward+backward"])
def test_rows_say_what_was_measured_and_where(case, which, tmp_path):
    rows = kernels.rows_of(case, which, torch.float32, 2, measure.environment())
    assert [row["provider"] for row in rows] == ["textbook", "reference"]
    for row in rows:
        assert set(row) <= set(kernels.COLUMNS)
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert rows[0]["speed_up"] == 1
    measure.append_rows(tmp_path / "rows.csv", rows, kernels.COLUMNS)
    measure.append_rows(tmp_path / "rows.csv", rows, kernels.COLUMNS)
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["provider"] for row in csv.DictReader(file)] == ["textbook", "reference"] * 2


def test_what_is_wrong_or_fails_is_not_timed(case, capsys):
    def fails(*_):
        raise RuntimeError("no such device\nand more")

    functions = case.functions | {"off": lambda *x: 1.001 * case.functions["textbook"](*x), "fails": fails}
    runs = kernels.agreeing(kernels.runs_of(case._replace(functions=functions), "forward+backward"), torch.float32)
    assert set(runs) == {"textbook", "reference"}
    said = capsys.readouterr().out
    assert "off is off by 1.0e-03 of the scale and is not timed" in said
    assert "fails does not run here: RuntimeError: no such device\n" in said


def test_every_operation_has_a_case():
    of_maps = list(kernels.map_cases(2, "channels_first", torch.float32, "cpu"))
    assert [case.op for case in of_maps] == ["relation_scores", "batch_gram", "infosam_terms"]
    assert {"textbook", "textbook compiled", "reference", "triton"} <= set(of_maps[-1].functions)


def test_picture(case, tmp_path):
    rows = kernels.rows_of(case, "forward+backward", torch.float32, 2, measure.environment())
    kernels.draw(rows, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
