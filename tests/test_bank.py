"""The bank of samples: a step's loss is that of its own samples and earlier ones, which are constants."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from renyi_kd import InfoSAMLoss, Objective, SAMFeatures, infosam_terms
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.gram_terms import gram_terms
from renyi_kd.samples.bank import SampleBank
from renyi_kd.samples.samples import Samples
from tests.support import gradients, in_training, randn, relation_module, sam_features, to
from tests.support.memory import LargestNewTensor
from tests.support.tolerance import assert_close_on_scale

DIM = 12


def with_bank(size: int, **settings) -> InfoSAMLoss:
    infosam = InfoSAMLoss(DIM, bank_size=size, **settings).double()
    infosam.relation = relation_module(dtype=torch.float64)
    return infosam


def step(seed: int, n: int = 2, **settings) -> tuple[SAMFeatures, SAMFeatures]:
    """Return features of teacher and student."""
    return tuple(sam_features(n, seed=s, dtype=torch.float64, **settings) for s in (seed, seed + 1000))


def together(*parts: SAMFeatures) -> SAMFeatures:
    """Return the samples of all parts as one batch."""
    index, n_images = [], 0
    for part in parts:
        own = range(len(part.mask_tokens)) if part.image_index is None else part.image_index.tolist()
        index += [n_images + image for image in own]
        n_images += len(part.image_features)
    return SAMFeatures(
        torch.cat([part.image_features for part in parts]),
        torch.cat([part.mask_tokens for part in parts]),
        torch.tensor(index),
    )


def rows(features: SAMFeatures, wanted: list[int]) -> SAMFeatures:
    return features._replace(
        image_features=features.image_features[wanted], mask_tokens=features.mask_tokens[wanted], image_index=None
    )


@pytest.mark.parametrize(
    ("distillation", "alpha"),
    [*product(["mutual_information", "cauchy_schwarz"], [1.0, 2.0]), ("debiased", 2.0), ("debiased", 3.0)],
)
def test_a_step_is_that_of_its_samples_and_the_last_ones(alpha, distillation):
    settings = {"alpha": alpha, "distillation": distillation}
    infosam = with_bank(3, **settings)
    steps = [step(0), step(10), step(20)]
    for teacher, student in steps[:2]:
        infosam(teacher, in_training(student))
    own = in_training(steps[2][1])
    terms = infosam.terms(steps[2][0], own)
    teacher, student = (
        together(of_steps[2], of_steps[1], rows(of_steps[0], [0])) for of_steps in zip(*steps, strict=True)
    )
    whole = in_training(student)
    expected = infosam_terms(infosam.relation, teacher, whole, **settings)
    for value, target in zip(terms, expected, strict=True):
        assert value.item() == pytest.approx(target.item(), rel=1e-12)
    of_own = gradients(terms.loss, own, infosam.relation)[0]
    of_whole = gradients(expected.loss, whole, infosam.relation)[0]
    for name, value in of_own.items():
        assert_close_on_scale(value, of_whole[name][:2], name=name, rtol=1e-10)
    without = with_bank(0, **settings)
    without(teacher, whole)
    for value, target in zip(infosam.diagnostics()[:5], without.diagnostics()[:5], strict=True):
        assert value.item() == pytest.approx(target.item(), rel=1e-12)


def test_earlier_samples_give_the_module_no_gradient():
    infosam = with_bank(4)
    (old_teacher, old_student), (teacher, student) = step(0), step(10)
    infosam(old_teacher, in_training(old_student))
    own = in_training(student)
    found = gradients(infosam(teacher, own), own, infosam.relation)[1]
    again = in_training(student)
    relation = infosam.relation

    def scores(new: SAMFeatures, old: SAMFeatures) -> torch.Tensor:
        return torch.cat([relation.scores(*new[:2]), relation.scores(*old[:2]).detach()])

    both = together(teacher, old_teacher)
    loss = gram_terms(
        batch_gram(both.image_features),
        batch_gram(both.mask_tokens),
        scores(teacher, old_teacher),
        scores(again, old_student),
        Objective(),
    ).loss
    expected = gradients(loss, again, relation)[1]
    for name, value in found.items():
        assert_close_on_scale(value, expected[name], name=name, rtol=1e-9)


def test_prompts_of_one_image_share_its_map_in_the_bank():
    infosam = with_bank(3)
    first, second = step(0, image_index=[2, 0, 2, 1]), step(10)
    infosam(first[0], in_training(first[1]))
    loss = infosam(second[0], in_training(second[1]))
    teacher, student = (
        together(new, old._replace(mask_tokens=old.mask_tokens[:3], image_index=old.image_index[:3]))
        for new, old in zip(second, first, strict=True)
    )
    expected = infosam_terms(infosam.relation, teacher, in_training(student)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_no_index_is_copied_to_the_device_to_keep_samples():
    """For a copy of numbers of the host to a GPU the host waits, in every step."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    maps, tokens, scores = randn(3, DIM, 5, 7), randn(4, 1, DIM), randn(4, 35)
    bank = SampleBank(3)
    with Names():
        bank.join(Samples(maps, [2, 0, 2, 1], tokens, scores, scores, None, False))
    assert torch.equal(bank.get_extra_state()[0], maps[[0, 2]])
    assert not {"aten::index", "aten::index_select", "aten::lift_fresh"} & set(names), names


def test_batches_of_one_sample():
    infosam = with_bank(4)
    losses, largest = [], []
    for seed in range(3):
        teacher, student = step(10 * seed, n=1)
        own = in_training(student)
        loss = infosam(teacher, own)
        of_student, of_module = gradients(loss, own, infosam.relation)
        losses.append(loss.item())
        largest.append(max(value.abs().max().item() for value in (*of_student.values(), *of_module.values())))
        assert torch.stack(infosam.diagnostics()[:5]).isfinite().all()
    assert losses[0] == largest[0] == 0
    assert min(largest[1:]) > 1e-5
    assert losses[2] < losses[1] < -0.1


def test_evaluation_sees_the_bank_and_does_not_fill_it():
    infosam = with_bank(4)
    (old_teacher, old_student), (teacher, student) = step(0), step(10)
    infosam(old_teacher, in_training(old_student))
    with torch.no_grad():
        values = [infosam(teacher, student) for _ in range(2)]
    assert torch.equal(*values)
    whole = together(teacher, old_teacher), in_training(together(student, old_student))
    assert values[0].item() == pytest.approx(infosam_terms(infosam.relation, *whole).loss.item(), rel=1e-12)


def test_a_single_sample_of_another_kind_is_warned_of():
    infosam = with_bank(4)
    (teacher, student), (other_teacher, other_student) = step(0, n=1), step(10, n=1, size=(4, 4))
    infosam(teacher, in_training(student))
    with pytest.warns(UserWarning, match=r"got \[12, 4, 4\] .* after \[12, 5, 7\] .*; the loss .* is 0"):
        assert infosam(other_teacher, in_training(other_student)).item() == 0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("auto", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast(half, auto):
    infosam = InfoSAMLoss(DIM, bank_size=2)
    with torch.autocast("cpu", auto):
        for seed in (0, 10):
            own = in_training(to(step(seed)[1], half))
            teacher = to(step(seed)[0], half)
            loss = infosam(teacher, own)
    whole = (together(*(to(step(seed)[i], half) for seed in (10, 0))) for i in range(2))
    with torch.no_grad():
        expected = infosam_terms(infosam.relation, *whole).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_buffer_of_the_teacher_may_be_written_again():
    infosam, other = with_bank(4), with_bank(4)
    buffer = step(0)[0]
    for seed in (0, 10):
        teacher, student = step(seed)
        buffer.image_features.copy_(teacher.image_features)
        buffer.mask_tokens.copy_(teacher.mask_tokens)
        losses = [infosam(buffer, in_training(student)), other(teacher, in_training(student))]
    assert torch.equal(*losses)


def test_the_bank_keeps_no_more_maps_than_samples():
    def bytes_of(image_index: list[int]) -> int:
        """Return how much larger than an empty one a bank of three samples is, once it is full."""
        infosam = with_bank(3)
        empty = len(pickle.dumps(infosam))
        for seed in (0, 10, 20):
            teacher, student = step(seed, image_index=image_index, size=(16, 16))
            infosam(teacher, in_training(student))
        return len(pickle.dumps(infosam)) - empty

    of_map, of_scores = 8 * DIM * 16 * 16, 8 * 2 * 16 * 16
    for image_index, n_images in (([0, 1, 2, 3], 3), ([2, 0, 2, 1], 2)):
        assert 0 < bytes_of(image_index) - n_images * of_map - 3 * of_scores < of_map / 4


def samples_of_a_step(seed: int, images: list[int] | None = None, dtype: torch.dtype = torch.float32) -> Samples:
    """Return those of maps of a released SAM, four where nothing says whose they are."""
    n_images, n_samples = (4, 4) if images is None else (max(images) + 1, len(images))
    return Samples(
        randn(n_images, 256, 64, 64, seed=seed, dtype=dtype),
        images,
        randn(n_samples, 1, 256, seed=seed + 1, dtype=dtype),
        *(randn(n_samples, 1, 64 * 64, seed=seed + i) for i in (2, 3)),
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)])
def test_the_size_of_a_sample_is_what_its_docstring_says(dtype, size):
    bank = SampleBank(3)
    for seed in (0, 10):
        own = samples_of_a_step(seed, dtype=dtype)
        bank.join(own)
    held = {value.untyped_storage() for value in bank._past if isinstance(value, torch.Tensor)}
    of_a_sample = sum(storage.nbytes() for storage in held) / 3
    assert of_a_sample == 256 * 64 * 64 * size + 1 * 256 * size + 2 * 1 * 64 * 64 * 4
    kind = "fp32" if size == 4 else "half precision"
    assert f"{of_a_sample / 2**20:.2f} MiB in {kind}" in " ".join(SampleBank.__doc__.split())
    # In half precision too nothing is lost.
    assert torch.equal(bank._past.image_features, own.image_features[:3])


@pytest.mark.parametrize(("images", "kept"), [(None, 3), ([0, 0, 1, 1, 2, 3], 2)])
def test_maps_are_copied_once_to_be_joined_and_once_to_be_kept(images, kept):
    bank = SampleBank(3)
    bank.join(samples_of_a_step(0, images))
    own = samples_of_a_step(10, images)
    with LargestNewTensor() as new:
        bank.join(own)
    of_a_map = own.image_features[0].nbytes
    assert [size / of_a_map for size in new.sizes if size >= of_a_map] == [4 + kept, kept]


@pytest.mark.parametrize("member", ["image_features", "mask_tokens"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_step_alone(member, value):
    infosam = with_bank(4)
    teacher, student = step(0)
    getattr(teacher, member)[0] = value
    assert not infosam(teacher, in_training(student)).isfinite()
    teacher, student = step(10)
    own = in_training(student)
    terms = infosam.terms(teacher, own)
    assert -2 <= terms.compression <= 0
    for gradient in gradients(terms.loss, own, infosam.relation)[0].values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("change", [{"size": (4, 4)}, {"n_tokens": 2}, "dtype"], ids=str)
def test_samples_of_another_kind_are_forgotten(change):
    infosam = with_bank(4, token="all")
    teacher, student = step(0)
    infosam(teacher, in_training(student))
    others = step(10) if change == "dtype" else step(10, **change)
    if change == "dtype":
        others = [features._replace(image_features=features.image_features.float()) for features in others]
    loss = infosam(others[0], in_training(others[1]))
    assert torch.equal(loss, infosam_terms(infosam.relation, others[0], in_training(others[1])).loss)
    again = infosam(others[0], in_training(others[1]))
    assert not torch.equal(again, loss)


def test_copies_and_checkpoints():
    infosam = with_bank(4)
    for seed in (0, 10):
        teacher, student = step(seed)
        infosam(teacher, in_training(student))
    assert infosam.state_dict().keys() - InfoSAMLoss(DIM).state_dict().keys() == {"bank._extra_state"}
    teacher, student = step(20)
    copies = copy.deepcopy(infosam), pickle.loads(pickle.dumps(infosam)), infosam
    losses = [each(teacher, in_training(student)) for each in copies]
    assert losses[0] == losses[1] == losses[2]
    assert [each.bank_size for each in copies] == [4, 4, 4]
    assert "global_batch=False, bank_size=4" in repr(infosam)
    assert InfoSAMLoss(DIM).bank_size == 0


def test_a_checkpoint_keeps_which_samples_share_a_map():
    infosam, loaded = with_bank(3), with_bank(3)
    teacher, student = step(0, image_index=[2, 0, 2, 1])
    infosam(teacher, in_training(student))
    assert infosam.bank.get_extra_state()[1] == [1, 0, 1]
    loaded.load_state_dict(infosam.state_dict())
    again = step(10)
    losses = [module(again[0], in_training(again[1])) for module in (loaded, infosam)]
    assert losses[0] == losses[1]


# torch.compile looks at .grad of every tensor it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_under_a_compiler_the_graph_breaks_at_the_bank():
    infosam = with_bank(4)
    compiled = copy.deepcopy(infosam)
    run = torch.compile(compiled, backend="eager")
    for seed in (0, 10, 20):
        teacher, student = step(seed)
        one, other = in_training(student), in_training(student)
        for module, leaf in ((run, one), (infosam, other)):
            module(teacher, leaf).backward()
        assert torch.equal(one.image_features.grad, other.image_features.grad)


@pytest.mark.parametrize("size", [-1, 1.5, True, None])
def test_refusals(size):
    with pytest.raises(ValueError, match="bank_size must be a number of samples, got"):
        InfoSAMLoss(DIM, bank_size=size)


def test_a_step_needs_a_sample_of_its_own_beside_the_bank():
    infosam, (teacher, student) = with_bank(3), step(0)
    infosam(teacher, in_training(student))
    nothing = [SAMFeatures(side.image_features[:0], side.mask_tokens[:0]) for side in (teacher, student)]
    with pytest.raises(ValueError, match=r"image_features must have shape \[b, d, h, w\] without zeros, got \(0,"):
        infosam(nothing[0], in_training(nothing[1]))


def test_samples_are_joined_only_where_there_are_others():
    assert with_bank(1)._scope.joins is True
    assert InfoSAMLoss(DIM)._scope.joins is False
    assert InfoSAMLoss(DIM, global_batch=True)._scope.joins is False
