"""What is concluded from finished runs: best rates, differences, WiSE-FT's curve, gates, and their statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.segmentation import __main__ as command
from benchmarks.segmentation import evidence, experiment, rows
from benchmarks.segmentation.experiment import Candidate, best_at_equal
from benchmarks.segmentation.metrics import METRICS
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.statistics import detectable_deviations, holm, paired_difference

IMAGES = {"polyps/box": 3, "polyps/points": 3, "polyps jpeg/box": 3, "polyps validation/box": 2, "hospital/box": 3}
IMAGES |= {"roads/points": 4, "cells instances/box": 2, "cells instances/points": 2}
PLAIN = Candidate("none")


def settings(**changes):
    common = {"model": "mini", "weights": "0", "data": "polyps", "lists": "0", "image_size": 64, "seed": 0}
    recipe = {"peft": "lora", "distiller": "none", "train_images": 4, "epochs": 0, "steps": 400, "draw_images": True}
    return Settings(**{**common, **recipe, **changes})


def row(values, **changes):
    """Return a run of which every image of a test has one score: by state, then by the test's name."""
    also = {}
    for test, count in IMAGES.items():
        own = {state: (scores.get(test, scores[""])) for state, scores in values.items()}
        images = [f"{test} {index}" for index in range(count)]
        # Images of a test differ, by 0 in the mean.
        spread = np.linspace(-0.05, 0.05, count)
        iou = {state: list(score + spread) for state, score in own.items()}
        # As runs do it: corrupted copies are not looked at along the run.
        also[test] = {"images": images, "iou": {s: v for s, v in iou.items() if "jpeg" not in test or s[0] != "0"}}
    return rows.Row(
        settings=settings(**changes),
        images=["a"],
        metrics={name: [0.5] for name in METRICS},
        history=[{"epoch": part, "gradient_share": 0.1 * part} for part in (1, 2, 3) if changes.get("share")],
        steps=400,
        training_seconds=4.0,
        evaluation_seconds=1.0,
        skipped=[],
        environment={"device": "a processor", "torch": "2", "commit": "abc"},
        also=also,
    )


def of_one_setting():
    """Return runs whose plain fine-tuning is best at 1e-4 on the validation images, and at 1e-3 on the test images."""
    made = [row({"last": {"": 0.6, "polyps/box": 0.5}}, peft=ZERO_SHOT)]
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        for lr, validation, in_domain in ((1e-4, 0.8, 0.7), (1e-3, 0.6, 0.9)):
            last = {"": 0.5 + noise, "polyps/box": in_domain + noise, "polyps validation/box": validation}
            half = {"": 0.58, "polyps/box": in_domain - 0.1 + noise, "polyps validation/box": validation + 0.1}
            early = {"": 0.56, "polyps/box": in_domain + 0.02 + noise, "polyps validation/box": validation - 0.1}
            states = {"0.5": half, "0.75": early, "wise 0.5": half, "last": last}
            made.append(row(states, seed=seed, lr=lr))
            other = {name: value + 0.04 if name == "" else value for name, value in last.items()}
            made.append(row({"last": other}, seed=seed, lr=lr, distiller="infosam_jensen_renyi", share=0.1))
    return made


@pytest.fixture
def found():
    (one,) = experiment.experiments(of_one_setting(), transfer=("hospital",))
    return one


# ---- statistics


@pytest.mark.parametrize(("n_seeds", "deviations"), [(3, 3.26), (5, 1.68), (10, 1.00)])
def test_what_so_many_seeds_show(n_seeds, deviations):
    assert detectable_deviations(n_seeds) == pytest.approx(deviations, abs=0.005)


def test_an_effect_of_the_detectable_size_is_shown_four_times_in_five():
    rng = np.random.default_rng(0)
    differences = rng.normal(detectable_deviations(5), 1, (4000, 5))
    shown = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=3 * (0.8 * 0.2 / 4000) ** 0.5)


def test_a_paired_difference_has_the_p_value_of_its_interval():
    method, base = np.random.default_rng(1).random((2, 5, 1))
    found = paired_difference(method, base)
    test = stats.ttest_rel(method[:, 0], base[:, 0])
    assert found.p == pytest.approx(test.pvalue)
    assert found.detectable == pytest.approx(detectable_deviations(5) * (method - base).std(ddof=1))
    # At the level at which an interval ends in zero.
    edge = paired_difference(method, base, confidence=1 - found.p)
    assert min(abs(edge.low), abs(edge.high)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(paired_difference(method[:1].T.reshape(1, 1).repeat(3, 1), np.zeros((1, 3))).detectable)
    assert paired_difference(np.ones((2, 2)), np.ones((2, 2))).p == 1
    assert paired_difference(np.ones((2, 2)), np.zeros((2, 2))).p == 0


def test_p_values_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("in_domain", "expected"),
    [
        (0.2, (1, 0.0)),  # Anywhere on the curve: its best point.
        (0.6, (1, 0.0)),
        (0.7, (1, 0.5)),  # Half-way from (.6, .9) to (.8, .5).
        (0.85, (2, 0.5)),
        (0.95, (3, 0.0)),  # Nowhere: where it is best in the domain.
    ],
)
def test_the_curve_counts_where_it_has_as_much_in_the_domain(in_domain, expected):
    place, part = best_at_equal([(0.5, 0.8), (0.6, 0.9), (0.8, 0.5), (0.9, 0.1)], in_domain)
    assert (place, part) == (expected[0], pytest.approx(expected[1]))


def test_a_curve_that_turns_back_counts_at_its_better_branch():
    assert best_at_equal([(0.5, 0.8), (0.9, 0.7), (0.6, 0.1)], 0.7) == (0, pytest.approx(0.5))


# ---- one setting


def test_endpoints_are_by_box_and_by_points_where_there_is_no_box(found):
    assert found.groups == {
        "in-domain": ["polyps/box"],
        "transfer": ["hospital/box"],
        "retention": ["cells instances/box", "roads/points"],
        "corruption": ["polyps jpeg/box"],
        "in-domain, points": ["polyps/points"],
        "retention, points": ["cells instances/points"],
    }


def test_the_best_rate_is_that_of_the_validation_images(found):
    assert found.rates(PLAIN) == [1e-4, 1e-3]
    assert found.best_rate(PLAIN) == 1e-4
    assert found.seeds(PLAIN, "in-domain").tolist() == pytest.approx([0.69, 0.7, 0.71])
    assert found.seeds(PLAIN, "in-domain", 1e-3).mean() == pytest.approx(0.9)


def test_without_validation_images_no_rate_is_chosen():
    made = of_one_setting()
    for one in made:
        one.also.pop("polyps validation/box")
    (found,) = experiment.experiments(made)
    assert found.best_rate(PLAIN) is None
    assert evidence.means_table(found).count("\n") == 2
    assert "no rate can be chosen" in evidence.report([found])


def test_early_stop_is_the_state_of_the_best_validation(found):
    stopped = Candidate("none", "early stop")
    assert stopped in found.candidates()
    assert found.seeds(stopped, "in-domain").mean() == pytest.approx(0.6)
    assert Candidate("infosam_jensen_renyi at 0.1", "early stop") not in found.candidates()


def test_what_a_state_is_not_tested_on_stays_empty(found):
    stopped = Candidate("none", "early stop")
    assert found.values(stopped, "corruption").empty
    cells = {line.split(" | ")[0]: line.split(" | ") for line in evidence.means_table(found).splitlines()}
    assert cells["| none, early stop"][6] == ""
    assert cells["| none, wise 0.5"][6] == "58.0 ± 0.0"
    assert evidence.differences_table(found).count("nan") == 0


def test_a_method_is_compared_with_the_curve_at_its_own_in_domain_value(found):
    method = Candidate("infosam_jensen_renyi at 0.1")
    # As good as the plain model in the domain: the end of the curve, .5 + noise; the method has .04 more.
    bar = found.curve_values(method, "retention")
    assert bar["all"].tolist() == pytest.approx([0.49, 0.5, 0.51])
    images = found.curve_values(method, "transfer")
    assert images.shape == (3, 3)
    assert (found.values(method, "transfer") - images).to_numpy() == pytest.approx(np.full((3, 3), 0.04))
    table = evidence.curve_table(found, forms=["infosam_jensen_renyi at 0.1"])
    line = next(line for line in table.splitlines() if line.startswith("| infosam_jensen_renyi at 0.1 |"))
    assert line.count("+4.00 [+4.00, +4.00], 3 seeds, shows 0.00, p 0.000") == 4
    assert "| none, wise 0.5 |" not in table


def test_tables_of_one_setting(found):
    means = evidence.means_table(found).splitlines()
    assert means[2] == "| zero-shot |  |  | 50.0 | 60.0 | 60.0 | 60.0 | 60.0 | 60.0 | 55.0, 54.5 |"
    assert means[3].startswith("| none | 0.0001 |  | 70.0 ± 1.0 | 50.0 ± 1.0 | 50.0 ± 1.0 |")
    differences = evidence.differences_table(found).splitlines()
    assert differences[-1].startswith(
        "| infosam_jensen_renyi at 0.1 | +0.00 [+0.00, +0.00], 3 seeds, shows 0.00 | +4.00"
    )
    rates = evidence.rates_table(found).splitlines()
    head = [cell.strip() for cell in rates[0].split("|")]
    plain = [cell.strip() for cell in rates[2].split("|")]
    assert dict(zip(head, plain, strict=True))["in-domain at 0.001"] == "90.0"
    assert dict(zip(head, plain, strict=True))["in-domain, mean"] == "80.0"
    assert dict(zip(head, plain, strict=True))["in-domain, worst"] == "70.0"


def test_gates_are_passed_by_what_is_lost(found):
    line = evidence.gates_table([found]).splitlines()[2]
    assert line.startswith("| polyps | lora | 4 | 0.0001 | +20.00 [")
    assert "-10.00 [" in line
    assert "| -2.00 (0.75) | transfer, retention, overfitting |" in line
    kept = [one for one in of_one_setting() if one.settings.peft == ZERO_SHOT or one.settings.lr == 1e-4]
    for one in kept:
        for result in one.also.values():
            result["iou"] = {state: [0.6] * len(values) for state, values in result["iou"].items()}
    (nothing,) = experiment.experiments(kept)
    assert evidence.gates_table([nothing]).splitlines()[2].endswith("| nothing |")


def test_settings_are_never_mixed():
    others = [row({"last": {"": 0.5}}, train_images=16), row({"last": {"": 0.5}}, peft="adapter")]
    titles = [one.title for one in experiment.experiments([*of_one_setting(), *others])]
    assert titles == [
        "mini at 64 pixels, lora, polyps: 4 images drawn by the seed, 400 steps of 4, autocast off",
        "mini at 64 pixels, lora, polyps: 16 images drawn by the seed, 400 steps of 4, autocast off",
        "mini at 64 pixels, adapter, polyps: 4 images drawn by the seed, 400 steps of 4, autocast off",
    ]


def test_the_command_reports_what_was_written(tmp_path, capsys):
    for one in of_one_setting():
        rows.write(tmp_path, one)
    assert command.main(["evidence", "--out", str(tmp_path), "--transfer", "hospital"]) == 0
    said = capsys.readouterr().out
    assert "| infosam_jensen_renyi at 0.1 | 0.0001 | 0.2 | 70.0" in said
    assert command.main(["table", "--out", str(tmp_path)]) == 0
    assert "4 training and all test images of each set, drawn by the seed" in capsys.readouterr().out
    assert command.main(["evidence", "--out", str(tmp_path / "none")]) == 2
    assert "must hold runs with other tests, got none" in capsys.readouterr().err
