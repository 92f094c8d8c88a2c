"""The comparison of distillers: every method runs, rows are whole and resumable, and its statistics are right."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from benchmarks import measure, peft_methods
from benchmarks.sam.models import load_sam
from benchmarks.segmentation import __main__ as command
from benchmarks.segmentation import distillers, memory, models, plan, rows, table, training
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.grid import Grid
from benchmarks.segmentation.metrics import METRICS
from benchmarks.segmentation.options import Options
from benchmarks.segmentation.settings import ZERO_SHOT, Settings
from benchmarks.segmentation.shares import save_shares, shares_table
from benchmarks.segmentation.statistics import paired_difference
from tests.support.families import hf_sam2, hf_sam_hq

ROOT = Path(__file__).parent.parent
NUCLEI = ROOT / "examples/assets/nuclei"
# Eight patches a side: every part of the mini SAM runs, in little time.
SIZE = 64
SMALL = ("--image-size", str(SIZE), "--train-images", "4", "--test-images", "2", "--batch-size", "2", "--epochs", "1")
SMALL = (*SMALL, "--device", "cpu", "--amp", "off", "--workers", "0")


@pytest.fixture(scope="module")
def sam():
    return load_sam("mini", None, SIZE)


@pytest.fixture(scope="module")
def data():
    return tuple(MaskDataset(NUCLEI, split, size=SIZE, limit=4) for split in ("train", "test"))


def settings(**changes):
    common = {"model": "mini", "weights": "0", "data": "nuclei", "lists": "0", "image_size": SIZE, "seed": 0}
    return Settings(**{**common, "peft": "lora", "distiller": "none", "epochs": 1, "batch_size": 2, **changes})


def ready(sam, data, cache=None, **changes):
    train, test = data
    return training.Run(settings(**changes), sam, train, test, cache=cache, device=torch.device("cpu"))


def row(**changes):
    own = {name: changes.pop(name) for name in ("images", "metrics", "steps") if name in changes}
    images = own.pop("images", ["test/a", "test/b"])
    values = own.pop("metrics", {name: [0.25, 0.75] for name in METRICS})
    return rows.Row(
        settings=settings(**changes),
        images=images,
        metrics=values,
        history=[],
        steps=own.pop("steps", 2),
        training_seconds=4.0,
        evaluation_seconds=1.0,
        skipped=[],
        environment={"device": "a processor", "torch": "2", "commit": "abc"},
    )


# ---- statistics


def test_a_difference_that_is_always_the_same_is_certain():
    base = np.random.default_rng(0).random((3, 20))
    found = paired_difference(base + 0.125, base)
    assert (found.mean, found.low, found.high) == pytest.approx((0.125, 0.125, 0.125))
    assert (found.n_seeds, found.n_images) == (3, 20)


def test_interval_of_one_seed_is_that_of_the_t_test():
    from scipy import stats

    method, base = np.random.default_rng(1).random((2, 1, 30))
    test = stats.ttest_rel(method[0], base[0]).confidence_interval(0.95)
    found = paired_difference(method, base)
    assert (found.low, found.high) == pytest.approx((test.low, test.high))


def test_interval_by_hand():
    # Seeds differ by 2 from each other, images by 4, nothing else: mean squares 2 * 1 + 2 * 1, 2 * 4 + 2 * 4, 0.
    difference = np.array([[-3.0, 1.0], [-1.0, 3.0]])
    found = paired_difference(difference, np.zeros((2, 2)))
    variance, freedom = (4 + 16) / 4, (4 + 16) ** 2 / (4**2 + 16**2)
    from scipy import stats

    width = stats.t.ppf(0.975, freedom) * variance**0.5
    assert (found.low, found.high) == pytest.approx((-width, width))


@pytest.mark.parametrize("spread", [(1.0, 0.0, 0.2), (0.0, 1.0, 0.2), (0.5, 1.0, 1.0), (0.0, 0.0, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(spread):
    rng = np.random.default_rng(2)
    of_seed, of_image, of_error = spread
    held = 0
    for _ in range(400):
        effects = of_seed * rng.normal(size=(3, 1)) + of_image * rng.normal(size=40)
        difference = effects + of_error * rng.normal(size=(3, 40))
        found = paired_difference(difference, np.zeros((3, 40)))
        held += found.low <= 0 <= found.high
    # Three standard deviations of a share of 400 below 95 %.
    assert held / 400 > 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


def test_statistics_refuse_what_is_not_paired():
    with pytest.raises(ValueError, match=r"both must have one shape \[n_seeds, n_images\].*got \(1, 3\) and \(1, 2\)"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 2)))


# ---- settings, rows, order


def test_rows_come_back_as_they_were_written(tmp_path):
    written = row(distiller="infosam", lr=3e-4)
    path = rows.write(tmp_path, written)
    assert rows.read(tmp_path) == [written]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.name.startswith("nuclei-mini-lora-infosam-0-")
    rows.write(tmp_path, written)
    assert len(list(tmp_path.iterdir())) == 1
    assert rows.read(tmp_path / "nowhere") == []


def test_a_file_that_is_no_row_is_named(tmp_path):
    rows.write(tmp_path, row())
    (tmp_path / "half.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match=r"half\.json must be a finished run of this version.*move it out"):
        rows.read(tmp_path)
    (tmp_path / "half.json").write_text(json.dumps({"settings": {"model": "mini"}}))
    with pytest.raises(ValueError, match=r"half\.json must be a finished run"):
        rows.read(tmp_path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Settings)])
def test_runs_that_differ_in_anything_have_files_of_their_own(field):
    one = settings()
    value = getattr(one, field)
    other = dataclasses.replace(one, **{field: f"{value}x" if isinstance(value, str) else value + 1})
    assert one.file_name != other.file_name


def test_the_most_informative_runs_come_first():
    names = ("vid", "infosam_no_lr", "infosam_cauchy_schwarz", "infosam", "none")
    asked = [settings(distiller=name, seed=seed) for name in names for seed in range(2)]
    untrained = settings(peft=ZERO_SHOT)
    found = plan.most_informative_first([*asked, untrained])
    assert found[0] == untrained
    assert [(one.distiller, one.seed) for one in found[1:5]] == [
        ("infosam", 0),
        ("none", 0),
        ("infosam", 1),
        ("none", 1),
    ]
    assert [one.distiller for one in found[5::2]] == ["infosam_cauchy_schwarz", "infosam_no_lr", "vid"]


def test_a_plan_ends_before_the_first_run_that_does_not_fit():
    asked = [settings(seed=seed) for seed in range(4)]
    seconds = {0: 50.0, 1: 20.0, 2: 60.0, 3: 1.0}
    fitting = plan.fitting(asked, lambda one: seconds[one.seed], minutes=2)
    assert [(one.settings.seed, one.seconds) for one in fitting] == [(0, 50.0), (1, 20.0)]


def test_time_is_estimated_from_the_nearest_runs():
    # 4 s for 2 steps of 2 images, 1 s for 2 test images.
    done = [row(), dataclasses.replace(row(distiller="vid"), training_seconds=40.0)]
    assert plan.estimate(settings(seed=1), 10, 4, done, "a processor") == pytest.approx(10 * 2 + 4 * 0.5)
    assert plan.estimate(settings(distiller="vid"), 10, 4, done, "a processor") == pytest.approx(10 * 20 + 2)
    assert plan.estimate(settings(distiller="pkd"), 10, 4, done, "a processor") == pytest.approx(10 * 11 + 2)
    assert plan.estimate(settings(peft=ZERO_SHOT), 0, 4, done, "a processor") == pytest.approx(2)
    assert plan.estimate(settings(), 10, 4, done, "another") is None
    assert plan.estimate(settings(image_size=128), 10, 4, done, "a processor") is None


# ---- tables


def two_distillers(seeds=(0, 1)):
    for seed in seeds:
        for index, name in enumerate(("none", "infosam")):
            values = {metric: [0.2 + 0.1 * index + 0.02 * seed, 0.6 + 0.1 * index + 0.02 * seed] for metric in METRICS}
            yield row(distiller=name, seed=seed, metrics=values)


def test_table_of_means():
    untrained = row(peft=ZERO_SHOT, epochs=10)
    ((title, found),) = table.tables([untrained, *two_distillers()])
    lines = found.means(["iou"]).splitlines()
    assert lines[0] == "| PEFT | distiller | nuclei IoU |"
    assert lines[2:] == ["| zero-shot |  | 50.0 |", "| lora | none | 41.0 ± 1.4 |", "| lora | infosam | 51.0 ± 1.4 |"]
    assert "mini at 64 pixels" in title
    assert "nuclei 1" in title
    assert "a processor, torch 2, commit abc" in title


def test_table_of_differences():
    ((_, found),) = table.tables(list(two_distillers()))
    assert found.differences("dice").splitlines()[2:] == ["| lora | infosam | +10.00 [+10.00, +10.00], 2 seeds |"]


def test_only_seeds_and_images_that_both_have_are_compared():
    base, method = two_distillers(seeds=(0,))
    # Of .2, .6 without and .3, .7 with InfoSAM.
    assert (base.metrics["dice"], method.metrics["dice"]) == ([0.2, 0.6], pytest.approx([0.3, 0.7]))
    base = dataclasses.replace(base, images=["a", "b", "c"], metrics={"dice": [0.2, 0.6, 0.5]})
    method = dataclasses.replace(method, images=["b", "a", "d"], metrics={"dice": [0.3, 0.7, 0.9]})
    lonely = dataclasses.replace(method, settings=settings(distiller="infosam", seed=5))
    ((_, found),) = table.tables([base, method, lonely])
    # b: .3 - .6, a: .7 - .2.
    assert found.differences("dice").splitlines()[2].startswith("| lora | infosam | +10.00 [")
    assert found.differences("dice").splitlines()[2].endswith(", one seed |")
    ((_, found),) = table.tables([base, lonely])
    assert found.differences("dice").splitlines()[2:] == ["| lora | infosam |  |"]


def test_columns_of_one_data_set_stay_apart():
    ((_, found),) = table.tables([row(), row(epochs=3)])
    assert found.means(["iou"]).splitlines()[0] == "| PEFT | distiller | nuclei IoU | nuclei IoU |"
    assert found.differences("iou").splitlines()[0] == "| PEFT | IoU less that of none | nuclei | nuclei |"


def test_recipes_are_never_mixed():
    titles = [title for title, _ in table.tables([row(), row(lr=1e-3), row(train_images=8), row(data="other")])]
    assert len(titles) == 3


# ---- memory


def test_what_a_forward_keeps_is_counted_once_and_without_the_weights():
    layer = torch.nn.Linear(16, 16)
    x = torch.randn(8, 16, requires_grad=True)
    # Saved: the input for the weight's gradient, and the output of tanh.
    assert memory.kept_bytes(lambda: layer(x).tanh().sum(), layer) == 2 * 8 * 16 * 4


def test_a_step_that_will_not_fit_is_refused_before_it_runs(monkeypatch):
    layer = torch.nn.Linear(16, 16)
    x = torch.randn(8, 16, requires_grad=True)
    arguments = layer, lambda: layer(x).tanh().sum(), 4, torch.device("cpu")
    needed = 1.3 * 4 * 1024 + 3 * 4 * (256 + 16)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(needed) + 1)
    memory.check_fits(*arguments)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(needed) - 1)
    with pytest.raises(MemoryError, match=r"a step of 4 images must fit in memory, got .* lower --batch-size"):
        memory.check_fits(*arguments)


def test_free_memory_of_this_machine():
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < 2**50


# ---- models and runs


def test_stages_are_maps_of_each_quarter(sam):
    watched = models.Watched(sam.model, sam, with_layers=True)
    item = torch.utils.data.default_collate([MaskDataset(NUCLEI, "test", size=SIZE, limit=1)[0]])
    seen = watched.observe(training.with_prompt(item, "box"))
    side = SIZE // 8
    assert [tuple(layer.shape) for layer in seen.layers] == [(1, 128, side, side)] * 4
    watched.close()
    expected = sam.model.vision_encoder.layers[-1].register_forward_hook(lambda m, a, o: kept.append(o))
    kept = []
    sam.segment(sam.model, training.with_prompt(item, "box"))
    expected.remove()
    last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    torch.testing.assert_close(seen.layers[-1], last.detach().permute(0, 3, 1, 2))


@pytest.mark.parametrize("make", [hf_sam_hq, hf_sam2])
def test_other_sams_of_transformers_are_found_by_their_folder(tmp_path, make):
    make().save_pretrained(tmp_path / "model")
    other = load_sam(str(tmp_path / "model"), None, None)
    pairs = [MaskDataset(NUCLEI, split, size=other.image_size, limit=2) for split in ("train", "test")]
    run = ready(other, pairs, tmp_path / "cache", peft="decoder", distiller="infosam", image_size=other.image_size)
    # Their decoders want more of the encoder than its last map.
    assert not run.frozen
    assert run().steps == 1


def test_as_map_knows_the_three_layouts():
    maps = torch.randn(2, 5, 4, 4)
    for layout in (maps, maps.permute(0, 2, 3, 1), maps.flatten(2).mT):
        torch.testing.assert_close(models.as_map(layout), maps)


@pytest.mark.parametrize("peft", peft_methods.METHODS)
def test_every_peft_method_trains_with_infosam(sam, data, tmp_path, peft):
    run = ready(sam, data, tmp_path / "cache", peft=peft, distiller="infosam")
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    done = run()
    assert done.steps == 2
    assert all(0 <= value <= 1 for values in done.metrics.values() for value in values)
    changed = [not torch.equal(*pair) for pair in zip(before, run.model.parameters(), strict=True)]
    assert any(changed)
    trained = [parameter.requires_grad for parameter in run.model.parameters()]
    assert not any(c and not t for c, t in zip(changed, trained, strict=True))
    assert {"task", "distilled", "compression", "teacher_similarity"} <= done.history[0].keys()
    assert not sam.model.mask_decoder._forward_pre_hooks


@pytest.mark.parametrize("distiller", distillers.DISTILLERS)
def test_every_distiller_trains_with_lora(sam, data, tmp_path, distiller):
    run = ready(sam, data, tmp_path / "cache", distiller=distiller)
    own = [parameter.detach().clone() for parameter in run.distiller.parameters()]
    done = run()
    assert np.isfinite([value for one in done.history for value in one.values()]).all()
    assert (done.history[0]["distilled"] != 0) == (distiller != "none")
    # The form of pairs has its relation module as it was initialised.
    trains = bool(own) and "jensen_renyi" not in distiller
    assert trains == any(not torch.equal(*pair) for pair in zip(own, run.distiller.parameters(), strict=True))


def test_shares_of_a_run_are_rows_and_a_table(sam, data, tmp_path):
    path = tmp_path / "shares.csv"
    save_shares(ready(sam, data, tmp_path / "cache", distiller="infosam_share"), path)
    found = measure.read_rows(path)
    assert found["step"].tolist() == ["1", "2"]
    assert found["weight"].astype(float).tolist() == pytest.approx([2**-10, 2**-9], rel=1e-3)
    assert found["mask_tokens_share"].astype(float).between(1e-6, 1e6).all()
    assert list(shares_table(found, steps=(1, 2)).columns) == ["step 1", "step 2", "mean of 2 to 2"]
    with pytest.raises(TypeError, match="save_shares: the distiller must be a form of InfoSAM, got vid"):
        save_shares(ready(sam, data, tmp_path / "cache", distiller="vid"), path)


def test_runs_of_one_seed_begin_alike_and_see_the_same_batches(sam, data, tmp_path):
    seen = {}
    for name in ("none", "infosam", "vid"):
        run = ready(sam, data, tmp_path / "cache", distiller=name, lr=1e-12)
        first = run.losses

        def losses(batch, name=name, first=first):
            found = first(batch)
            seen.setdefault(name, []).append((batch["sample_id"], found[0].item()))
            return found

        run.losses = losses
        run()
    assert seen["none"] == seen["infosam"] == seen["vid"]
    assert len({tuple(ids) for ids, _ in seen["none"]}) == 2


def test_a_frozen_encoder_is_not_run_again_and_gives_the_same_losses(sam, data, tmp_path):
    frozen = ready(sam, data, tmp_path / "cache", peft="decoder", distiller="infosam")
    assert frozen.frozen
    batch = training.with_prompt(next(iter(frozen.loader)), "box")
    expected = frozen.losses(batch)
    calls = []
    hook = sam.model.vision_encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    own = frozen.model.vision_encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    # As the cache keeps fp16, and the models here are small.
    for one, other in zip(frozen.losses(batch), expected, strict=True):
        torch.testing.assert_close(one, other)
    frozen.frozen = False
    for one, other in zip(frozen.losses(batch), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    hook.remove()
    own.remove()
    frozen.close()
    assert calls == [1]


def test_box_or_point_at_even_odds_the_same_for_every_method():
    batch = {"input_boxes": 1, "input_points": 2, "input_labels": 3}
    kinds = ["input_boxes" in training.with_one_prompt(batch, settings(), step) for step in range(200)]
    assert 70 < sum(kinds) < 130
    other = ["input_boxes" in training.with_one_prompt(batch, settings(distiller="vid"), step) for step in range(200)]
    assert kinds == other
    assert all("input_boxes" not in training.with_one_prompt(batch, settings(prompt="points"), i) for i in range(9))


def test_losses_that_are_not_finite_stop_the_run(sam, data):
    with pytest.raises(RuntimeError, match=r"lora, none, seed 0: the losses must be finite.*lower --lr"):
        ready(sam, data, lr=1e30)()


# ---- the command


def run_command(*words):
    return command.main([str(word) for word in words])


def test_run_table_plan_and_run_again(tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--data", NUCLEI, "--out", out, "--seeds", 1, *SMALL)
    assert run_command("plan", *options, "--save-weights") == 0
    said = capsys.readouterr()
    assert "three steps are made" in said.err
    assert not (out / "weights").exists()
    assert "nuclei, zero_shot" in said.out
    assert "3 runs\n" in said.out
    assert not list(out.glob("*.json"))

    assert run_command("run", *options) == 0
    names = sorted(path.name for path in out.glob("*.json"))
    assert [name.rpartition("-")[0] for name in names] == [
        "nuclei-mini-lora-infosam-0", "nuclei-mini-lora-none-0", "nuclei-mini-zero_shot-none-0"
    ]  # fmt: skip
    times = [path.stat().st_mtime_ns for path in sorted(out.glob("*.json"))]
    capsys.readouterr()
    assert run_command("run", *options) == 0
    assert "3 of 3 runs were done before" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.json"))] == times

    assert run_command("table", "--out", out, "--metric", "dice") == 0
    said = capsys.readouterr().out
    assert "| zero-shot |  |" in said
    assert "Dice less that of none" in said
    assert run_command("plan", *options, "--minutes", 1) == 0
    assert "all runs are done" in capsys.readouterr().out


def test_a_time_limit_ends_before_the_run_that_would_pass_it(tmp_path, capsys):
    options = ("--data", NUCLEI, "--out", tmp_path, "--seeds", 2, *SMALL)
    rows.write(tmp_path, dataclasses.replace(Grid(options_of(*options)).runs and row(), environment={
        "device": training.measure.environment()["device"]}, settings=settings(seed=9)))  # fmt: skip
    assert run_command("run", *options, "--minutes", 1e-4) == 0
    assert "left for another time" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.json"))) == 1


def options_of(*words):
    return tyro.cli(Options, args=[str(word) for word in words])


def test_a_kill_loses_no_finished_run_and_leaves_no_half(tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "benchmarks.segmentation", "run", "--data", str(NUCLEI), "--out", str(out)]
    with subprocess.Popen([*words, *SMALL], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        seen = b""
        while b"infosam, seed 0: IoU" not in seen:
            piece = process.stdout.read1()
            assert piece, seen.decode()
            seen += piece
        process.send_signal(signal.SIGKILL)
    done = {one.settings.file_name for one in rows.read(out)}
    assert len(done) >= 2
    assert {path.name for path in out.iterdir() if path.is_file()} >= done
    ready = Grid(options_of("--data", NUCLEI, "--out", out, *SMALL))
    assert {one.file_name for one in ready.runs} >= done
    assert len(ready.todo()) == len(ready.runs) - len(done)


def test_pictures_of_relations(tmp_path):
    assert run_command("relations", "--data", NUCLEI, "--out", tmp_path, *SMALL) == 0
    for role in ("teacher", "student"):
        assert (tmp_path / f"relations_{role}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", 0), "--batch-size must be above 0, got 0"),
        (("--batch-size", 8), r"train.csv must list at least a batch of usable images, got 4 for --batch-size 8"),
        (("--lr", "nan"), "--lr must be a finite number above 0, got nan"),
        (("--train-images", -1), "--train-images must not be negative, got -1"),
        (("--minutes", 0), "--minutes must be above 0, got 0"),
        (("--image-size", 33), "--image-size must be a multiple of 8 px, got 33"),
        (("--model", "mobile_sam"), "--weights must name a safetensors file"),
        (("--data", "nowhere"), "nowhere: --data must be a folder with images/"),
        (("--data", NUCLEI, NUCLEI), "--data must name folders of different names"),
        (("--data",), "--data must name folders of different names, got none"),
        (("--peft",), "--peft must name at least one, got none"),
        (("--device", "abacus"), "abacus"),
        (("--distiller", "pkt", "--batch-size", 1), "pkt"),
    ],
)
def test_bad_options_end_with_a_sentence(tmp_path, capsys, words, said):
    import re

    assert run_command("run", "--data", NUCLEI, "--out", tmp_path, *SMALL, *words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_runs_that_cannot_be_done_are_skipped_if_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    options = ("--data", NUCLEI, "--out", tmp_path, "--seeds", 1, *SMALL)
    assert run_command("run", *options, "--on-bad", "stop") == 2
    assert "must fit in memory" in capsys.readouterr().err
    assert len(rows.read(tmp_path)) == 1
    assert run_command("run", *options, "--on-bad", "skip") == 1
    assert capsys.readouterr().err.count("skipped: a step of 2 images must fit in memory") == 2
