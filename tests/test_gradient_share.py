"""The share of the loss in the gradient: against gradients taken apart, in every kind of loop."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from renyi_kd import InfoSAMLoss, InfoSAMTerms, SAMFeatures, infosam_terms, tap
from renyi_kd.objective import Distillation
from tests.support import in_training, randn, sam_features
from tests.support.memory import LargestNewTensor
from tests.support.models import DIM, IMAGE_SIZE, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam
from tests.support.stand_ins import auto_gluon, one_hypernetwork

FEATURES = 12


class Kept:
    """The tensors that the loss reads of a model, as hooks of the test see them."""

    def __init__(self, decoder: nn.Module) -> None:
        self.maps: list[Tensor] = []
        self.tokens: list[Tensor] = []

        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.maps.append(kwargs["image_embeddings"])

        decoder.register_forward_pre_hook(keep, with_kwargs=True)
        for network in decoder.output_hypernetworks_mlps:
            network.register_forward_pre_hook(lambda _module, args: self.tokens.append(args[0]))


def norm(gradients: Any) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))


def share_of_tokens(loss: Tensor, task: Tensor, tokens: list[Tensor]) -> float:
    """Return the share at the mask tokens by two backward passes."""
    own, of_task = (
        torch.autograd.grad(value, tokens, retain_graph=True, materialize_grads=True) for value in (loss, task)
    )
    return norm(own) / norm(of_task)


def teacher_of(n_images: int, n_samples: int, image_index: Tensor | None = None, n_tokens: int = 4) -> SAMFeatures:
    return SAMFeatures(randn(n_images, DIM, 4, 4, seed=70), randn(n_samples, n_tokens, DIM, seed=71), image_index)


def task_of(masks: Any) -> Tensor:
    masks = masks if isinstance(masks, Tensor) else torch.cat([each.flatten() for each in masks])
    return 0.1 * masks.square().mean()


# Of features given as such.


@pytest.mark.parametrize(
    ("shape", "layout", "looked_at"),
    [
        ((12, 5, 7), torch.contiguous_format, (slice(None), slice(None))),
        ((100, 16, 8), torch.contiguous_format, (slice(42, 58), slice(None, None, 2))),
        ((100, 17, 4), torch.channels_last, (slice(42, 58), slice(None, None, 2))),
        ((17, 8, 4), torch.channels_last, (slice(16), slice(None))),
    ],
    ids=["small", "channels first", "channels last", "few rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_share_of_features_is_that_of_gradients_taken_apart(shape, layout, looked_at, dtype):
    dim, *size = shape
    teacher, given = (sam_features(seed=seed, dim=dim, size=tuple(size), dtype=dtype) for seed in (0, 10))
    student = in_training(given._replace(image_features=given.image_features.to(memory_format=layout)))
    infosam = InfoSAMLoss(dim).to(dtype)
    wanted = SAMFeatures(randn(4, *shape, seed=20, dtype=dtype), randn(4, 1, dim, seed=21, dtype=dtype))
    task = sum(((a - b) ** 2).sum() for a, b in zip(student[:2], wanted[:2], strict=True)) / 1000
    terms = infosam.terms(teacher, student)
    assert terms.diagnostics().image_features_share is None
    (3 * terms.loss + task).backward(retain_graph=True)
    state = terms.diagnostics()
    own, of_task = (torch.autograd.grad(value, student[:2], retain_graph=True) for value in (terms.loss, task))
    part = (slice(None), *looked_at)
    expected = 3 * norm([own[0][part]]) / norm([of_task[0][part]])
    assert state.image_features_share.item() == pytest.approx(expected, rel=1e-4)
    assert state.mask_tokens_share.item() == pytest.approx(3 * norm([own[1]]) / norm([of_task[1]]), rel=1e-4)
    # An estimate where some are left out.
    assert state.image_features_share.item() == pytest.approx(3 * norm([own[0]]) / norm([of_task[0]]), rel=0.25)
    assert not state.mask_tokens_share.requires_grad


@pytest.mark.parametrize("token", ["first", 2, "all"])
def test_task_counts_at_all_mask_tokens(token):
    """A decoder that gives several masks trains others than the first, which the loss reads."""
    teacher, student = sam_features(seed=0, n_tokens=3), in_training(sam_features(seed=10, n_tokens=3))
    infosam = InfoSAMLoss(FEATURES, token=token)
    terms = infosam.terms(teacher, student)
    task = task_of(student.mask_tokens[:, 1:])
    (terms.loss + task).backward(retain_graph=True)
    share = terms.diagnostics().mask_tokens_share.item()
    assert share == pytest.approx(share_of_tokens(terms.loss, task, [student.mask_tokens]), rel=1e-4)


def test_the_loss_itself_is_untouched():
    teacher, plain, watched = sam_features(seed=0), *(in_training(sam_features(seed=10)) for _ in range(2))
    infosam = InfoSAMLoss(FEATURES)
    expected = infosam_terms(infosam.relation, teacher, plain)
    actual = infosam.terms(teacher, watched)
    assert all(map(torch.equal, actual, expected))
    for loss in (actual.loss, expected.loss):
        loss.backward()
    assert torch.equal(watched.image_features.grad, plain.image_features.grad)
    assert torch.equal(watched.mask_tokens.grad, plain.mask_tokens.grad)


# Through taps.


def test_share_of_a_tapped_model():
    model, batch = hf_sam(), hf_batch(3)
    kept, student, infosam = Kept(model.mask_decoder), tap(model), InfoSAMLoss(DIM)
    task = task_of(student(batch).pred_masks)
    terms = infosam.terms(teacher_of(3, 3), student)
    # The map's own gradient is that of features without a decoder behind them.
    alone = SAMFeatures(kept.maps[0].detach().requires_grad_(), kept.tokens[0].detach().flatten(0, 1)[:, None])
    teacher = teacher_of(3, 3, n_tokens=1)._replace(mask_tokens=teacher_of(3, 3).mask_tokens[:, :1])
    own = torch.autograd.grad(InfoSAMLoss(DIM)(teacher, alone), alone.image_features)
    (terms.loss + task).backward(retain_graph=True)
    state = infosam.diagnostics()
    expected = share_of_tokens(terms.loss, task, kept.tokens)
    total = torch.autograd.grad(terms.loss + task, kept.maps, retain_graph=True)
    assert state.mask_tokens_share.item() == pytest.approx(expected, rel=1e-4)
    assert state.image_features_share.item() == pytest.approx(norm(own) / norm([total[0] - own[0]]), rel=1e-4)


def first_token_in_double(features: SAMFeatures) -> SAMFeatures:
    return features._replace(
        image_features=features.image_features.double(), mask_tokens=features.mask_tokens[:, :1].double()
    )


@pytest.mark.parametrize("change", [lambda features: features, first_token_in_double], ids=["as they are", "changed"])
def test_share_of_features_that_were_taken_from_a_tap(change):
    model, batch = hf_sam(), hf_batch(3)
    student, expected = tap(model), shares(one_step(hf_sam(), hf_batch(3))[1])
    task = task_of(student(batch).pred_masks)
    teacher = teacher_of(3, 3)
    terms = InfoSAMLoss(DIM).terms(change(teacher), change(student.take()))
    (terms.loss + task).backward()
    assert shares(terms) == pytest.approx(expected, rel=1e-4)


def decoded_three_times(model: nn.Module, batch: Any) -> list[Tensor]:
    return [mask for _ in range(3) for mask in meta_forward(model, batch)]


def maps_of_one(model: nn.Module, batch: Any) -> list[Tensor]:
    return meta_forward(model, batch)


def clicks_on_one_map(model: nn.Module, batch: Any) -> list[Tensor]:
    image = model.image_encoder(batch[0]["image"][None])
    masks = []
    for item in batch:
        sparse, dense = model.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
        masks.append(
            model.mask_decoder(
                image_embeddings=image,
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )[0]
        )
    return masks


@pytest.mark.parametrize(
    ("call", "teacher"),
    [
        (maps_of_one, teacher_of(3, 3)),
        (decoded_three_times, teacher_of(9, 9)),
        (clicks_on_one_map, teacher_of(1, 3, torch.zeros(3, dtype=torch.int64))),
    ],
    ids=["one map in parts", "maps of their own", "clicks on one map"],
)
def test_share_of_several_decoder_calls(call: Callable[[nn.Module, Any], list[Tensor]], teacher):
    model = meta_sam()
    kept, student, infosam = Kept(model.mask_decoder), tap(model, call=call), InfoSAMLoss(DIM)
    task = task_of(call(model, meta_batch(3, 1)))
    terms = infosam.terms(teacher, student)
    (terms.loss + task).backward(retain_graph=True)
    state = terms.diagnostics()
    expected = share_of_tokens(terms.loss, task, kept.tokens)
    assert len(kept.tokens) == 4 * len(teacher.mask_tokens)
    assert state.mask_tokens_share.item() == pytest.approx(expected, rel=1e-4)
    assert 0 < state.image_features_share < math.inf


@pytest.mark.parametrize(
    "make", [auto_gluon, partial(one_hypernetwork, True), partial(one_hypernetwork, False)], ids=["all", "one", "each"]
)
@pytest.mark.parametrize("token", [0, 2])
def test_share_where_a_hypernetwork_takes_several_tokens(make, token):
    model, seen = make(), []
    networks = model.mask_decoder.output_hypernetworks_mlps
    network = networks[0] if isinstance(networks, nn.ModuleList) else networks
    network.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    student, infosam = tap(model), InfoSAMLoss(DIM, token=token)
    task = task_of(student(randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, seed=1))[0])
    terms = infosam.terms(teacher_of(2, 2, n_tokens=5 if make is auto_gluon else 4), student)
    (terms.loss + task).backward(retain_graph=True)
    share = terms.diagnostics().mask_tokens_share.item()
    assert share == pytest.approx(share_of_tokens(terms.loss, task, seen), rel=1e-4)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, DIM, 8, 8)
        self.text = nn.Linear(5, 3 * DIM)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.image(image).mean((2, 3)) * self.text(text)[:, :DIM]


PLACES: dict[str, tuple[Any, Any, bool]] = {
    "a view of the output": (lambda output: output, lambda output: output[:, :DIM], True),
    "a computed value": (lambda output: output * 1, lambda output: output[:, :DIM] + 0, False),
}


@pytest.mark.parametrize(("image", "text", "known"), PLACES.values(), ids=PLACES)
def test_share_of_places_that_were_named(image, text, known):
    model = TwoTowers()
    student = tap(model, image_features=("image", image), mask_tokens=("text", text))
    infosam, outputs = InfoSAMLoss(DIM), []
    model.text.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    task = task_of(student(randn(4, 3, 32, 32, seed=1), randn(4, 5, seed=2)))
    terms = infosam.terms(teacher_of(4, 4, n_tokens=1), student)
    (terms.loss + task).backward(retain_graph=True)
    state = terms.diagnostics()
    own, of_task = (torch.autograd.grad(value, outputs, retain_graph=True)[0] for value in (terms.loss, task))
    if known:
        expected = norm([own[:, :DIM]]) / norm([of_task[:, :DIM]])
        assert state.mask_tokens_share.item() == pytest.approx(expected, rel=1e-4)
        assert 0 < state.image_features_share < math.inf
    else:
        assert state.mask_tokens_share is state.image_features_share is None


@pytest.mark.parametrize("name", ["whole", "part"])
def test_share_of_a_view_that_has_others_beside_it(name):
    class Text(nn.Linear):
        def forward(self, text: Tensor) -> dict[str, Tensor]:
            whole = super().forward(text)
            return {"beside": whole[:, DIM:], "part": whole[:, : 2 * DIM], "whole": whole}

    class Towers(TwoTowers):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return self.image(image).mean((2, 3)) * self.text(text)[name][:, :DIM]

    model, outputs = Towers(), []
    model.text = Text(5, 3 * DIM)
    student = tap(model, image_features="image", mask_tokens=("text", lambda output: output[name][:, :DIM]))
    model.text.register_forward_hook(lambda _module, _args, output: outputs.append(output[name]))
    task = task_of(student(randn(4, 3, 32, 32, seed=1), randn(4, 5, seed=2)))
    terms = InfoSAMLoss(DIM).terms(teacher_of(4, 4, n_tokens=1), student)
    (terms.loss + task).backward(retain_graph=True)
    share = terms.diagnostics().mask_tokens_share.item()
    assert share == pytest.approx(share_of_tokens(terms.loss, task, outputs), rel=1e-4)


class OneOfTwo(nn.Module):
    """Gives two tensors of one memory, or one tensor whose rows are one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.both = nn.Linear(5, 2 * DIM)
        self.query = nn.Parameter(randn(1, 3, DIM, seed=5))

    def forward(self, text: Tensor) -> Any:
        if self.how == "expanded":
            return self.query.expand(len(text), -1, -1)
        return self.both(text).chunk(2, -1)


class TwoTowersOfParts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.image = nn.Conv2d(3, DIM, 8, 8)
        self.text = OneOfTwo(how)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        features, tokens = self.image(image).mean((2, 3)), self.text(text)
        if self.how == "expanded":
            return features * tokens[:, 1]
        return features * (tokens[1] + (5 * tokens[0] if self.how == "both read" else 0))


@pytest.mark.parametrize("how", ["both read", "one read", "expanded"])
def test_share_of_one_of_several_tensors_in_one_memory(how):
    model = TwoTowersOfParts(how)
    token = (lambda output: output[:, :1]) if how == "expanded" else (lambda output: output[1][:, None])
    student = tap(model, image_features="image", mask_tokens=("text", token))
    infosam, outputs = InfoSAMLoss(DIM), []
    model.text.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    task = task_of(student(randn(4, 3, 32, 32, seed=1), randn(4, 5, seed=2)))
    terms = infosam.terms(teacher_of(4, 4, n_tokens=1), student)
    (terms.loss + task).backward(retain_graph=True)
    share = terms.diagnostics().mask_tokens_share
    if how == "expanded":
        assert share is None
    else:
        assert share.item() == pytest.approx(share_of_tokens(terms.loss, task, [outputs[0][1]]), rel=1e-4)


def test_a_backward_that_passes_the_loss_by():
    """Where a tensor gets no gradient at all, autograd gives its hooks none."""
    student = in_training(sam_features(seed=10, n_tokens=2))
    read, other = (student.mask_tokens * 1).split(1, 1)
    infosam = InfoSAMLoss(FEATURES)
    terms = infosam.terms(sam_features(seed=0), student._replace(mask_tokens=read))
    task_of(other).backward()
    assert terms.diagnostics().mask_tokens_share is None
    assert student.mask_tokens.grad is not None


# In every kind of loop.


def one_step(
    model: nn.Module, batch: dict[str, Tensor], *, scale: float = 1.0, **settings: Any
) -> tuple[InfoSAMLoss, InfoSAMTerms]:
    student, infosam = tap(model), InfoSAMLoss(DIM, **settings)
    task = task_of(student(batch).pred_masks)
    terms = infosam.terms(teacher_of(3, 3), student)
    (scale * (terms.loss + task)).backward()
    return infosam, terms


def shares(terms: InfoSAMTerms) -> list[float]:
    state = terms.diagnostics()
    return [state.image_features_share.item(), state.mask_tokens_share.item()]


def test_scale_of_a_grad_scaler_cancels():
    plain, scaled, small = (
        shares(one_step(hf_sam(), hf_batch(3), scale=scale)[1]) for scale in (1.0, 2.0**16, 2.0**-16)
    )
    assert plain == pytest.approx(scaled, rel=1e-5)
    assert plain == pytest.approx(small, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_share_under_checkpointing():
    plain, model = hf_sam(), hf_sam()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, actual = (shares(one_step(each, hf_batch(3))[1]) for each in (plain, model))
    assert actual == pytest.approx(expected, rel=1e-4)


def test_share_of_a_decoder_under_checkpointing():
    model = hf_sam()
    decode = model.mask_decoder.forward
    expected = shares(one_step(hf_sam(), hf_batch(3))[1])

    def checkpointed(**kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(decode, use_reentrant=False, **kwargs)

    model.mask_decoder.forward = checkpointed
    assert shares(one_step(model, hf_batch(3))[1]) == pytest.approx(expected, rel=1e-4)


def test_a_frozen_encoder_leaves_the_tokens_alone():
    model = hf_sam()
    model.vision_encoder.requires_grad_(False)
    state = one_step(model, hf_batch(3))[1].diagnostics()
    assert state.image_features_share is None
    assert 0 < state.mask_tokens_share < math.inf


def test_each_step_of_an_accumulation_has_its_own_share():
    model = hf_sam()
    student, infosam = tap(model), InfoSAMLoss(DIM)
    for seed in range(3):
        expected = shares(one_step(copy.deepcopy(model), hf_batch(3, seed=seed))[1])
        task = task_of(student(hf_batch(3, seed=seed)).pred_masks)
        terms = infosam.terms(teacher_of(3, 3), student)
        ((terms.loss + task) / 3).backward()
        assert shares(terms) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("task_first", [True, False])
def test_losses_that_are_differentiated_apart(task_first):
    leaves, infosam = in_training(sam_features(seed=10)), InfoSAMLoss(FEATURES)
    student = SAMFeatures(2 * leaves.image_features, 2 * leaves.mask_tokens)
    terms, task = infosam.terms(sam_features(seed=0), student), task_of(student.mask_tokens)
    order = [task, terms.loss] if task_first else [terms.loss, task]
    for loss, share in zip(order, [0, None] if task_first else [math.inf, None], strict=True):
        loss.backward(retain_graph=True)
        measured = terms.diagnostics().mask_tokens_share.item()
        assert share is None or measured == share
    assert measured == pytest.approx(share_of_tokens(terms.loss, task, [student.mask_tokens]), rel=1e-4)


def test_no_share_without_gradient():
    infosam, student = InfoSAMLoss(FEATURES), in_training(sam_features(seed=10))
    with torch.no_grad():
        terms = infosam.terms(sam_features(seed=0), student)
    assert terms.diagnostics()[5:] == (None, None)
    assert not student.mask_tokens._backward_hooks


def test_a_loss_without_gradient_at_the_student_has_none_of_it():
    infosam, student = InfoSAMLoss(FEATURES, lambda_d=0.0), in_training(sam_features(seed=10))
    infosam(sam_features(seed=0), student).backward()
    assert infosam.diagnostics().mask_tokens_share == infosam.diagnostics().image_features_share == 0


def test_share_without_a_task_is_infinite():
    infosam, student = InfoSAMLoss(FEATURES), in_training(sam_features(seed=10))
    infosam(sam_features(seed=0), student).backward()
    assert infosam.diagnostics().mask_tokens_share == infosam.diagnostics().image_features_share == math.inf


def test_nothing_is_kept_alive_after_the_step():
    model, batch = hf_sam(), hf_batch(3)
    kept, student, infosam = Kept(model.mask_decoder), tap(model), InfoSAMLoss(DIM, gradient_share=0.1)
    for _ in range(2):
        task = task_of(student(batch).pred_masks)
        loss = infosam(teacher_of(3, 3), student)
        references = [weakref.ref(value) for value in (*kept.maps, *kept.tokens)]
        (loss + task).backward()
        kept.maps.clear()
        kept.tokens.clear()
        del loss, task
        gc.collect()
        assert all(reference() is None for reference in references)


def test_features_without_gradient_are_free_of_the_graph():
    model, features = hf_sam(), []
    kept, student = Kept(model.mask_decoder), tap(model)
    student(hf_batch(3))
    taken = student.take()
    features.append(
        taken._replace(image_features=taken.image_features.detach(), mask_tokens=taken.mask_tokens.detach())
    )
    references = [weakref.ref(value) for value in kept.tokens]
    kept.maps.clear()
    kept.tokens.clear()
    del taken
    gc.collect()
    assert all(reference() is None for reference in references)
    features.append(copy.deepcopy(features[0]))
    features.append(type(features[0])._make(features[0]))
    with torch.no_grad():
        losses = [InfoSAMLoss(DIM)(teacher_of(3, 3), each) for each in features]
    assert losses[0] == losses[1] == losses[2]


def test_leaves_keep_no_hooks():
    infosam, student = InfoSAMLoss(FEATURES), in_training(sam_features(seed=10))
    for differentiated in (True, False, True):
        loss = infosam(sam_features(seed=0), student)
        if differentiated:
            (loss + task_of(student.mask_tokens)).backward()
        del loss
        gc.collect()
        assert not student.mask_tokens._backward_hooks
        assert not student.image_features._backward_hooks


def test_a_leaf_that_is_read_again_leaves_earlier_steps_as_they_were():
    infosam, student, teacher = InfoSAMLoss(FEATURES), in_training(sam_features(seed=10)), sam_features(seed=0)
    terms, found = [], []
    for scale in (1.0, 3.0):
        terms.append(infosam.terms(teacher, student))
        (terms[-1].loss + scale * task_of(student.mask_tokens)).backward(retain_graph=True)
        found.append(terms[-1].diagnostics().mask_tokens_share.item())
    assert [each.diagnostics().mask_tokens_share.item() for each in terms] == found
    assert found[0] == pytest.approx(3 * found[1], rel=1e-5)


def test_a_loss_on_other_images_touches_nothing_of_the_tasks_step():
    """Images without labels, from outside of the task, have a loss of their own in the same step."""
    results = []
    for with_others in (False, True):
        model = hf_sam(1)
        student, teacher, infosam = tap(model), tap(hf_sam(0)), InfoSAMLoss(DIM)
        batch, others = hf_batch(2), hf_batch(3, seed=5)
        task = task_of(student(batch).pred_masks)
        terms = infosam.terms(teacher, student, batch)
        loss = task + terms.loss
        if with_others:
            of_others = infosam.terms(teacher, student, others)
            alone = InfoSAMLoss(DIM).terms(tap(hf_sam(0)), tap(hf_sam(1)), others)
            assert torch.equal(of_others.loss, alone.loss)
            assert not student.pending
            loss = loss + 0 * of_others.loss
        loss.backward()
        results.append((task, *terms, *(parameter.grad for parameter in model.parameters())))
        assert 0 < terms.diagnostics().mask_tokens_share < math.inf
    for plain, beside in zip(*results, strict=True):
        assert (plain is None) == (beside is None)
        assert plain is None or torch.allclose(plain, beside, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", get_args(Distillation))
def test_no_form_and_no_measurement_makes_more_of_the_size_of_a_map(form):
    size = (4, 128, 128, 128)
    teacher, student = (
        sam_features(seed=0, dim=128, size=size[2:]),
        in_training(sam_features(seed=10, dim=128, size=size[2:])),
    )
    infosam, found = InfoSAMLoss(128, distillation=form), {}
    of_task = [torch.ones_like(value) for value in student[:2]]
    for name in ("measured", "not measured"):
        with LargestNewTensor() as forward:
            if name == "measured":
                loss = infosam(teacher, student)
            else:
                loss = infosam_terms(infosam.relation, teacher, student, distillation=form).loss
        with LargestNewTensor() as backward:
            torch.autograd.backward([loss, *student[:2]], [None, *of_task])
        a_map = student.image_features.nbytes
        assert forward.bytes < a_map / 2
        found[name] = sum(each >= a_map / 2 for each in backward.sizes)
        student.image_features.grad = student.mask_tokens.grad = None
    # The gradient of the student's map, and the sum of both.
    assert found["measured"] == found["not measured"] <= 2


# What a logger gets.


def test_scalars_are_plain_numbers_of_the_last_step():
    infosam, student = InfoSAMLoss(FEATURES), in_training(sam_features(seed=10))
    with pytest.raises(RuntimeError, match="InfoSAMLoss: diagnostics must follow a step, got a loss that was not"):
        infosam.scalars()
    terms = infosam.terms(sam_features(seed=0), student)
    before = infosam.scalars()
    assert "mask_tokens_share" not in before
    assert "weight" not in before
    (terms.loss + task_of(student.mask_tokens) + task_of(student.image_features)).backward()
    scalars = infosam.scalars()
    assert all(type(value) is float for value in scalars.values())
    assert list(scalars) == [
        *("loss", "compression", "distillation", "teacher_entropy", "student_entropy", "mutual_information"),
        *("teacher_similarity", "student_similarity", "image_features_share", "mask_tokens_share"),
    ]
    assert scalars["loss"] == terms.loss.item()
    assert scalars["compression"] == terms.compression.item()
    assert scalars["mask_tokens_share"] == terms.diagnostics().mask_tokens_share.item()


def test_scalars_warn_of_a_teacher_that_tells_no_samples_apart():
    infosam, teacher, student = InfoSAMLoss(FEATURES), sam_features(seed=0), in_training(sam_features(seed=10))
    one = SAMFeatures(*(value[:1].expand_as(value) for value in teacher[:2]))
    infosam.terms(one, student)
    with pytest.warns(UserWarning, match=r"must differ from sample to sample, got teacher_similarity 1.0000") as caught:
        infosam.scalars()
    # Of the line of the caller, so that Python says it once.
    assert caught[0].filename == __file__
    infosam.terms(teacher, student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert infosam.scalars()["teacher_similarity"] < 0.9


def test_terms_keep_the_diagnostics_of_their_own_step():
    infosam, teacher = InfoSAMLoss(FEATURES), sam_features(seed=0)
    first = infosam.terms(teacher, in_training(sam_features(seed=10)))
    state = infosam.diagnostics()
    second = infosam.terms(teacher, in_training(sam_features(seed=20)))
    assert first.diagnostics() == state
    assert second.diagnostics() == infosam.diagnostics() != state
    with pytest.raises(RuntimeError, match="InfoSAMTerms: diagnostics must have the relations of a step, got terms"):
        InfoSAMTerms(*first).diagnostics()
    with pytest.raises(RuntimeError, match="InfoSAMTerms: diagnostics must have the relations of a step, got terms"):
        InfoSAMTerms._make(first).diagnostics()
    assert first._replace(loss=2 * first.loss).diagnostics() == first.diagnostics()
