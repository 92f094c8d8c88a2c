"""Folders, tables and results of the benchmarks, damaged or unusual: right data, or an error that names the file."""

from __future__ import annotations

import functools
import io
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import measure
from benchmarks.files import whole_file
from benchmarks.sam.data import decoded, listed_paths
from benchmarks.segmentation import rows
from benchmarks.segmentation.corruptions import CORRUPTIONS, CorruptedDataset
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.few_shot import drawn_pairs
from benchmarks.segmentation.instances import InstanceDataset
from benchmarks.segmentation.settings import Settings
from tests.support.images import ring, write_folder, write_list, write_pair

ROOT = Path(__file__).parent.parent
SIZE = 16


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


# lists

PLAIN = "image,label\nimages/train0.png,masks/train0.png\nimages/train1.png,masks/train1.png\n"
SAME = {
    "as it is": PLAIN.encode(),
    "byte order mark": PLAIN.encode("utf-8-sig"),
    "lines of Windows": PLAIN.replace("\n", "\r\n").encode(),
    "lines of old": PLAIN.replace("\n", "\r").encode(),
    "no last line end": PLAIN.rstrip().encode(),
    "empty lines": PLAIN.replace("\n", "\n\n\n").encode(),
    "quotes": PLAIN.replace("images/train0.png", '"images/train0.png"').encode(),
    "columns turned": b"label,image\nmasks/train0.png,images/train0.png\nmasks/train1.png,images/train1.png\n",
    "more columns": PLAIN.replace("label\n", "label,note\n").replace("0.png\n", "0.png,a\n").encode(),
    "around": PLAIN.replace("images/train0", "masks/../images/./train0").encode(),
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_a_list_in_another_form_is_the_same_list(folder, text):
    (folder / "train.csv").write_bytes(PLAIN.encode())
    expected = [path.resolve() for pair in listed_paths(folder, "train") for path in pair]
    (folder / "train.csv").write_bytes(text)
    assert [path.resolve() for pair in listed_paths(folder, "train") for path in pair] == expected
    assert len(MaskDataset(folder, "train", size=SIZE)) == 2
    assert sorted(drawn_pairs(folder, 0)) == sorted(listed_paths(folder, "train"))


def test_paths_may_be_absolute_and_images_listed_twice(folder):
    path = folder / "images/train0.png"
    (folder / "train.csv").write_text(f"image,label\n{path},masks/train0.png\n{path},masks/train0.png\n")
    images = MaskDataset(folder, "train", size=SIZE)
    assert images.sample_ids == ["images/train0.png"] * 2


WRONG = {
    "two bytes a letter": (PLAIN.encode("utf-16"), r"must be a table in UTF-8, got 'utf-8' codec can't decode"),
    "latin-1": (PLAIN.replace("train1", "träin1").encode("latin-1"), "must be a table in UTF-8, got 'utf-8' codec"),
    "zeros": (PLAIN.encode() + b"\0", r"must (be a table|name an image and a label)"),
    "semicolons": (PLAIN.replace(",", ";").encode(), r"must have the columns image and label, got image;label"),
    "tabs": (PLAIN.replace(",", "\t").encode(), r"must have the columns image and label, got image\tlabel"),
    "a comma in a path": (
        PLAIN.replace("train1.png,", "tr,ain1.png,").encode(),
        "as many cells as columns in every ro",
    ),
    "an open quote": (PLAIN.replace("images/train1", '"images/train1').encode(), "must be a table in UTF-8, got unexp"),
    "other columns": (
        PLAIN.replace("label", "mask").encode(),
        "must have the columns image and label, got image, mask",
    ),
    "capitals": (
        PLAIN.replace("image,label", "Image,Label").encode(),
        "must have the columns image and label, got Ima",
    ),
    "no header": (PLAIN[12:].encode(), "must have the columns image and label, got images/train0.png"),
    "a cell missing": (PLAIN.replace(",masks/train1.png", "").encode(), "must name an image and a label in every row"),
    "an empty cell": (PLAIN.replace("masks/train1.png", "").encode(), "must name an image and a label in every row"),
    "a directory": (PLAIN.replace("images/train1.png", "images").encode(), "images: listed in train.csv but missing"),
    "blanks": (
        PLAIN.replace(",masks/train1", ", masks/train1").encode(),
        " masks/train1.png: listed in train.csv but m",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_list_that_cannot_be_read_is_named_with_the_reason(folder, text, message):
    (folder / "train.csv").write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        MaskDataset(folder, "train", size=SIZE)
    assert str(folder) in str(caught.value)


# pictures


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8).repeat(2, 0).repeat(2, 1))


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    return Image.merge("RGBA", [*image.split(), Image.new("L", image.size, alpha)])


SAVED: dict[str, tuple[str, Callable[[Image.Image], Image.Image], dict]] = {
    "png": ("png", lambda x: x, {}),
    "opaque": ("png", lambda x: with_alpha(x, 255), {}),
    "tiff": ("tif", lambda x: x, {}),
    "interlaced": ("gif", lambda x: x.quantize(256), {"interlace": 1}),
    "bmp": ("bmp", lambda x: x, {}),
    "webp": ("webp", lambda x: x, {"lossless": True}),
    "jpeg": ("jpg", lambda x: x, {"quality": 95}),
    "inks": ("jpg", lambda x: x.convert("CMYK"), {"quality": 95}),
    "grey": ("png", lambda x: x.convert("L"), {}),
    "grey, opaque": ("png", lambda x: x.convert("LA"), {}),
    "palette": ("png", lambda x: x.quantize(64), {}),
    "two values": ("png", lambda x: x.convert("1"), {}),
    "Lab": ("tif", lambda x: Image.merge("LAB", x.split()), {}),
}


@pytest.mark.parametrize(("suffix", "change", "how"), SAVED.values(), ids=SAVED)
def test_every_kind_of_picture_is_read_as_pillow_shows_it(folder, suffix, change, how):
    image = change(picture())
    image.save(folder / f"images/a.{suffix}", **how)
    (folder / "test.csv").write_text(f"image,label\nimages/a.{suffix},masks/test0.png\n")
    with Image.open(folder / f"images/a.{suffix}") as again:
        shown = np.asarray(again.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decoded(folder / f"images/a.{suffix}", "RGB")), shown)
    images = MaskDataset(folder, "test", size=48)
    assert images[0]["pixel_values"].isfinite().all()
    for corruption in CORRUPTIONS:
        assert CorruptedDataset(images, corruption)[0]["pixel_values"].isfinite().all()


def moving(path: Path, **how: object) -> None:
    picture().save(path, save_all=True, append_images=[picture().rotate(180)], **how)


DEEP = (np.arange(40 * 48, dtype=np.uint16) * 30).reshape(40, 48)
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "sixteen bits": ("png", lambda path: Image.fromarray(DEEP).save(path), r"mode I;16, whose values above 255 would"),
    "whole numbers": ("tif", lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path), "mode I, whose values"),
    "fractions": ("tif", lambda path: Image.fromarray(DEEP.astype(np.float32)).save(path), "mode F, whose values"),
    "transparent": ("png", lambda path: with_alpha(picture(), 254).save(path), "transparent pixels in mode RGBA"),
    "hidden": ("webp", lambda path: with_alpha(picture(), 0).save(path), "transparent pixels in mode RGBA"),
    "a transparent colour": (
        "png",
        lambda path: picture().quantize(8).save(path, transparency=0),
        "transparent pixels in mode P",
    ),
    "moving": ("gif", moving, "2 pictures"),
    "moving png": ("png", moving, "2 pictures"),
    "pages": ("tif", moving, "2 pictures"),
}


@pytest.mark.parametrize("place", ["images", "masks"])
@pytest.mark.parametrize(("suffix", "save", "fact"), REFUSED.values(), ids=REFUSED)
def test_what_a_conversion_would_lose_is_refused(folder, suffix, save, fact, place):
    save(folder / f"{place}/a.{suffix}")
    other = "masks/test0.png" if place == "images" else "images/test0.png"
    pair = (f"images/a.{suffix}", other) if place == "images" else (other, f"masks/a.{suffix}")
    (folder / "test.csv").write_text(f"image,label\n{','.join(pair)}\n")
    message = rf"{place}/a\.{suffix}: must be one opaque picture of 8 bits, got {fact}.*; save it as that"
    with pytest.raises(ValueError, match=message):
        MaskDataset(folder, "test", size=SIZE)
    (folder / "test.csv").write_text(f"image,label\n{','.join(pair)}\nimages/test0.png,masks/test0.png\n")
    images = MaskDataset(folder, "test", size=SIZE, on_bad="skip")
    assert len(images) == len(images.skipped) == 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 6, 8])
def test_an_image_is_turned_as_its_mask_is_or_refused(folder, suffix, orientation):
    """Of a square or a turn by 180 degrees the sizes say nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().resize((40, 40)).save(folder / f"images/a.{suffix}", exif=exif)
    mask = Image.fromarray(ring(40, 40)).convert("L")
    (folder / "test.csv").write_text(f"image,label\nimages/a.{suffix},masks/a.png\n")
    mask.save(folder / "masks/a.png")
    with pytest.raises(
        ValueError, match=rf"masks/a\.png: must be turned as .*, got the EXIF orientations 1 and {orientation}"
    ):
        MaskDataset(folder, "test", size=SIZE)
    mask.save(folder / "masks/a.png", exif=exif)
    assert len(MaskDataset(folder, "test", size=SIZE)) == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 30), (4000, 130), (130, 4000)])
@pytest.mark.parametrize("kind", [MaskDataset, InstanceDataset])
def test_pictures_of_any_size_are_whole(folder, size, kind):
    write_pair(folder, "a", size=size)
    Image.new("L", size, 255).save(folder / "masks/a.png")
    write_list(folder, "test", ["a"])
    item = kind(folder, "test", size=SIZE)[0]
    width, height = (int(SIZE * side / max(size) + 0.5) for side in size)
    assert item["inside"].sum() == item["masks"].sum() == width * height
    assert item["input_boxes"].tolist() == [[0, 0, width - 1, height - 1]]


def test_a_huge_picture_is_refused_by_its_name(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"train0\.png: must be a readable image, got Image size .* exceeds limit"):
        MaskDataset(folder, "train", size=SIZE)


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """Return what is read, and what is said where nothing is."""
    try:
        return read(), ""
    except ValueError as error:
        return None, str(error)


def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut bytes off, change some, or put others between."""
    how = draw(st.sampled_from(["cut", "flip", "flip", "insert", "zero"]))
    at = draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        return whole[:at]
    if how == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=8)) + whole[at:]
    if how == "zero":
        return whole[:at] + bytes(min(16, len(whole) - at)) + whole[at + 16 :]
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(whole) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def as_file(suffix: str) -> bytes:
    file = io.BytesIO()
    picture().resize((12, 10)).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    return file.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    suffix = draw(st.sampled_from(["png", "jpg", "gif", "tif", "bmp", "webp"]))
    return suffix, damaged(draw, as_file(suffix))


def picture_law(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    read, said = outcome(lambda: decoded(path, "RGB"))
    if said:
        assert said.startswith(f"{path}: must be "), said
        assert "; " in said
    else:
        assert read.mode == "RGB"
        assert np.asarray(read).shape == (*read.size[::-1], 3)


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


quietly = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@quietly
@given(files())
@settings(max_examples=60)
def test_a_damaged_picture_is_named(anywhere, file):
    picture_law(anywhere, *file)


@quietly
@pytest.mark.long
@given(files())
@settings(max_examples=10_000)
def test_thousands_of_damaged_pictures_are_named(anywhere, file):
    picture_law(anywhere, *file)


# finished runs

ROW = rows.Row(
    settings=Settings("mini", "0a", "nuclei", "1b", "lora", "infosam", 0, 128),
    images=["images/a.png", "images/ä.png"],
    metrics={"iou": [0.5, 0.75], "dice": [0.6, 0.8]},
    history=[{"loss": 1.5}],
    steps=40,
    training_seconds=12.5,
    evaluation_seconds=0.25,
    skipped=[],
    environment={"torch": "2.7", "dirty": False},
    also={"roads/box": {"images": ["a"], "iou": {"last": [0.5]}}},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@functools.cache
def whole_row() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return rows.write(Path(folder), ROW).read_bytes()


@st.composite
def damaged_rows(draw: st.DrawFn) -> bytes:
    return damaged(draw, whole_row())


def row_law(folder: Path, content: bytes) -> None:
    (folder / "run.json").write_bytes(content)
    read, said = outcome(lambda: rows.read(folder))
    assert said.startswith(f"rows: {folder / 'run.json'} must be a finished run") if said else read == [ROW]


@given(damaged_rows())
@settings(max_examples=60)
def test_a_damaged_run_is_named_and_never_read(runs, content):
    row_law(runs, content)


@pytest.mark.long
@given(damaged_rows())
@settings(max_examples=10_000)
def test_thousands_of_damaged_runs_are_named(runs, content):
    row_law(runs, content)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", "3", '"a"', "{}", '{"settings": 3}', "\ufeff{}"])
def test_what_is_no_run_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows: .*run\.json must be a finished run of this version, got"):
        rows.read(tmp_path)


def test_a_run_whose_metrics_lack_an_image_is_named(tmp_path):
    path = rows.write(tmp_path, ROW)
    text = path.read_text()
    # As files were before they had digests.
    path.write_text(text[: text.index(',"digest"')] + "}\n")
    assert rows.read(tmp_path) == [ROW]
    path.write_text(path.read_text().replace("[0.5,0.75]", "[0.5]"))
    with pytest.raises(ValueError, match="metrics have not one value for each image"):
        rows.read(tmp_path)


def test_a_run_that_is_being_written_is_none_yet(tmp_path):
    path = rows.write(tmp_path, ROW)
    path.with_name(f".12.{path.name}").write_text('{"settings":')
    assert rows.read(tmp_path) == [ROW]


# tables of results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a table in UTF-8 with a header, got not enough values"),
        (b"\n\n", "must be a table in UTF-8 with a header"),
        ("a,b\n1,2\n".encode("utf-16"), "must be a table in UTF-8 with a header, got 'utf-8' codec"),
        (b"a,b\n1,\xff\n", "must be a table in UTF-8 with a header, got 'utf-8' codec"),
        (b"a,b\n1,2\n3", r"must have 2 cells in a row, as in its header, got 1 in line 3; complete or remove"),
        (b"a,b\n1,2,3\n", r"must have 2 cells in a row, as in its header, got 3 in line 2; complete"),
        (b'a,b\n1,"2\n', "must be a table in UTF-8 with a header, got unexpected end of data"),
        (b"a,a\n1,2\n", "must name every column once, got a, a; rename one"),
    ],
)
def test_a_damaged_table_is_named_and_stays_as_it_is(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        measure.append_rows(path, [{"a": 1}])
    assert str(caught.value).startswith(str(path))
    assert path.read_bytes() == content


def test_a_table_in_another_form_is_the_same_table(tmp_path):
    path = tmp_path / "rows.csv"
    for text in ("a,b\r\n1,\r\n", "\ufeffa,b\n1,\n", "a,b\n\n1,\n", '"a","b"\n"1",""'):
        path.write_text(text, encoding="utf-8")
        measure.append_rows(path, [{"b": "x, y", "c": '"'}])
        assert measure.read_rows(path).to_dict("records") == [
            {"a": "1", "b": "", "c": ""},
            {"a": "", "b": "x, y", "c": '"'},
        ]


# files that are there whole or not at all

WRITE = """
import sys, time
from pathlib import Path
from benchmarks.files import whole_file

with whole_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


def begun(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITE, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "begun\n"
    return process


def test_what_a_killed_process_left_is_gone_after_the_next_start_and_no_more(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("old")
    for name in (".5.other.csv", ".rows.csv.lock", ".a.rows.csv", "5.rows.csv"):
        (tmp_path / name).write_text("of somebody else")
    others = {entry.name for entry in tmp_path.iterdir()}
    killed, alive = begun(path), begun(path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = {f".{process.pid}.rows.csv" for process in (killed, alive)}
    assert {entry.name for entry in tmp_path.iterdir()} == others | left
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    # Another process is still in the midst of it.
    assert {entry.name for entry in tmp_path.iterdir()} == others | {f".{alive.pid}.rows.csv"}
    alive.kill()
    alive.wait()
    with whole_file(path) as temporary:
        temporary.write_text("newer")
    assert {entry.name for entry in tmp_path.iterdir()} == others


def test_what_writes_a_file_may_replace_or_never_make_it(tmp_path):
    path = tmp_path / "weights.pt"
    with whole_file(path) as temporary:
        temporary.unlink()
        torch.save({"a": torch.zeros(2)}, temporary)
    assert torch.equal(torch.load(path)["a"], torch.zeros(2))
    with whole_file(path) as temporary:
        shutil.copy(path, temporary)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pt"]


def test_what_is_written_nowhere_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with (
        pytest.raises(ValueError, match=r"a\.csv: must be written to .*, got nothing; write it there"),
        whole_file(path),
    ):
        pass
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


def test_a_file_system_without_locks_loses_nothing(tmp_path, monkeypatch):
    def refuses(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    (tmp_path / ".5.a.csv").write_text("half")
    with whole_file(tmp_path / "a.csv") as temporary:
        temporary.write_text("new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.csv", ".5.a.csv"}


@pytest.mark.long
def test_processes_that_are_killed_at_any_time_leave_nothing_after_the_next_start(tmp_path):
    path = tmp_path / "rows.csv"
    code = "import sys, pathlib; from benchmarks.files import whole_file\nwhile True:\n    with whole_file("
    code += "pathlib.Path(sys.argv[1])) as t: t.write_text(sys.argv[2] * 10_000)"
    rng = np.random.default_rng(0)
    for _ in range(20):
        writers = [subprocess.Popen([sys.executable, "-c", code, path, name], cwd=ROOT) for name in "abc"]
        time.sleep(0.3 + rng.uniform(0, 0.2))
        for writer in writers:
            time.sleep(rng.uniform(0, 0.01))
            writer.kill()
            writer.wait()
        if path.exists():
            text = path.read_text()
            assert text in {name * 10_000 for name in "abc"}
    with whole_file(path) as temporary:
        temporary.write_text("end")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.csv"]
