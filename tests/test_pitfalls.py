"""What goes wrong with simple hooks on a SAM: each case passes with a tap and fails with the hooks one writes first."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks import textbook
from renyi_kd import InfoSAMLoss, RelationModule, SAMFeatures, Tap, tap
from tests.support import in_training, sam_features
from tests.support.loops import batched_decoder_sam, decode, run_hf, run_pairs
from tests.support.models import DIM, hf_batch, hf_sam, meta_batch, meta_forward, meta_sam
from tests.support.naive import NaiveArgumentTap, NaiveTap

Attach = Callable[..., Tap | NaiveTap]


class Pitfall(NamedTuple):
    """What ``check`` asserts of a tap, and how the naive one fails it."""

    check: Callable[[Attach], None]
    failure: type[BaseException]
    naive: Attach


PITFALLS: dict[str, Pitfall] = {}


def pitfall(failure: type[BaseException] = AssertionError, naive: Attach = NaiveTap) -> Callable[..., Any]:
    def note(check: Callable[[Attach], None]) -> Callable[[Attach], None]:
        PITFALLS[check.__name__] = Pitfall(check, failure, naive)
        return check

    return note


def refusal(run: Callable[[], Any]) -> str:
    """Return the message with which ``run`` refuses, or nothing."""
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


class Encoder(nn.Module):
    """An encoder that returns a mapping, as those of SAM 2 do."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(image)}


@pitfall()
def the_encoders_output_is_changed_after_its_hook(attach: Attach) -> None:
    model, batch, received = meta_sam(), meta_batch(1)[0], []
    model.image_encoder = Encoder(model.image_encoder)

    def overwriting(model: nn.Module, batch: dict[str, Any]) -> None:
        output = model.image_encoder(batch["image"][None])
        received.append(output["last_hidden_state"])
        decode(model, output["last_hidden_state"], boxes=batch["boxes"])
        output["last_hidden_state"] = output["last_hidden_state"].flatten(2)

    student = attach(model, call=overwriting)
    student(batch)
    taken = student.take().image_features
    assert taken.data_ptr() == received[0].data_ptr()
    assert taken.shape == received[0].shape


@pitfall()
def the_decoder_is_called_for_each_image(attach: Attach) -> None:
    student = attach(meta_sam(), call=meta_forward)
    student(meta_batch(3))
    assert len(student.take().mask_tokens) == 3


@pitfall()
def an_image_has_several_prompts(attach: Attach) -> None:
    student = attach(hf_sam(), call=run_hf)
    student(hf_batch(2, 3))
    features = student.take()
    assert len(features.mask_tokens) == 6
    assert features.image_index is not None
    assert features.image_index.tolist() == [0, 0, 0, 1, 1, 1]


@pitfall(TypeError)
def the_encoder_is_bypassed(attach: Attach) -> None:
    model, batch = hf_sam(), hf_batch()
    embeddings = torch.randn(2, DIM, 4, 4)
    student = attach(model, call=run_hf)
    student({"image_embeddings": embeddings, "input_boxes": batch["input_boxes"]})
    assert student.take().image_features is embeddings


@pitfall()
def a_forward_without_gradient_is_the_students(attach: Attach) -> None:
    student = attach(meta_sam(), call=lambda model, batch: model(batch, multimask_output=False))
    student(meta_batch(1))
    assert "ran without gradient" in refusal(student.take)


@pitfall(RuntimeError)
def the_teacher_runs_in_inference_mode(attach: Attach) -> None:
    def inferring(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            run_hf(model, batch)

    teacher, relation = attach(hf_sam(), call=inferring), RelationModule(DIM)
    features = teacher.observe(hf_batch())
    relation.layer_norm_mask(features.mask_tokens).sum().backward()


@pitfall()
def the_decoder_takes_one_image_at_a_time(attach: Attach) -> None:
    batch = hf_batch(3)
    pairs = (batch["pixel_values"], batch["input_boxes"][:, 0], None)
    assert "must match" in refusal(lambda: run_pairs(meta_sam(), pairs))
    stock, patched = attach(meta_sam(), call=meta_forward), attach(batched_decoder_sam(0), call=run_pairs)
    stock(meta_batch(3)), patched(pairs)
    actual, expected = stock.take(), patched.take()
    torch.testing.assert_close(actual.image_features, expected.image_features)
    torch.testing.assert_close(actual.mask_tokens, expected.mask_tokens, rtol=1e-4, atol=1e-4)


@pitfall()
def backward_recomputes_what_was_checkpointed(attach: Attach) -> None:
    def checkpointed(model: nn.Module, batch: list[dict[str, Any]]) -> Any:
        return torch.utils.checkpoint.checkpoint(meta_forward, model, batch, use_reentrant=False)

    # Of two calls: recomputation stops early in the last.
    student, batch = attach(meta_sam(), call=checkpointed), meta_batch(2)
    masks = student(batch)
    student.take()
    sum(mask.sum() for mask in masks).backward()
    assert "nothing collected" in refusal(student.take)


@pitfall()
def reentrant_checkpointing_detaches_what_is_inside(attach: Attach) -> None:
    def checkpointed(model: nn.Module, batch: list[dict[str, Any]]) -> Any:
        image = batch[0]["image"].requires_grad_()
        return torch.utils.checkpoint.checkpoint(lambda _: meta_forward(model, batch), image, use_reentrant=True)

    student = attach(meta_sam(), call=checkpointed)
    student(meta_batch(1))
    assert "use_reentrant=False" in refusal(student.take)


@pitfall(TypeError)
def the_model_was_compiled_and_called_before(attach: Attach) -> None:
    torch.compiler.reset()
    compiled, batch = torch.compile(hf_sam(), backend="eager"), hf_batch()
    run_hf(compiled, batch)
    student = attach(compiled, call=run_hf)
    student(batch)
    assert "before its first call" in refusal(student.take)


@pitfall(AttributeError)
def a_wrapper_puts_its_name_before_every_module(attach: Attach) -> None:
    student = attach(nn.DataParallel(hf_sam()), call=run_hf)
    student(hf_batch())
    assert student.take().mask_tokens.shape == (2, 4, DIM)


@pitfall()
def the_teacher_has_a_batch_norm_in_training_mode(attach: Attach) -> None:
    model = meta_sam()
    model.image_encoder = nn.Sequential(model.image_encoder, nn.BatchNorm2d(DIM))
    teacher, before = attach(model, call=meta_forward), copy.deepcopy(model.state_dict())
    teacher.observe(meta_batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pitfall()
def an_exception_leaves_half_a_step(attach: Attach) -> None:
    model, batch = meta_sam(), meta_batch(2)
    student = attach(model, call=meta_forward)
    batch[1] = {**batch[1], "boxes": torch.zeros(2, 2)}
    assert "size" in refusal(lambda: student(batch))
    assert "nothing collected" in refusal(student.take)


@pitfall()
def a_copy_of_the_model_runs(attach: Attach) -> None:
    model = hf_sam()
    student = attach(model, call=run_hf)
    student(hf_batch(2))
    run_hf(copy.deepcopy(model), hf_batch(3))
    assert len(student.take().mask_tokens) == 2


@pitfall((AttributeError, pickle.PicklingError))
def the_model_is_pickled(attach: Attach) -> None:
    model = hf_sam()
    attached = attach(model, call=run_hf)
    pickle.loads(pickle.dumps(attached.model))


@pitfall(IndexError, NaiveArgumentTap)
def the_decoder_is_called_with_names_only(attach: Attach) -> None:
    student, batch = attach(hf_sam(), call=run_hf), hf_batch()
    student(batch)
    assert student.take().image_features.shape == (2, DIM, 4, 4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", PITFALLS)
def test_a_tap_is_right(name):
    PITFALLS[name].check(tap)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", PITFALLS)
def test_naive_hooks_are_wrong(name):
    check, failure, naive = PITFALLS[name]
    with pytest.raises(failure):
        check(naive)


# pitfalls of the loss rather than of hooks: against the equations as they read


def test_half_precision_is_computed_in_fp32():
    relation = RelationModule(12, generator=torch.Generator().manual_seed(0))
    teacher, student = (sam_features(seed=seed, size=(32, 32)) for seed in (0, 10))
    exact = textbook.infosam_terms(relation, teacher, student).loss.item()
    low = [SAMFeatures(f.image_features.bfloat16(), f.mask_tokens.bfloat16()) for f in (teacher, student)]
    loss = InfoSAMLoss(12)
    loss.relation = relation
    low[1] = in_training(low[1])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*low)
        naive = textbook.infosam_terms(relation, *low).loss
    assert value.dtype == torch.float32
    assert abs(value.item() - exact) < 2e-3 < abs(naive.item() - exact)


def test_a_single_sample_is_refused_where_the_equations_are_silent():
    relation = RelationModule(12)
    teacher, student = sam_features(1, seed=0), in_training(sam_features(1, seed=10))
    naive = textbook.infosam_terms(relation, teacher, student).loss
    naive.backward()
    assert abs(naive.item()) < 1e-6
    assert student.image_features.grad.abs().max() < 1e-6
    with pytest.raises(ValueError, match="at least two samples.*larger batch, several prompts"):
        InfoSAMLoss(12)(teacher, student)
