"""The reference on devices that are not there: a GPU, where every call is a launch, and one without fp64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import textbook
from renyi_kd import (
    RBF,
    InfoSAMLoss,
    Linear,
    Polynomial,
    RelationModule,
    SAMFeatures,
    conditional_entropy,
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    infosam_terms,
    joint_entropy,
    mutual_information,
    renyi_entropy,
)
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.batch_gram import reference as batch_gram_reference
from renyi_kd.ops.relation_scores import reference as relation_scores_reference
from renyi_kd.ops.relation_scores import relation_scores
from tests.support import randn, relation_module, sam_features
from tests.support.kernels import LAYOUTS, inputs, textbook_gram, textbook_scores, value_and_gradients
from tests.support.launches import launches
from tests.support.memory import LargestNewTensor
from tests.support.other_device import OnDevice, other_device, to_device
from tests.support.tolerance import assert_close_on_scale, assert_within_budget

FORMS = ["mutual_information", "cauchy_schwarz", "debiased", "jensen_renyi"]


# Launches: on the meta device, where nothing is computed.


def gaps(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2)[:, :, 1:-1, 1:-1]


STRIDES = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gaps": gaps,
    "channels last, gaps": lambda x: gaps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
    "columns first": lambda x: x.mT.contiguous().mT,
}
PROMPTS = {
    "one prompt": lambda b: None,
    "three prompts": lambda b: torch.arange(b).repeat_interleave(3),
    "unequal prompts": lambda b: torch.cat([torch.arange(b), torch.zeros(2, dtype=torch.int64)]),
}


def features_on_meta(n_images: int, dtype: torch.dtype, strides: str, prompts: str) -> SAMFeatures:
    maps = STRIDES[strides](torch.empty(n_images, 256, 64, 64, dtype=dtype, device="meta"))
    images = PROMPTS[prompts](n_images)
    n_samples = n_images if images is None else len(images)
    return SAMFeatures(maps, torch.empty(n_samples, 1, 256, dtype=dtype, device="meta"), images)


def launches_of(terms, relation: RelationModule, teacher: SAMFeatures, student: SAMFeatures, **keywords) -> list[str]:
    leaves = [value.detach().requires_grad_() for value in student[:2]]
    # There is no autocast on meta.
    with mock.patch("torch.autocast", return_value=nullcontext()), launches() as names:
        terms(relation, teacher, SAMFeatures(*leaves, student.image_index), **keywords).loss.backward()
    return names


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_takes_no_more_launches_than_the_textbook(dtype, strides, prompts):
    for n_images in (2, 64):
        features = [features_on_meta(n_images, dtype, strides, prompts) for _ in range(2)]
        relation = RelationModule(256).to("meta")
        own = launches_of(infosam_terms, relation, *features)
        # Without autocast, which would convert the weights: that many launches fewer.
        of_textbook = launches_of(textbook.infosam_terms, relation.to(dtype), *features)
        assert 100 < len(own) <= len(of_textbook), (n_images, len(own), len(of_textbook))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_other_forms_and_orders_take_little_more(form, alpha):
    features = [features_on_meta(4, torch.float32, "channels first", "one prompt") for _ in range(2)]
    own = launches_of(infosam_terms, RelationModule(256).to("meta"), *features, distillation=form, alpha=alpha)
    assert len(own) <= 280


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_new_is_larger_than_a_block_or_a_gradient(dtype, strides):
    features = [features_on_meta(64, dtype, strides, "one prompt") for _ in range(2)]
    leaves = [value.detach().requires_grad_() for value in features[0][:2]]
    block = 4 * relation_scores_reference.BLOCK_ELEMENTS_ELSEWHERE
    with mock.patch("torch.autocast", return_value=nullcontext()):
        with LargestNewTensor() as forward:
            loss = infosam_terms(RelationModule(256).to("meta"), features[1], SAMFeatures(*leaves)).loss
        with LargestNewTensor() as backward:
            loss.backward()
    assert forward.bytes <= block
    assert backward.bytes <= max(block, 64 * 256 * 64 * 64 * dtype.itemsize)


# Values of the reference where it works in few calls.


def on_device(function):
    """Return the function with its operands moved to the device, and its value and gradients moved back."""

    def moved(*tensors: Tensor, **keywords) -> list[Tensor]:
        with other_device(has_fp64=True):
            return [value.held for value in value_and_gradients(function, *to_device(tensors), **keywords)]

    return moved


@pytest.mark.parametrize("elements", [100, 700, 10**6])
@pytest.mark.parametrize("n_tokens", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_in_few_calls(dtype, layout, n_tokens, elements):
    x, directions = inputs((3, 11, 7, 5), dtype, n_tokens=n_tokens)
    x = LAYOUTS[layout](x)
    with mock.patch.object(relation_scores_reference, "BLOCK_ELEMENTS_ELSEWHERE", elements):
        actual = on_device(relation_scores)(x, directions)
    eager = value_and_gradients(textbook_scores, x, directions)
    exact = value_and_gradients(textbook_scores, x.double(), directions.double())
    for name, *values in zip(("scores", "grad_features", "grad_directions"), actual, eager, exact, strict=True):
        assert_within_budget(*values, name=name)


@pytest.mark.parametrize("elements", [100, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_in_few_calls(dtype, layout, elements):
    x = LAYOUTS[layout](randn(14, 11, 7, 5, dtype=dtype))
    with mock.patch.object(batch_gram_reference, "BLOCK_ELEMENTS_ELSEWHERE", elements):
        gram, grad = on_device(batch_gram)(x)
    eager = value_and_gradients(lambda x: textbook_gram(x).double(), x)
    exact = value_and_gradients(textbook_gram, x.double())
    assert_within_budget(gram.float(), eager[0], exact[0], name="gram", slack=4.0)
    assert_within_budget(grad, eager[1], exact[1], name="grad_rows", slack=4.0)


# A device without fp64.


def test_the_stand_in_refuses_fp64_and_two_devices():
    with other_device(has_fp64=False):
        x = OnDevice(torch.ones(2, 2))
        with pytest.raises(AssertionError, match="makes fp64 on the device"):
            x.double()
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(2, 2)
        assert not x.is_cpu
        assert x.to("cpu").is_cpu
        # What the package did before it asked: fails here.
        with mock.patch("renyi_kd.fp64.has_fp64", return_value=True), pytest.raises(AssertionError, match="makes fp64"):
            renyi_entropy(x)


def both(function, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return value and gradients on the device without fp64, and on the CPU."""
    expected = value_and_gradients(function, *tensors)
    with other_device(has_fp64=False):
        actual = value_and_gradients(function, *to_device(tensors))
        assert all(isinstance(value, OnDevice) for value in actual)
    return [value.held for value in actual], expected


def assert_alike(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert_close_on_scale(a, e, name=str(index), rtol=rtol)


def positive(x: Tensor) -> Tensor:
    return x @ x.mT


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_entropies_without_fp64(alpha):
    a, b = randn(6, 9, seed=1), randn(6, 9, seed=2)
    assert_alike(*both(lambda a: renyi_entropy(positive(a), alpha), a))
    for function in (lambda a, b: joint_entropy(a, b, alpha=alpha), conditional_entropy, mutual_information):
        assert_alike(*both(lambda a, b, function=function: function(positive(a), positive(b)), a, b))


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "rbf", RBF(2.0)], ids=str)
def test_gram_matrices_without_fp64(kernel):
    assert_alike(*both(lambda x: gram_matrix(x, kernel), randn(7, 5)))


@pytest.mark.parametrize(
    "kernels", [(Linear(), Linear()), (Polynomial(), Linear()), (RBF(), Polynomial()), (RBF(2.0), RBF(3.0))], ids=str
)
def test_feature_entropies_without_fp64(kernels):
    features = randn(20, 5, seed=1), randn(20, 4, seed=2)
    assert_alike(*both(lambda *x: feature_entropy(*x, kernel=kernels), *features))
    assert_alike(*both(lambda *x: feature_mutual_information(*x, kernel=kernels), *features), rtol=1e-4)


def steps(on_it: bool, n_steps: int = 1, images: list[int] | None = None, **settings) -> list[Tensor]:
    """Return losses, gradients and diagnostics of steps, on the device without fp64 or on the CPU."""
    infosam_loss = InfoSAMLoss(12, **settings)
    infosam_loss.relation = relation_module()
    if on_it:
        to_device(infosam_loss)
    found = []
    for step in range(n_steps):
        teacher, student = (sam_features(4, seed=10 * step + model, image_index=images) for model in range(2))
        index = teacher.image_index
        if on_it:
            teacher, student = (to_device(features[:2]) for features in (teacher, student))
        leaves = [value.detach().requires_grad_() for value in student[:2]]
        terms = infosam_loss.terms(SAMFeatures(*teacher[:2], index), SAMFeatures(*leaves, index))
        task = sum((leaf * leaf).sum() for leaf in leaves)
        (terms.loss + 1e-3 * task).backward()
        found += [terms.loss, *(leaf.grad for leaf in leaves)]
        found += [parameter.grad for parameter in infosam_loss.relation.parameters()]
        infosam_loss.zero_grad()
        found += [value for value in infosam_loss.diagnostics() if value is not None]
        found.append(torch.tensor(list(infosam_loss.scalars().values())))
    return [value.detach().held if isinstance(value, OnDevice) else value.detach() for value in found]


SETTINGS = {
    **{form: {"distillation": form} for form in FORMS},
    "order 3": {"alpha": 3.0},
    "order 1": {"alpha": 1.0},
    "constant teacher": {"detach_teacher_relation": True},
    "checked": {"check_finite": True},
    "share": {"gradient_share": 0.1, "n_steps": 4},
    "bank": {"bank_size": 6, "n_steps": 3},
    "prompts": {"images": [0, 0, 1, 1]},
    "unequal prompts": {"images": [0, 1, 1, 0, 1]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_without_fp64(settings):
    expected = steps(False, **settings)
    with other_device(has_fp64=False):
        actual = steps(True, **settings)
    assert_alike(actual, expected, rtol=1e-4)
