"""The public names, with their parameters, defaults and fields: what CONTRIBUTING.md says a version number promises."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

import renyi_kd
from renyi_kd import InfoSAMLoss, plot
from renyi_kd.gram import KernelName
from renyi_kd.objective import Distillation
from renyi_kd.ops.dispatch import Impl
from renyi_kd.sam.inputs import CompareInputs

# A change of these lines changes what users write: it belongs into CHANGELOG.md too.
PUBLIC = """
RBF(bandwidth='median')
Accumulation(infosam_loss, teacher, student)
Accumulation.clear(self)
Accumulation.collect(self, batch, *, sample_weight=None)
Accumulation.loss(self)
Accumulation.replay(self)
AdapterDisabled(student, *, disable=None)
AdapterDisabled.observe(self, step)
CachedTeacher(teacher, folder, *, sample_ids='sample_id', preprocessing='', encoder=None, dtype=torch.float16,
    check_pixels=True)
CachedTeacher.model
CachedTeacher.observe(self, step)
Call(batch=None, arguments=None, names=(), own_embeddings=False, encoded=False)
Call.args
Call.is_of_another(self, given)
Call.kwargs
Call.named(self)
Implementation(name, reason)
InfoSAMLoss(dim=256, *, lambda_r=1.0, lambda_d=0.5, alpha=2.0, distillation='mutual_information',
    gradient_share=None, token='first', detach_teacher_relation=False, global_batch=False, process_group=None,
    bank_size=0, check_finite=False, compare_inputs='first', impl='auto', generator=None)
InfoSAMLoss.alpha
InfoSAMLoss.bank_size
InfoSAMLoss.detach_teacher_relation
InfoSAMLoss.diagnostics(self)
InfoSAMLoss.distillation
InfoSAMLoss.forward(self, teacher, student, batch=None, *, sample_weight=None)
InfoSAMLoss.global_batch
InfoSAMLoss.gradient_share
InfoSAMLoss.lambda_d
InfoSAMLoss.lambda_r
InfoSAMLoss.load_state_dict(self, state_dict, strict=True, assign=False)
InfoSAMLoss.objective = ...
InfoSAMLoss.process_group
InfoSAMLoss.scalars(self)
InfoSAMLoss.terms(self, teacher, student, batch=None, *, sample_weight=None)
InfoSAMTerms(loss, compression, distillation, relations=None)
InfoSAMTerms.diagnostics(self)
Linear()
Objective(lambda_r=1.0, lambda_d=0.5, alpha=2.0, distillation='mutual_information',
    detach_teacher_relation=False)
Objective.compares_pairs
Polynomial(degree=2, offset=1.0)
RelationDiagnostics(teacher_entropy, student_entropy, mutual_information, teacher_similarity,
    student_similarity, image_features_share=None, mask_tokens_share=None)
RelationModule(dim=256, *, generator=None)
RelationModule.forward(self, image_features, mask_tokens, image_index=None)
RelationModule.load_state_dict(self, state_dict, strict=True, assign=False)
RelationModule.scores(self, image_features, mask_tokens, images=None, *, impl='auto')
RelationModule.value(self, mask_tokens, *, function='RelationModule')
SAMFeatures(image_features, mask_tokens, image_index=None)
Step(given=None, ran=(), seen=None, comparison=None)
Step.ran_on(self, given)
Tap
Tap.clear(self)
Tap.close(self)
Tap.observe(self, step)
Tap.pending
Tap.set_aside(self)
Tap.take(self, batch=None)
Tap.take_step(self, batch=None)
Teacher
Teacher.observe(self, step)
conditional_entropy(a, b, alpha=2.0)
feature_entropy(*features, kernel='linear', impl='auto', process_group=None)
feature_mutual_information(a, b, *, kernel='linear', impl='auto', process_group=None)
gram_matrix(features, kernel='linear')
implementation(*tensors, impl='auto', limits=())
infosam_terms(relation, teacher, student, *, lambda_r=1.0, lambda_d=0.5, alpha=2.0,
    distillation='mutual_information', detach_teacher_relation=False, sample_weight=None, global_batch=False,
    process_group=None, check_finite=False, impl='auto')
joint_entropy(*grams, alpha=2.0)
mutual_information(a, b, alpha=2.0)
renyi_entropy(gram, alpha=2.0)
tap(model, *, image_features=None, mask_tokens=None, call=None, replay_prompts=False,
    decoder_loops_over_images=False)
plot.relation_figure(relations, images=None)
"""

CHOICES = {
    "distillation": (Distillation, ("mutual_information", "cauchy_schwarz", "debiased", "jensen_renyi")),
    "impl": (Impl, ("auto", "reference", "triton")),
    "kernel": (KernelName, ("linear", "rbf", "polynomial")),
    "compare_inputs": (CompareInputs, ("first", "always", "never")),
}

# What a checkpoint of the loss holds.
STATE = {
    "relation.query_proj.weight": (8, 8),
    "relation.query_proj.bias": (8,),
    "relation.key_proj.weight": (8, 8),
    "relation.key_proj.bias": (8,),
    "relation.layer_norm_feat.weight": (8,),
    "relation.layer_norm_feat.bias": (8,),
    "relation.layer_norm_mask.weight": (8,),
    "relation.layer_norm_mask.bias": (8,),
}

# Made by a function of their own, or by whoever implements them.
NOT_CALLED = {"Tap", "Teacher"}


def signature(function: Callable[..., Any]) -> str:
    """Return parameters and defaults, without annotations: mypy holds those."""
    found = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def members(kind: type) -> Iterator[str]:
    """Yield the public methods and properties of a class that are this package's, fields left out."""
    ours = {name for base in kind.__mro__ if base.__module__.startswith("renyi_kd") for name in vars(base)}
    for name in sorted(ours):
        member = inspect.getattr_static(kind, name)
        if name.startswith("_") or name == "extra_repr":
            continue
        if isinstance(member, property):
            yield f"{kind.__name__}.{name}" + ("" if member.fset is None else " = ...")
        elif inspect.isfunction(member):
            yield f"{kind.__name__}.{name}{signature(member)}"


def names() -> Iterator[str]:
    for name in renyi_kd.__all__:
        value = getattr(renyi_kd, name)
        yield name if name in NOT_CALLED else f"{name}{signature(value)}"
        if isinstance(value, type):
            yield from members(value)
    yield f"plot.relation_figure{signature(plot.relation_figure)}"


def described() -> str:
    """Return the names a line each, wrapped as they stand above."""
    wrapped = (
        "\n".join(textwrap.wrap(name, 110, subsequent_indent="    ", break_on_hyphens=False)) for name in names()
    )
    return "\n".join(["", *wrapped, ""])


def test_the_public_names_and_their_signatures():
    assert described().splitlines() == PUBLIC.splitlines()


@pytest.mark.parametrize(("kind", "choices"), CHOICES.values(), ids=CHOICES)
def test_the_choices(kind, choices):
    assert get_args(kind) == choices


def test_what_a_checkpoint_of_the_loss_holds():
    assert {name: tuple(value.shape) for name, value in InfoSAMLoss(8).state_dict().items()} == STATE
