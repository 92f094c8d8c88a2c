"""The three teachers: a copy, the student without its adapters, and features from disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from renyi_kd import AdapterDisabled, CachedTeacher, Call, InfoSAMLoss, SAMFeatures, Step, Teacher, tap
from renyi_kd.sam.memory import snapshot
from renyi_kd.teachers import encoder_cache
from renyi_kd.teachers.encoder_cache import EncoderCache
from tests.support.models import DIM, IMAGE_SIZE, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam, with_lora


def lora(model: nn.Module, **settings: object) -> nn.Module:
    peft_model = with_lora(model, **{"lora_alpha": 2, **settings})
    # At their initial values adapters change nothing.
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if "lora" in name else 0.01)
    return peft_model


def step(teacher: object, student: object, batch: object, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    loss = InfoSAMLoss(DIM)(teacher, student, batch)
    model.zero_grad()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def identified(batch: dict[str, Tensor], *ids: object) -> dict[str, object]:
    return {**batch, "sample_id": list(ids) or [f"image {i}" for i in range(len(batch["pixel_values"]))]}


# the student without its adapters


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_adapters_off_is_bit_equal_to_a_copy(n_prompts):
    original, batch = hf_sam(), hf_batch(2, n_prompts)
    # Frozen, as a teacher is: matmul takes another way, and rounds otherwise, where a weight requires grad.
    copied = tap(copy.deepcopy(original).requires_grad_(False))
    model = lora(original)
    student = tap(model)
    expected, gradients = step(copied, student, batch, model)
    actual, got = step(AdapterDisabled(student), student, batch, model)
    assert torch.equal(actual, expected)
    assert got.keys() == gradients.keys()
    assert all(torch.equal(got[name], gradients[name]) for name in got)
    assert not torch.equal(student.observe(batch).mask_tokens, copied.observe(batch).mask_tokens)


def test_adapters_off_after_training_steps_is_still_the_original():
    original, batch = hf_sam(), hf_batch(2)
    copied = tap(copy.deepcopy(original).requires_grad_(False))
    model = lora(original)
    student = tap(model)
    teacher, loss = AdapterDisabled(student), InfoSAMLoss(DIM)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *loss.parameters()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (student(batch).pred_masks.square().mean() + loss(teacher, student, batch)).backward()
        optimizer.step()
    for a, b in zip(teacher.observe(batch)[:2], copied.observe(batch)[:2], strict=True):
        assert torch.equal(a, b)


def test_a_run_without_adapters_leaves_modes_flags_and_capture_as_they_were():
    model = lora(hf_sam())
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    model.train()
    student, batch = tap(model), hf_batch(2)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    student(batch)
    AdapterDisabled(student).observe(hf_batch(2, seed=5))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert student.pending
    assert student.take(batch).mask_tokens.requires_grad


def test_a_failing_run_without_adapters_switches_them_on_again():
    model, batch = lora(hf_sam()), hf_batch(2)
    student = tap(model)
    before = student.observe(batch).mask_tokens
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="channel dimension"):
        AdapterDisabled(student).observe({**batch, "pixel_values": torch.zeros(2, 5, IMAGE_SIZE, IMAGE_SIZE)})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(student.observe(batch).mask_tokens, before)


def test_what_is_trained_outside_the_adapters_is_refused():
    model = lora(hf_sam())
    model.base_model.model.vision_encoder.layers[0].layer_norm1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"must be switched off.*got parameters that stay on: .*layer_norm1\.weight;"):
        AdapterDisabled(tap(model)).observe(hf_batch())


def test_running_statistics_that_follow_the_student_are_refused():
    original = hf_sam()
    original.vision_encoder.neck.add_module("norm", nn.BatchNorm2d(DIM))
    model = lora(original).train()
    teacher = AdapterDisabled(tap(model))
    with pytest.raises(ValueError, match=r"BatchNorm outside the adapters must be in eval mode.*neck\.norm"):
        teacher.observe(hf_batch())
    model.eval()
    assert teacher.observe(hf_batch()).mask_tokens.shape == (2, 4, DIM)


@pytest.mark.parametrize("part", ["original_module", "modules_to_save"])
def test_running_statistics_of_what_peft_saves_are_no_business_of_the_other_side(part):
    original = hf_sam()
    original.mask_decoder.norm = nn.BatchNorm2d(2)
    peft_model = with_lora(original, modules_to_save=["norm"]).eval()
    norm = next(
        module for name, module in peft_model.named_modules() if part in name and hasattr(module, "running_mean")
    )
    norm.train()
    assert AdapterDisabled(tap(peft_model)).observe(hf_batch()).mask_tokens.isfinite().all()


def test_adapters_of_ones_own_are_switched_off_by_a_function():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sam, self.shift, self.off = hf_sam().requires_grad_(False), nn.Parameter(torch.tensor(0.5)), False

        def forward(self, pixel_values: Tensor, input_boxes: Tensor) -> object:
            return self.sam(pixel_values + (0 if self.off else self.shift), input_boxes=input_boxes)

        def __enter__(self) -> None:
            self.off = True

        def __exit__(self, *_: object) -> None:
            self.off = False

    model, batch = Shifted(), hf_batch()
    teacher = AdapterDisabled(tap(model), disable=lambda: model)
    frozen = tap(hf_sam().requires_grad_(False))
    assert torch.equal(teacher.observe(batch).mask_tokens, frozen.observe(batch).mask_tokens)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_took_a_part_of_the_weights_are_refused(start):
    model = lora(hf_sam(), init_lora_weights=start)
    with pytest.raises(ValueError, match=f"got init_lora_weights='{start}' of adapter 'default'"):
        AdapterDisabled(tap(model))


@pytest.mark.parametrize(("how", "word"), [("merge_adapter", "merged"), ("disable_adapter_layers", "disabled")])
def test_adapters_that_are_merged_or_off_already_are_refused(how, word):
    model = lora(hf_sam())
    teacher = AdapterDisabled(tap(model))
    getattr(model.base_model, how)()
    with pytest.raises(ValueError, match=f"must be on and not merged, got {word} ones"):
        teacher.observe(hf_batch())


def test_a_student_without_adapters_is_refused():
    with pytest.raises(ValueError, match="student must hold a peft model, got SamModel without one"):
        AdapterDisabled(tap(hf_sam()))
    with pytest.raises(TypeError, match="student must be a tap, got SamModel"):
        AdapterDisabled(hf_sam())


# features from disk


def count_encoder_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    encoder = model.vision_encoder if hasattr(model, "vision_encoder") else model.image_encoder
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.blocks
    blocks[0].register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_encoder_runs_once_per_image_and_the_decoder_every_time(tmp_path, dtype):
    model, batch = hf_sam(), identified(hf_batch(2, 2))
    calls = count_encoder_calls(model)
    exact = tap(model).observe(batch)
    calls.clear()
    teacher = CachedTeacher(tap(model), tmp_path, dtype=dtype)
    first = teacher.observe(batch)
    assert calls == [2]
    assert first.image_features.dtype == torch.float32
    assert torch.equal(first.image_features, exact.image_features.to(dtype).float())
    torch.testing.assert_close(first.mask_tokens, exact.mask_tokens, rtol=0.1, atol=0.05)
    # Another process, other prompts: the same images.
    again = CachedTeacher(tap(model), tmp_path, dtype=dtype)
    other = identified({**batch, "input_boxes": batch["input_boxes"].flip(1)})
    second = again.observe(other)
    assert calls == [2]
    assert torch.equal(second.image_features, first.image_features)
    assert torch.equal(second.mask_tokens.view(2, 2, 4, DIM), first.mask_tokens.view(2, 2, 4, DIM).flip(1))
    assert torch.equal(second.image_index, first.image_index)


def test_the_loss_takes_a_cached_teacher(tmp_path):
    batch, model = identified(hf_batch(3)), hf_sam(1)
    student, plain = tap(model), tap(hf_sam())
    cached = CachedTeacher(tap(hf_sam()), tmp_path)
    assert isinstance(cached, Teacher)
    for _ in range(2):
        student(batch)
        value, _ = step(cached, student, batch, model)
        expected, _ = step(plain, student, batch, model)
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(tmp_path, low, kept):
    batch, model = identified(hf_batch()), hf_sam()
    teacher = CachedTeacher(tap(model), tmp_path, dtype=kept)
    with torch.autocast("cpu", low):
        expected = tap(model).observe(batch)
        for _ in range(2):
            features = teacher.observe(batch)
            torch.testing.assert_close(features.image_features, expected.image_features.float(), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(features.mask_tokens.float(), expected.mask_tokens.float(), rtol=0.1, atol=0.1)
    # A cache that autocast filled serves without it.
    assert teacher.observe(batch).mask_tokens.dtype == torch.float32


def test_the_teacher_runs_with_the_prompts_of_the_student(tmp_path):
    """Prompts are often made in the loop: the batch has the images and their ids alone."""
    boxes = hf_batch()["input_boxes"]
    batch = {name: value for name, value in identified(hf_batch()).items() if name != "input_boxes"}
    model, losses = hf_sam(1), []
    student, infosam_loss = tap(model), InfoSAMLoss(DIM)
    for teacher in (tap(hf_sam()), CachedTeacher(tap(hf_sam()), tmp_path)):
        model(pixel_values=batch["pixel_values"], input_boxes=boxes)
        losses.append(infosam_loss(teacher, student, batch))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    without_prompts = infosam_loss(tap(hf_sam()).observe(batch), tap(hf_sam(1)), {**batch, "input_boxes": boxes})
    assert abs(without_prompts - losses[0]) > 5e-3


def test_images_of_another_batch_order_and_partly_cached_ones(tmp_path):
    model = hf_sam()
    calls = count_encoder_calls(model)
    teacher, whole = CachedTeacher(tap(model), tmp_path), hf_batch(3)
    part = {name: value[:2] for name, value in whole.items()}
    teacher.observe(identified(part, "a", "b"))
    mixed = {name: value[[1, 2, 0]] for name, value in whole.items()}
    features = teacher.observe(identified(mixed, "b", "c", "a"))
    assert calls == [2, 3]
    expected = tap(model).observe(mixed)
    torch.testing.assert_close(features.image_features, expected.image_features, rtol=1e-3, atol=1e-3)


def test_an_image_that_comes_twice_in_a_loop_is_encoded_once(tmp_path):
    item = {**meta_batch(1, 2)[0], "sample_id": "a"}
    model, encoded = meta_sam(), []
    # A hook of the encoder itself also sees what comes from the cache.
    next(model.image_encoder.children()).register_forward_hook(lambda *_: encoded.append(1))

    def call(sam: nn.Module, batch: list[dict[str, Tensor]]) -> list[Tensor]:
        return [mask for one in batch for mask in meta_forward(sam, [one])]

    expected = tap(model, call=call).observe([item, item])
    encoded.clear()
    features = CachedTeacher(tap(model, call=call), tmp_path).observe([item, item])
    assert len(encoded) == 1
    torch.testing.assert_close(features.image_features, expected.image_features, rtol=1e-3, atol=1e-3)


def test_metas_list_of_dicts_and_a_loop_of_ones_own(tmp_path):
    model, batch = meta_sam(), [{**item, "sample_id": i} for i, item in enumerate(meta_batch(3, 2))]
    calls = count_encoder_calls(model)

    def one_by_one(sam: nn.Module, batch: list) -> list[Tensor]:
        return [mask for item in batch for mask in meta_forward(sam, [item])]

    teacher = CachedTeacher(tap(model, call=one_by_one), tmp_path)
    first = teacher.observe(batch)
    assert calls == [1, 1, 1]
    second = teacher.observe(batch)
    assert calls == [1, 1, 1]
    assert torch.equal(first.mask_tokens, second.mask_tokens)
    assert first.image_index.tolist() == [0, 0, 1, 1, 2, 2]


def test_several_batches_and_ids_of_a_function_or_a_tensor(tmp_path):
    model, batches = hf_sam(), [hf_batch(2, seed=seed) for seed in range(2)]
    calls = count_encoder_calls(model)
    for batch in batches:
        batch["index"] = torch.arange(2) + 2 * int(batch is batches[1])
    by_name = CachedTeacher(tap(model), tmp_path, sample_ids="index")
    step = Step(ran=tuple(Call(batch=snapshot(batch)) for batch in batches))
    assert len(by_name.observe(step).mask_tokens) == 4
    by_function = CachedTeacher(tap(model), tmp_path, sample_ids=lambda batch: batch["index"].tolist())
    by_function.observe(step)
    CachedTeacher(tap(model), tmp_path, sample_ids=lambda batch: batch["index"].numpy()).observe(step)
    CachedTeacher(tap(model), tmp_path, sample_ids=lambda batch: list(batch["index"])).observe(step)
    assert calls == [2, 2]


# torch.compile looks at .grad of every tensor it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_teacher_answers_for_each_image_of_its_own(tmp_path):
    model = hf_sam()
    calls, plain = count_encoder_calls(model), tap(hf_sam())
    teacher = CachedTeacher(tap(torch.compile(model, backend="eager")), tmp_path)
    for seed in (0, 1, 0, 1):
        batch = hf_batch(2, seed=seed)
        features = teacher.observe(identified(batch, f"{seed} 0", f"{seed} 1"))
        expected = plain.observe(batch).image_features
        torch.testing.assert_close(features.image_features, expected, rtol=1e-3, atol=2e-3)
    assert calls == [2, 2]


def test_the_model_is_left_as_it_was(tmp_path):
    model, batch = hf_sam(), identified(hf_batch())
    teacher = CachedTeacher(tap(model), tmp_path)
    teacher.observe(batch)
    assert "forward" not in vars(model.vision_encoder)
    with pytest.raises(ValueError, match="one sample id per image that the encoder sees, got 3 ids and 2 images"):
        teacher.observe(identified(hf_batch(), 1, 2, 3))
    assert "forward" not in vars(model.vision_encoder)


def refusals_of_batches() -> dict[str, tuple[str, object]]:
    embeddings = {"image_embeddings": torch.zeros(2, DIM, 4, 4), "input_boxes": hf_batch()["input_boxes"]}
    return {
        "no ids": (r"'sample_id' of the batch must be one id .* per image, got None", hf_batch()),
        "floats": (r"must be one id .* got tensor\(\[0\., 1\.\]\)", {**hf_batch(), "sample_id": torch.arange(2.0)}),
        "too few": ("got 1 ids and 2 images", identified(hf_batch(), "a")),
        "embeddings": ("got 2 ids and 0 images", {**embeddings, "sample_id": ["a", "b"]}),
    }


@pytest.mark.parametrize("case", refusals_of_batches())
def test_batches_without_an_id_per_image_are_refused(case, tmp_path):
    pattern, batch = refusals_of_batches()[case]
    with pytest.raises(ValueError, match=pattern):
        CachedTeacher(tap(hf_sam()), tmp_path).observe(batch)


def test_other_weights_are_never_used(tmp_path):
    batch, model = identified(hf_batch()), hf_sam()
    teacher = CachedTeacher(tap(model), tmp_path)
    teacher.observe(batch)
    with pytest.raises(ValueError, match="the encoder weights of .* must be .*a folder of its own"):
        CachedTeacher(tap(hf_sam(1)), tmp_path).observe(batch)
    # Also where they change while the teacher is there.
    model.load_state_dict(hf_sam(1).state_dict())
    with pytest.raises(ValueError, match="the encoder weights of"):
        teacher.observe(batch)


def test_another_preprocessing_dtype_or_image_size_is_never_used(tmp_path):
    batch, model = identified(hf_batch()), hf_sam()
    CachedTeacher(tap(model), tmp_path, preprocessing="mean 0").observe(batch)
    with pytest.raises(ValueError, match="the preprocessing of .* must be 'mean 1', got 'mean 0'"):
        CachedTeacher(tap(model), tmp_path, preprocessing="mean 1").observe(batch)
    with pytest.raises(ValueError, match=r"the dtype of .* must be 'torch.bfloat16', got 'torch.float16'"):
        CachedTeacher(tap(model), tmp_path, preprocessing="mean 0", dtype=torch.bfloat16).observe(batch)
    larger = {**batch, "pixel_values": torch.randn(2, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE)}
    with pytest.raises(ValueError, match=r"the image size of .* must be '\(3, 64, 64\)', got '\(3, 32, 32\)'"):
        CachedTeacher(tap(model), tmp_path, preprocessing="mean 0").observe(larger)


def test_a_flipped_image_under_the_same_id_is_noticed(tmp_path):
    batch, teacher = identified(hf_batch()), None
    teacher = CachedTeacher(tap(hf_sam()), tmp_path)
    teacher.observe(batch)
    flipped = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    with pytest.raises(ValueError, match="sample 'image 0' must be the image that was cached.*got other pixels"):
        teacher.observe(flipped)
    unchecked = CachedTeacher(tap(hf_sam()), tmp_path, check_pixels=False)
    assert torch.equal(unchecked.observe(flipped).image_features, teacher.observe(batch).image_features)


@pytest.mark.parametrize("change", ["flip", "move", "brighter"])
def test_augmentations_of_a_mostly_empty_image_are_noticed(tmp_path, change):
    images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    images[:, :, 3:7, 5:9] = 1
    batch = identified({"pixel_values": images, "input_boxes": torch.tensor([[[2.0, 2.0, 20.0, 20.0]]])}, "a")
    teacher = CachedTeacher(tap(hf_sam()), tmp_path)
    teacher.observe(batch)
    changed = {"flip": images.flip(-1), "move": images.roll(2, -1), "brighter": images * 1.015}[change]
    with pytest.raises(ValueError, match="got other pixels"):
        teacher.observe({**batch, "pixel_values": changed})
    # What another dtype rounds is no other image.
    teacher.observe({**batch, "pixel_values": (images + 1e-4 * torch.randn_like(images))})


def test_a_refused_batch_leaves_nothing_behind(tmp_path):
    teacher = CachedTeacher(tap(hf_sam()), tmp_path)
    with pytest.raises(ValueError, match="got 3 ids and 2 images"):
        teacher.observe(identified(hf_batch(), "z", "a", "b"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="sample 'a' must be the image"):
        teacher.observe(identified(hf_batch(), "a", "a"))
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_takes_more_than_images_is_refused(tmp_path):
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_encoder, self.text = nn.Bilinear(8, 8, DIM), nn.Linear(8, DIM)

        def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
            return self.vision_encoder(pixels, text) + self.text(text)

    take = ("vision_encoder", lambda output: output[:, :, None, None])
    teacher = CachedTeacher(tap(Conditioned(), image_features=take, mask_tokens="text"), tmp_path)
    batch = {"pixels": torch.randn(2, 8), "text": torch.randn(2, 8), "sample_id": [0, 1]}
    with pytest.raises(ValueError, match="must be called with one tensor, its images, got 2"):
        teacher.observe(batch)


def test_weights_of_another_class_of_tensors_are_refused(tmp_path):
    class Quantised(Tensor):
        pass

    model = hf_sam().requires_grad_(False)
    neck = model.vision_encoder.neck.layer_norm1
    neck.weight = nn.Parameter(neck.weight.detach().as_subclass(Quantised), requires_grad=False)
    with pytest.raises(TypeError, match=r"weights must be plain tensors, got .* at 'neck.layer_norm1.weight'"):
        CachedTeacher(tap(model), tmp_path).observe(identified(hf_batch()))


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    batch, teacher = identified(hf_batch()), CachedTeacher(tap(hf_sam()), tmp_path)
    teacher.observe(batch)
    path = next(tmp_path.glob("image_0-*"))
    path.write_bytes(path.read_bytes()[:-9])
    damaged = path.read_bytes()

    def half(_tensors: dict, _metadata: dict) -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder_cache, "packed", half)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(KeyboardInterrupt):
        teacher.observe(batch)
    assert path.read_bytes() == damaged
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"] * 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_said_and_written_again(tmp_path, damage):
    batch, teacher = identified(hf_batch()), CachedTeacher(tap(hf_sam()), tmp_path)
    expected = teacher.observe(batch)
    path = next(tmp_path.glob("image_1-*"))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-7], "empty": b"", "text": b"not a tensor" * 40}[damage])
    with pytest.warns(UserWarning, match=r"image_1-.* must be a whole file, got a damaged one"):
        actual = teacher.observe(batch)
    assert torch.equal(actual.image_features, expected.image_features)
    # Mended: nothing more is said of it.
    assert torch.equal(teacher.observe(batch).image_features, expected.image_features)
    assert len(path.read_bytes()) == len(whole)


def test_a_foreign_file_is_refused_and_kept(tmp_path):
    from safetensors.torch import save_file

    batch, teacher = identified(hf_batch()), CachedTeacher(tap(hf_sam()), tmp_path)
    teacher.observe(batch)
    path = next(tmp_path.glob("image_0-*"))
    save_file({"0": torch.zeros(DIM, 4, 4)}, path)
    foreign = path.read_bytes()
    with pytest.raises(ValueError, match="the format of .* must be 'renyi_kd encoder output 2', got None"):
        teacher.observe(batch)
    assert path.read_bytes() == foreign


def test_ids_that_look_alike_as_file_names_are_kept_apart(tmp_path):
    batch, teacher = hf_batch(), CachedTeacher(tap(hf_sam()), tmp_path)
    features = teacher.observe(identified(batch, "a/b", "a_b"))
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(teacher.observe(identified(batch, "a/b", "a_b")).image_features, features.image_features)
    long = "x" * 300
    teacher.observe(identified(batch, f"{long}1", f"{long}2"))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_what_is_kept_of_an_image_is_its_own_memory(tmp_path, dtype):
    # Also in the dtype of the cache, and where an encoder returns one tensor twice.
    output = torch.arange(12).view(4, 3).to(dtype)
    leaves, structure = tree_flatten((output[1], output[1]))
    entry = EncoderCache(tmp_path, preprocessing="", dtype=torch.float16).entry("a", leaves, structure, output[1])
    assert all(torch.equal(leaf, output[1]) for leaf in entry.leaves)
    assert [leaf.untyped_storage().nbytes() for leaf in entry.leaves] == [leaf.nbytes for leaf in entry.leaves]
    assert len({leaf.data_ptr() for leaf in (output[1], *entry.leaves)}) == 3


def test_features_that_fp16_cannot_hold_are_refused(tmp_path):
    model = hf_sam()
    model.vision_encoder.register_forward_hook(
        lambda _module, _args, output: type(output)(last_hidden_state=output.last_hidden_state)
    )
    with torch.no_grad():
        model.vision_encoder.neck.layer_norm2.weight.mul_(1e6)
    batch = identified(hf_batch())
    with pytest.raises(ValueError, match=r"must be finite in torch.float16, got values up to .*dtype=torch.bfloat16"):
        CachedTeacher(tap(model), tmp_path).observe(batch)
    assert list(tmp_path.iterdir()) == []
    assert CachedTeacher(tap(model), tmp_path, dtype=torch.bfloat16).observe(batch).image_features.isfinite().all()


def test_the_folder_stays_where_another_directory_is_gone_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch, teacher = identified(hf_batch()), CachedTeacher(tap(hf_sam()), "features")
    (tmp_path / "run" / "features").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    teacher.observe(batch)
    assert len(list((tmp_path / "features").iterdir())) == 2
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "features"]


def test_a_folder_may_be_of_the_users_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("~/features", "~nobody here"):
        CachedTeacher(tap(hf_sam()), folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["features", "home", "~nobody here"]


def test_other_arguments_of_the_cache_are_refused(tmp_path):
    with pytest.raises(TypeError, match="teacher must be the tap of a frozen model, got SamModel"):
        CachedTeacher(hf_sam(), tmp_path)
    with pytest.raises(TypeError, match=r"dtype must be torch.float16 or torch.bfloat16, got torch.float32"):
        CachedTeacher(tap(hf_sam()), tmp_path, dtype=torch.float32)
    two_towers = nn.ModuleDict({"image": nn.Conv2d(3, DIM, 8, 8), "text": nn.Linear(5, DIM)})
    named = tap(two_towers, image_features="image", mask_tokens="text")
    with pytest.raises(ValueError, match="must have an image encoder, got ModuleDict without image_encoder or"):
        CachedTeacher(named, tmp_path)
    with pytest.raises(ValueError, match="encoder must name a module of the model, got 'pixels'"):
        CachedTeacher(named, tmp_path, encoder="pixels")
    student = tap(hf_sam(1))
    with pytest.raises(ValueError, match="must be models of their own"):
        InfoSAMLoss(DIM)(CachedTeacher(student, tmp_path), student, identified(hf_batch()))


def test_a_parameter_that_came_later_and_is_not_trained_is_none_of_the_adapters():
    model = lora(hf_sam())
    teacher = AdapterDisabled(tap(model))
    model.base_model.model.note = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert teacher.observe(hf_batch()).mask_tokens.isfinite().all()


@pytest.mark.parametrize(("make", "name"), [(hf_sam, "SamModel"), (meta_sam, "Sam")])
def test_adapters_that_nobody_can_switch_off_at_once_are_no_peft_model(make, name):
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv"]), make())
    with pytest.raises(ValueError, match=f"student must hold a peft model, got {name} without one"):
        AdapterDisabled(tap(model))


# the protocol


def test_anything_that_observes_a_step_is_a_teacher():
    class Constant:
        def observe(self, step: Step) -> SAMFeatures:
            return SAMFeatures(torch.randn(2, DIM, 4, 4), torch.randn(2, 1, DIM))

    loss = InfoSAMLoss(DIM, token="first")
    assert loss(Constant(), tap(hf_sam()), hf_batch()).isfinite()
    with pytest.raises(TypeError, match="teacher must be a tap or SAMFeatures, got SamModel"):
        loss(hf_sam(), tap(hf_sam(1)), hf_batch())
