"""Files of the teacher's cache: what disks, networks, other programs and killed processes do to them.

The law: what is read is bit for bit what was written; or nothing, with a warning; or an error that names the file.
"""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, treespec_dumps

from renyi_kd.teachers.checked_tensors import DTYPES, CheckedTensors
from renyi_kd.teachers.encoder_cache import (
    EncoderCache,
    Entry,
    fingerprint,
    image_part,
    probe,
    show_other_images,
    some_numbers,
)

WEIGHTS, SIZE = "0123456789abcdef", (3, 32, 32)
TEMPORARY = "." + "a-0123456789ab." + "0" * 32 + ".tmp"
quick = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(max_examples=6000, suppress_health_check=[HealthCheck.too_slow])


def cache_in(folder: Path, preprocessing: str = "") -> EncoderCache:
    return EncoderCache(folder, preprocessing=preprocessing, dtype=torch.float16)


def entry_of(seed: int, n: int = 3) -> Entry:
    generator = torch.Generator().manual_seed(seed)
    output = {"maps": torch.randn(n, generator=generator).half(), "sizes": (torch.tensor([seed, 2]),)}
    return Entry(*tree_flatten(output), torch.rand(2, generator=generator))


def write(cache: EncoderCache, sample: str, entry: Entry) -> Path:
    before = set(cache.folder.iterdir())
    cache.write(sample, WEIGHTS, SIZE, entry)
    (path,) = set(cache.folder.iterdir()) - before
    return path


def read(cache: EncoderCache, sample: str = "a") -> tuple[Entry | None, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        entry = cache.read(sample, WEIGHTS, SIZE)
    return entry, [str(warning.message) for warning in said]


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a: Entry, b: Entry) -> bool:
    tensors = [[bits(tensor) for tensor in (*entry.leaves, entry.probe)] for entry in (a, b)]
    return tensors[0] == tensors[1] and a.structure == b.structure


def holds_the_law(cache: EncoderCache, path: Path, sample: str, written: Entry) -> str:
    """Return what was made of a file, which is one of three."""
    refusal = ""
    try:
        entry, said = read(cache, sample)
    except (ValueError, OSError) as error:
        refusal = str(error)
    if refusal:
        assert str(path) in refusal
        assert "CachedTeacher: " in refusal
        return "refused"
    if entry is None:
        assert len(said) == 1
        assert str(path) in said[0]
        assert said[0].endswith("it is written again")
        return "damaged"
    assert not said
    assert same(entry, written)
    return "served"


# what is written is read


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("entries")


def some_tensors() -> st.SearchStrategy[Tensor]:
    dtypes = [torch.float16, torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    dtypes += [torch.int8, torch.int16, torch.int32, torch.int64]

    def drawn(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
        return (numbers > 0 if dtype == torch.bool else numbers.abs()).to(dtype)

    return st.builds(drawn, st.sampled_from(dtypes), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99))


@given(st.lists(some_tensors(), min_size=1, max_size=12), st.text(st.characters(exclude_categories=["Cs"])))
def test_an_entry_is_read_as_it_was_written_and_any_program_can_read_it(folder, tensors, sample):
    entry = Entry(*tree_flatten([tensors[0], {"b": tuple(tensors[1:])}]), torch.rand(8)[::2])
    path = write(cache_in(folder), sample, entry)
    found, said = read(cache_in(folder), sample)
    assert not said
    assert same(found, entry)
    with safe_open(path, "pt") as file:
        assert file.metadata()["sample"] == sample
        assert torch.equal(file.get_tensor("probe"), entry.probe)
        assert [bits(file.get_tensor(str(i))) for i in range(len(tensors))] == [bits(leaf) for leaf in tensors]
    path.unlink()


def test_what_is_not_of_real_numbers_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match=r"output must hold floats, integers or booleans, got torch.complex64; name a mod"
    ):
        cache_in(tmp_path).entry("a", [torch.zeros(2, dtype=torch.complex64)], *entry_of(0)[1:])


Pair = namedtuple("Pair", ["a", "b"])


@pytest.mark.parametrize(
    ("output", "fact"),
    [
        (Pair(torch.ones(2), torch.ones(2)), r"TreeSpec\(namedtuple, .*Pair'>, \[\*, \*\]\)"),
        ({"maps": [Pair(torch.ones(2), 3)]}, r"TreeSpec\(dict, \['maps'\], .*Pair.*"),
        ({(1, 2): torch.ones(2)}, r"TreeSpec\(dict, \[\(1, 2\)\], \[\*\]\)"),
        ({b"maps": torch.ones(2)}, r"TreeSpec\(dict, \[b'maps'\], \[\*\]\)"),
    ],
)
def test_an_output_that_would_not_be_read_as_it_was_is_refused_at_once(tmp_path, output, fact):
    with pytest.raises(TypeError, match=f"must be of tensors, tuples, lists and dicts, got {fact}; name a module"):
        cache_in(tmp_path).entry("a", *tree_flatten(output), torch.rand(2))


def test_a_long_id_of_any_letters_fits_into_a_file_name(tmp_path):
    sample = "\U00020000" * 300
    write(cache_in(tmp_path), sample, entry_of(0))
    assert same(read(cache_in(tmp_path), sample)[0], entry_of(0))


def test_an_id_may_be_any_name_that_a_folder_lists(tmp_path):
    samples = [os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png", b"caf\xc3\xa9.png")]
    for number, sample in enumerate(samples):
        write(cache_in(tmp_path), sample, entry_of(number))
    for number, sample in enumerate(samples):
        found, said = read(cache_in(tmp_path), sample)
        assert not said
        assert same(found, entry_of(number))


def test_a_file_of_an_earlier_version_is_found_again(tmp_path):
    path = write(cache_in(tmp_path), "train/cat 1.png", entry_of(0))
    assert path.name == "train_cat_1.png-0d810028c239.safetensors"
    # A header of such a length that numbers lie at multiples of their size.
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    weights = nn.Linear(3, 2)
    with torch.no_grad():
        weights.weight.copy_(torch.arange(6.0).view(2, 3))
        weights.bias.fill_(0.5)
    assert fingerprint(weights) == "d6eca66ec1ad4fe58a78abe9331e8cbb"


def test_thumbnails_tell_images_apart_beyond_rounding():
    images = torch.rand(2, 3, 64, 48)
    assert probe(images).shape == (2, 3, 16, 16)
    assert probe(images.bfloat16()).dtype == torch.float32
    # What is no image is kept as it is.
    assert torch.equal(probe(images[:, :, :5, 0]), images[:, :, :5, 0])
    seen = probe(images)
    assert not show_other_images(seen, seen * 1.004)
    assert show_other_images(seen, seen * 1.006)
    assert show_other_images(seen, seen[:, :, :8])
    # Of an empty image what counts is no relative error.
    assert not show_other_images(torch.zeros(3), torch.full((3,), 4e-6))
    assert show_other_images(torch.zeros(3), torch.full((3,), 6e-6))


LAYOUTS = {
    "contiguous": lambda: torch.randn(40, 30, 3, 3),
    "channels last": lambda: torch.randn(40, 30, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(70, 130).mT,
    "a part": lambda: torch.randn(70, 130)[::2, 1:],
    "expanded": lambda: torch.randn(70, 1).expand(70, 130),
    "long": lambda: torch.randn(1000),
    "few": lambda: torch.randn(2, 3),
    "one": lambda: torch.randn(()),
    "none": lambda: torch.randn(3, 0),
    "integers": lambda: torch.randint(1, 9, (70, 130)).mT,
}


class Allocations(TorchDispatchMode):
    """Counts the numbers of every tensor that has memory of its own."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.made = known.untyped_storage().data_ptr(), [0]

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self.known:
            self.made.append(made.numel())
        return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_numbers_of_a_weight_tell_a_change_and_copy_no_more(layout):
    weight = LAYOUTS[layout]()
    with Allocations(weight) as allocations:
        before = some_numbers([weight, torch.ones(2)])
    assert max(allocations.made) <= 66
    assert some_numbers([weight, torch.ones(2)]) == before
    assert len(before) // 4 - 2 == weight.numel() or len(before) // 4 - 2 > 32
    assert (some_numbers([weight * 2, torch.ones(2)]) == before) == (layout == "none")


def test_some_numbers_are_spread_over_a_weight():
    def taken(*shape: int) -> list[float]:
        numbers = some_numbers([torch.arange(math.prod(shape)).view(shape)])
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32).tolist()

    assert taken(1000) == list(range(0, 1000, 16))
    assert taken(65) == list(range(0, 65, 2))
    assert taken(64, 5) == list(range(0, 320, 5))
    assert taken(2, 48) == [*range(0, 48, 2), *range(48, 96, 2)]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_thumbnails_that_are_not_finite_are_of_other_images(odd):
    images = torch.rand(1, 3, 64, 64)
    (usual,), (empty,) = probe(images), probe(torch.full_like(images, odd))
    images[0, 1, 9, 9] = odd
    (spotted,), (flipped,) = probe(images), probe(images.flip(-1))
    for one, other in ((usual, spotted), (usual, empty), (usual, flipped), (spotted, flipped), (spotted, empty)):
        assert show_other_images(one, other)
        assert show_other_images(other, one)
    assert not show_other_images(spotted, spotted)
    # Where the rest differs, one such number hides it no longer.
    assert show_other_images(spotted, spotted * 1.006)


def test_an_output_has_a_row_for_every_image():
    assert torch.equal(image_part(torch.arange(3), 1, 3), torch.tensor(1))
    for leaf, got in ((torch.tensor(1.0), r"\(\)"), (torch.zeros(2, 3), r"\(2, 3\)"), ([1], "list")):
        with pytest.raises(ValueError, match=f"must hold tensors with one row per image, got {got} for 3 images"):
            image_part(leaf, 0, 3)


# damage


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flips(data: bytes) -> st.SearchStrategy[bytes]:
    def flipped(places: list[int]) -> bytes:
        changed = data
        for place in places:
            changed = flip(changed, place)
        return changed

    return st.builds(flipped, st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=4, unique=True))


def other_sizes(data: bytes) -> st.SearchStrategy[bytes]:
    near = len(data) - 8
    sizes = st.one_of(st.integers(0, 2 * near), st.integers(0, 2**64 - 1), st.just(near), st.just(2**63))
    return st.builds(lambda size: size.to_bytes(8, "little") + data[8:], sizes)


def zeroed(data: bytes) -> st.SearchStrategy[bytes]:
    places = st.tuples(st.integers(0, len(data) - 1), st.integers(1, len(data)))
    return st.builds(lambda at: (data[: at[0]] + bytes(at[1]) + data[sum(at) :])[: len(data)], places)


def shuffled(data: bytes) -> st.SearchStrategy[bytes]:
    def blocks(size: int, order: random.Random) -> bytes:
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        order.shuffle(parts)
        return b"".join(parts)

    return st.builds(blocks, st.sampled_from([1, 4, 16, 64, 256]), st.randoms(use_true_random=False))


def replaced_text(data: bytes) -> st.SearchStrategy[bytes]:
    words = [b"F16", b"BF16", b"I64", b"U64", b"F32", b'"0"', b'"1"', b'"probe"', b"[2]", b"[1,2]", b"[3]", b"[", b"{"]
    words += [
        b"null",
        b"maps",
        b"sizes",
        b"structure",
        b"checksum",
        b"__metadata__",
        b"format",
        b"1",
        b"6",
        b'\\"',
        b"",
    ]
    pairs = st.tuples(st.sampled_from([word for word in words if word and word in data]), st.sampled_from(words))
    return st.builds(lambda pair, n: data.replace(*pair, n), pairs, st.sampled_from([1, -1]))


def damages(data: bytes) -> st.SearchStrategy[bytes]:
    truncated = st.builds(lambda n: data[:n], st.integers(0, len(data) - 1))
    extended = st.builds(lambda more: data + more, st.binary(min_size=1, max_size=64))
    return st.one_of(
        flips(data),
        truncated,
        extended,
        other_sizes(data),
        zeroed(data),
        shuffled(data),
        replaced_text(data),
        st.binary(max_size=200),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[EncoderCache, Path, bytes]:
    cache = cache_in(tmp_path_factory.mktemp("damage"))
    path = write(cache, "a", entry_of(0))
    return cache, path, path.read_bytes()


def damage_holds_the_law(written: tuple[EncoderCache, Path, bytes], drawn: st.DataObject) -> None:
    cache, path, whole = written
    data = drawn.draw(damages(whole))
    path.write_bytes(data)
    outcome = holds_the_law(cache, path, "a", entry_of(0))
    assert outcome != "refused" or b"renyi_kd encoder output 2" not in data or b'"format"' not in data
    if outcome == "damaged":
        cache.write("a", WEIGHTS, SIZE, entry_of(0))
        assert path.read_bytes() == whole
    assert list(cache.folder.iterdir()) == [path]


@quick
@given(st.data())
def test_no_damage_is_served(written, drawn):
    damage_holds_the_law(written, drawn)


@pytest.mark.long
@thorough
@given(st.data())
def test_no_damage_of_thousands_is_served(written, drawn):
    damage_holds_the_law(written, drawn)


@pytest.mark.long
def test_every_flipped_bit_and_every_length_is_noticed(written):
    cache, path, whole = written
    outcomes = []
    for changed in [flip(whole, bit) for bit in range(8 * len(whole))] + [whole[:n] for n in range(len(whole))]:
        path.write_bytes(changed)
        outcomes.append(holds_the_law(cache, path, "a", entry_of(0)))
    assert set(outcomes) == {"damaged"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"F16"', '"I16"'),
        ('"dtype":"torch.float16"', '"dtype":"torch.float17"'),
        ("maps", "mapr"),
        ('"0":', '"2":'),
        ('"probe":', '"prob":'),
        ('"sample":"a"', '"sample":"b"'),
        ("renyi_kd encoder output 2", "renyi_kd encoder output 3"),
        ('"format":', '"gormat":'),
        (WEIGHTS, WEIGHTS[::-1]),
    ],
)
def test_a_changed_header_is_damage_and_not_another_file(tmp_path, old, new):
    path = write(cache_in(tmp_path), "a", entry_of(0))
    # Written with spaces or without, which is the same header.
    found = re.sub(re.escape(old).replace(":", ": ?"), new.replace("\\", ""), path.read_bytes().decode("latin-1"))
    size = len(found) - len(path.read_bytes()) + int.from_bytes(path.read_bytes()[:8], "little")
    assert found.encode("latin-1") != path.read_bytes()
    path.write_bytes(size.to_bytes(8, "little") + found.encode("latin-1")[8:])
    with pytest.warns(UserWarning, match=r"must be a whole file, got a damaged one \(its checksum does not fit\)"):
        assert cache_in(tmp_path).read("a", WEIGHTS, SIZE) is None


def test_a_flipped_bit_in_the_numbers_is_damage(tmp_path):
    path = write(cache_in(tmp_path), "a", entry_of(0))
    whole = path.read_bytes()
    for bit in range(8 * (len(whole) - 30), 8 * len(whole), 7):
        path.write_bytes(flip(whole, bit))
        with pytest.warns(UserWarning, match=r"must be a whole file, got a damaged one \(its checksum does not fit\)"):
            assert cache_in(tmp_path).read("a", WEIGHTS, SIZE) is None


# files of others


def test_swapped_files_of_two_samples_are_refused(tmp_path):
    cache = cache_in(tmp_path)
    paths = [write(cache, sample, entry_of(seed)) for seed, sample in enumerate("ab")]
    data = [path.read_bytes() for path in paths]
    paths[0].write_bytes(data[1])
    paths[1].write_bytes(data[0])
    with pytest.raises(ValueError, match="the sample of .* must be 'a', got 'b'"):
        cache.read("a", WEIGHTS, SIZE)
    with pytest.raises(ValueError, match="the sample of .* must be 'b', got 'a'"):
        cache.read("b", WEIGHTS, SIZE)
    assert [path.read_bytes() for path in paths] == data[::-1]


def foreign_files() -> st.SearchStrategy[bytes]:
    names = st.sampled_from(["0", "1", "probe", "checksum", "weight"])
    dtypes = st.sampled_from([torch.float16, torch.float32, torch.float8_e4m3fn, torch.int64])
    tensors = st.dictionaries(names, st.builds(torch.zeros, st.integers(0, 3), dtype=dtypes))
    keys = st.sampled_from(["sample", "structure", "checksum", "format", "dtype"])
    values = st.sampled_from(["a", "00000000", "pt", "renyi_kd encoder output 3", "renyi_kd", ""])
    # With both it would be one of the cache's that is damaged.
    metadata = st.dictionaries(keys, values, min_size=1).filter(
        lambda given: not given.keys() >= {"checksum", "structure"}
    )
    return st.builds(save, tensors, st.none() | metadata)


@settings(quick, max_examples=60)
@given(foreign_files())
def test_files_of_other_programs_are_refused_and_kept(written, data):
    cache, path, _ = written
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="the format of .* must be 'renyi_kd encoder output 2', got .*delete this file"
    ):
        cache.read("a", WEIGHTS, SIZE)
    assert path.read_bytes() == data


def test_a_whole_file_of_a_later_version_is_refused_and_kept(tmp_path, monkeypatch):
    cache = cache_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("renyi_kd.teachers.encoder_cache._FORMAT", "renyi_kd encoder output 3")
        patch.setitem(DTYPES, "C64", torch.complex64)
        path = write(cache, "a", entry_of(0)._replace(probe=torch.zeros(2, dtype=torch.complex64)))
    data = path.read_bytes()
    with pytest.raises(ValueError, match="format of .* must be '.*output 2', got '.*output 3'; .*delete this file"):
        cache.read("a", WEIGHTS, SIZE)
    assert path.read_bytes() == data


def of_format_1(cache: EncoderCache, entry: Entry, **changes: str) -> dict[str, object]:
    metadata = {
        "format": "renyi_kd encoder output 1",
        "sample": "a",
        "encoder weights": WEIGHTS,
        "preprocessing": cache.preprocessing,
        "image size": str(SIZE),
        "dtype": str(cache.dtype),
        "structure": treespec_dumps(entry.structure),
    }
    tensors = {"0": entry.leaves[0], "1": entry.leaves[1], "probe": entry.probe}
    return {"tensors": tensors, "metadata": {**metadata, **changes}}


def test_an_entry_without_a_checksum_is_said_and_written_again(tmp_path):
    cache, entry = cache_in(tmp_path), entry_of(0)
    path = write(cache, "a", entry)
    whole = path.read_bytes()
    save_file(filename=path, **of_format_1(cache, entry))
    with pytest.warns(UserWarning, match="must have a checksum, got a file of an earlier version, without; it is writ"):
        assert cache.read("a", WEIGHTS, SIZE) is None
    cache.write("a", WEIGHTS, SIZE, entry)
    assert path.read_bytes() == whole
    # Of another encoder it is not this cache's to write again.
    save_file(filename=path, **of_format_1(cache, entry, **{"encoder weights": "others"}))
    with pytest.raises(ValueError, match=f"the encoder weights of .* must be '{WEIGHTS}', got 'others'"):
        cache.read("a", WEIGHTS, SIZE)


def test_a_file_that_is_replaced_while_it_is_read_is_still_the_one_that_was_opened(tmp_path, monkeypatch):
    cache = cache_in(tmp_path)
    path = write(cache, "a", entry_of(0))
    check = EncoderCache._check

    def replace_and_check(self: EncoderCache, *args: object) -> None:
        self.write("a", WEIGHTS, SIZE, entry_of(1, n=300))
        check(self, *args)

    monkeypatch.setattr(EncoderCache, "_check", replace_and_check)
    assert holds_the_law(cache, path, "a", entry_of(0)) == "served"
    monkeypatch.undo()
    assert holds_the_law(cache, path, "a", entry_of(1, n=300)) == "served"


def test_what_is_written_into_a_file_does_not_reach_what_was_read_of_it(tmp_path):
    entry = entry_of(0, n=100_000)
    path = write(cache_in(tmp_path), "a", entry)
    found, _ = read(cache_in(tmp_path))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(150_000))
    assert same(found, entry)


def test_a_file_that_is_cut_off_kills_no_process(tmp_path, monkeypatch):
    cache, entry = cache_in(tmp_path), entry_of(0, n=100_000)
    path, tensors = write(cache, "a", entry), CheckedTensors.tensors

    def cut_and_read(self: CheckedTensors) -> dict[str, Tensor]:
        os.truncate(path, 4096)
        return tensors(self)

    def child() -> None:
        found, _ = read(cache)
        os._exit(0 if found is not None and same(found, entry) else 1)

    monkeypatch.setattr(CheckedTensors, "tensors", cut_and_read)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_file_that_is_cut_off_while_it_is_read_is_damaged(tmp_path, monkeypatch):
    cache, fstat = cache_in(tmp_path), os.fstat
    path = write(cache, "a", entry_of(0))

    def look_and_cut(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        os.truncate(path, found.st_size - 9)
        return found

    monkeypatch.setattr("renyi_kd.teachers.checked_tensors.os", SimpleNamespace(fstat=look_and_cut))
    with pytest.warns(UserWarning, match=r"got a damaged one \(it became shorter while it was read\); it is written"):
        assert cache.read("a", WEIGHTS, SIZE) is None


# what a killed process leaves, and what a living one writes


def test_what_a_killed_process_left_is_gone_after_the_next_start(tmp_path):
    path = write(cache_in(tmp_path), "a", entry_of(0))
    (tmp_path / f".{path.stem}.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    (tmp_path / TEMPORARY).touch()
    cache_in(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_but_the_caches_own_is_removed(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_bytes(b"precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.tmp", ".a.tmp", ".notes.swp", TEMPORARY[1:], TEMPORARY.upper(), TEMPORARY.replace("0.tmp", ".tmp")):
        (folder / name).write_bytes(b"another program's")
    (folder / TEMPORARY.replace("a", "l", 1)).symlink_to(other / "precious")
    (folder / TEMPORARY.replace("a", "d", 1)).mkdir()
    (folder / TEMPORARY.replace("a", "s", 1)).symlink_to(folder / "nowhere")
    before = sorted(folder.iterdir())
    cache_in(folder)
    assert sorted(folder.iterdir()) == before
    assert (other / "precious").read_bytes() == b"precious"


def test_what_is_locked_stays_until_the_lock_ends(tmp_path):
    import fcntl

    with (tmp_path / TEMPORARY).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache_in(tmp_path)
        assert (tmp_path / TEMPORARY).exists()
    cache_in(tmp_path)
    assert not (tmp_path / TEMPORARY).exists()


@pytest.mark.parametrize("why", ["Windows", "a file system without locks"])
def test_without_locks_what_is_older_than_an_hour_is_removed(tmp_path, monkeypatch, why):
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if why == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    ages = {"a": 60, "b": 3500, "c": 3700, "d": 1e6}
    for name, age in ages.items():
        path = tmp_path / TEMPORARY.replace("a", name, 1)
        path.touch()
        os.utime(path, (0, time.time() - age))
    cache = cache_in(tmp_path)
    assert sorted(path.name[1] for path in tmp_path.iterdir()) == ["a", "b"]
    cache.write("a", WEIGHTS, SIZE, entry_of(0))
    assert same(read(cache)[0], entry_of(0))
    assert len(list(tmp_path.iterdir())) == 3


def test_on_windows_no_file_is_opened_that_another_process_may_be_writing(tmp_path, monkeypatch):
    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    (tmp_path / TEMPORARY).touch()
    os.utime(tmp_path / TEMPORARY, (0, 0))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(Path, "open", refuse)
    cache_in(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("times", [3, 1000])
@pytest.mark.parametrize("where", ["Windows", "elsewhere"])
def test_on_windows_a_file_that_somebody_reads_is_replaced_a_little_later(tmp_path, monkeypatch, where, times):
    cache, refused, slept = cache_in(tmp_path), [], []
    path, replace = write(cache, "a", entry_of(0)), Path.replace

    def refuse_and_replace(self: Path, target: Path) -> Path:
        if len(refused) < times:
            refused.append(self)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_and_replace)
    monkeypatch.setattr(time, "sleep", slept.append)
    if where == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    replaced = where == "Windows" and times == 3
    with nullcontext() if replaced else pytest.raises(PermissionError, match="must be a file that can be written"):
        cache.write("a", WEIGHTS, SIZE, entry_of(1))
    assert len(slept) == len(refused) - (not replaced)
    assert 0 <= sum(slept) < 2
    assert same(read(cache)[0], entry_of(int(replaced)))
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def temporary_files_vanish(monkeypatch: pytest.MonkeyPatch, times: float) -> Iterator[list[Path]]:
    """As where another computer starts, and locks are not seen from there."""
    vanished: list[Path] = []
    replace = Path.replace

    def remove_and_replace(self: Path, target: Path) -> Path:
        if len(vanished) < times:
            vanished.append(self)
            self.unlink()
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", remove_and_replace)
        yield vanished


def test_a_writer_that_loses_its_file_writes_another(tmp_path, monkeypatch):
    cache = cache_in(tmp_path)
    with temporary_files_vanish(monkeypatch, times=3) as vanished:
        path = write(cache, "a", entry_of(0))
    assert len({file.name for file in vanished}) == 3
    assert list(tmp_path.iterdir()) == [path]
    assert same(read(cache)[0], entry_of(0))
    with (
        temporary_files_vanish(monkeypatch, times=float("inf")),
        pytest.raises(FileNotFoundError, match="can be written, got 'its temporary files were removed 10 times'"),
    ):
        cache.write("b", WEIGHTS, SIZE, entry_of(1))


def _write_forever(folder: Path, seed: int) -> None:
    cache, rng = cache_in(folder), random.Random(seed)
    while True:
        number = rng.randrange(6)
        # Written in pieces: a kill is then often in the middle.
        cache.write(str(number), WEIGHTS, SIZE, entry_of(number, n=200_000))
        found = cache.read(str(number), WEIGHTS, SIZE)
        if found is not None and not same_numbers(found, number):
            os._exit(3)
        if rng.random() < 0.2:
            next(folder.glob("*.safetensors")).unlink(missing_ok=True)


def same_numbers(found: Entry, number: int) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found.leaves, entry_of(number, n=200_000).leaves, strict=True))


def _write_half(folder: Path, halfway: object) -> None:
    """Write a file, and of another one a part."""
    cache = cache_in(folder)
    cache.write("whole", WEIGHTS, SIZE, entry_of(0))
    from renyi_kd.teachers import encoder_cache

    write_whole = encoder_cache.write_whole

    def parts_of(parts: list[bytes]) -> Iterator[bytes]:
        # More than a buffer, so that it is in the file.
        yield bytes(parts[0]) * 10_000
        halfway.set()
        time.sleep(600)

    encoder_cache.write_whole = lambda path, parts: write_whole(path, parts_of(parts))
    cache.write("half", WEIGHTS, SIZE, entry_of(0))


def test_several_processes_and_a_kill_leave_whole_files_only(tmp_path):
    context = multiprocessing.get_context("spawn")
    events = [context.Event() for _ in range(2)]
    workers = [context.Process(target=_write_half, args=(tmp_path, event)) for event in events]
    for worker in workers:
        worker.start()
    try:
        assert all(event.wait(120) for event in events)
        # Both are in the middle of a file, and none was taken from them by a start, theirs or this one.
        cache_in(tmp_path)
        temporary = list(tmp_path.glob(".*.tmp"))
        assert len(temporary) == 2
        assert all(path.stat().st_size >= 80_000 for path in temporary)
        workers[0].kill()
        workers[0].join()
        cache_in(tmp_path)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2
    cache = cache_in(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert same(read(cache, "whole")[0], entry_of(0))
    assert read(cache, "half") == (None, [])


def _kill_again_and_again(folder: Path, rounds: int) -> None:
    rng, left = random.Random(0), 0
    for number in range(rounds):
        writers = []
        for i in range(2):
            writer = os.fork()
            if writer == 0:
                _write_forever(folder, 2 * number + i)
            writers.append(writer)
        time.sleep(rng.uniform(0.02, 0.3))
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(writer, 0)[1]) == signal.SIGKILL
        left += len(list(folder.glob(".*.tmp")))
        cache = cache_in(folder)
        assert not list(folder.glob(".*.tmp"))
        for sample in range(6):
            entry, said = read(cache, str(sample))
            assert not said
            assert entry is None or same_numbers(entry, sample)
    assert left > rounds / 10
    os._exit(7)


@pytest.mark.long
def test_many_kills_leave_whole_files_only(tmp_path):
    # Forked from a process without threads.
    parent = multiprocessing.get_context("spawn").Process(target=_kill_again_and_again, args=(tmp_path, 150))
    parent.start()
    parent.join(600)
    assert parent.exitcode == 7


# what a folder does not take


def links(target: Path) -> dict[str, Callable[[Path], object]]:
    return {
        "a directory": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to a directory": lambda path: path.symlink_to(target.parent),
    }


@pytest.mark.parametrize("what", links(Path()))
def test_what_is_no_file_is_said(tmp_path, what):
    cache = cache_in(tmp_path / "cache")
    path = write(cache, "a", entry_of(0))
    path.unlink()
    links(tmp_path / "target")[what](path)
    reason = os.strerror(errno.ELOOP if "itself" in what else errno.EISDIR)
    with pytest.raises(OSError, match=f"{path} must be a file that can be read, got '{reason}.*'; delete it, or look"):
        cache.read("a", WEIGHTS, SIZE)
    if what == "a directory":
        with pytest.raises(IsADirectoryError, match=f"{path} must be a file that can be written, got '{reason}"):
            cache.write("a", WEIGHTS, SIZE, entry_of(0))
        assert path.is_dir()
    assert list(cache.folder.iterdir()) == [path]


@pytest.mark.parametrize("target_is", ["missing", "text", "empty"])
def test_a_link_is_replaced_and_never_written_through(tmp_path, target_is):
    cache, target = cache_in(tmp_path / "cache"), tmp_path / "target"
    path = write(cache, "a", entry_of(0))
    path.unlink()
    path.symlink_to(target)
    if target_is != "missing":
        target.write_bytes(b"another program's text" if target_is == "text" else b"")
    before = target.read_bytes() if target.exists() else None
    entry, said = read(cache)
    assert entry is None
    assert len(said) == (target_is != "missing")
    cache.write("a", WEIGHTS, SIZE, entry_of(0))
    assert not path.is_symlink()
    assert same(read(cache)[0], entry_of(0))
    assert (target.read_bytes() if target.exists() else None) == before


@pytest.mark.parametrize("old_is", ["there", "missing"])
def test_a_full_disk_is_said_at_once_and_leaves_what_was_there(tmp_path, old_is):
    cache = cache_in(tmp_path)
    path = write(cache, "a", entry_of(0))
    if old_is == "missing":
        path.unlink()
    before = [file.read_bytes() for file in tmp_path.iterdir()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that goes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"must be a file that can be written, got 'File too large' for 4\d{5} bytes;"
        ):
            cache.write("a", WEIGHTS, SIZE, entry_of(1, n=200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == before
    assert read(cache)[1] == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_takes_no_file_still_serves_what_it_holds(tmp_path, monkeypatch, number):
    write(cache_in(tmp_path), "a", entry_of(0))
    (tmp_path / TEMPORARY).touch()
    opened = Path.open

    def refused(self: Path, mode: str = "r", *args: object) -> object:
        if mode != "rb":
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, mode, *args)

    monkeypatch.setattr(Path, "open", refused)
    cache = cache_in(tmp_path)
    assert same(read(cache)[0], entry_of(0))
    said = re.escape(f"must be a file that can be written, got {os.strerror(number)!r}")
    with pytest.raises(
        OSError, match=f"CachedTeacher: .*b-.*safetensors {said} for .*What is cached already stays"
    ) as to:
        cache.write("b", WEIGHTS, SIZE, entry_of(1))
    assert to.value.errno == number


def test_a_folder_that_vanishes_is_said(tmp_path):
    cache = cache_in(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert read(cache) == (None, [])
    with pytest.raises(
        FileNotFoundError, match="CachedTeacher: .* must be a file that can be written, got 'No such file"
    ):
        cache.write("a", WEIGHTS, SIZE, entry_of(0))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        FileExistsError, match="folder must be one that is there or can be made, got 'File exists' for "
    ):
        cache_in(tmp_path / "cache")
    with pytest.raises(
        NotADirectoryError, match="folder must be one that is there or can be made, got 'Not a directory"
    ):
        cache_in(tmp_path / "cache" / "of this run")


SMALL_DISK = """
import errno, os, subprocess, sys
from pathlib import Path
from tests.test_cache_files import *

folder = Path(sys.argv[1])
cache = cache_in(folder)
write(cache, "a", entry_of(0))
n = 0
try:
    while True:
        n += 1
        cache.write(f"b{n}", WEIGHTS, SIZE, entry_of(n, n=10_000))
except OSError as error:
    assert error.errno == errno.ENOSPC and "got 'No space left on device'" in str(error), error
assert n > 2 and len(list(folder.iterdir())) == n, (n, list(folder.iterdir()))
assert all(same(read(cache, f"b{i}")[0], entry_of(i, n=10_000)) for i in range(1, n))
(folder / TEMPORARY).touch()
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
cache = cache_in(folder)
assert same(read(cache)[0], entry_of(0))
try:
    cache.write("a", WEIGHTS, SIZE, entry_of(1))
except OSError as error:
    assert error.errno == errno.EROFS and "got 'Read-only file system'" in str(error), error
    print("full and read only")
"""


@pytest.mark.long
def test_a_small_disk_that_is_full_and_then_read_only(tmp_path):
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=128k none "$1" && shift && "$@"', "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk of a few bytes can be mounted here")
    command = [*mount, sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "full and read only\n", result.stderr
