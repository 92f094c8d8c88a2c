"""The InfoSAM loss as a function of features: compress the teacher's relation, and carry it to the student."""

from __future__ import annotations

from torch import Tensor

from renyi_kd.objective import Distillation, InfoSAMTerms, Objective, check_objective
from renyi_kd.ops.dispatch import Impl, check_impl
from renyi_kd.ops.feature_terms import Pair, feature_terms
from renyi_kd.relation import RelationModule
from renyi_kd.sam.features import SAMFeatures, check_features
from renyi_kd.samples.scope import Scope


def infosam_terms(
    relation: RelationModule,
    teacher: SAMFeatures,
    student: SAMFeatures,
    *,
    lambda_r: float = 1.0,
    lambda_d: float = 0.5,
    alpha: float = 2.0,
    distillation: Distillation = "mutual_information",
    detach_teacher_relation: bool = False,
    global_batch: bool = False,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> InfoSAMTerms:
    r"""Return the InfoSAM loss of a batch and its two terms, in bits.

    With S the Rényi entropy of order alpha over the s samples (image, prompt) of the batch, R the relation maps and
    Z_I, Z_M the teacher's image features and mask tokens:

        L_r = S(R_T) - S(Z_I, Z_M, R_T)        L_d = -I(R_T; R_S)        loss = lambda_r L_r + lambda_d L_d

    The relation module gets gradients through both relations, as in the paper; the teacher's features get none. The
    loss couples all samples: that of a split batch is another loss, and needs at least two samples. L_d does not pull
    the student onto the teacher's relations: its minimum over the student has mutually orthogonal ones.

    What does is not in the paper: under ``distillation="cauchy_schwarz"``, L_d is the Cauchy-Schwarz divergence of the
    relations' Grams at unit diagonal, G_T and G_S:

        L_d = -log2(<G_T, G_S>^2 / (||G_T||_F^2 ||G_S||_F^2))

    It is symmetric; not negative but for rounding; zero, without gradient, exactly where the Grams are equal, even if
    both have collapsed; not blind to signs; and independent of alpha, which then orders L_r alone. Orthogonal Grams
    (two samples that are alike to the teacher and opposite to the student) would make it infinite: where
    <G_T, G_S> < 2^-20 s, which is nowhere below 40 bits, the logarithm goes on along its tangent, so that
    L_d < 43 + 2 log2 s and every gradient is finite.

    Args:
        relation: the module that teacher and student share.
        teacher: its :class:`SAMFeatures`.
        student: likewise, of the same shapes and the same ``image_index``.
        lambda_r: weight of L_r.
        lambda_d: weight of L_d.
        alpha: order of the entropies, in (0, inf]; the paper's is 2.
        distillation: the form of L_d: ``"mutual_information"``, the paper's, or ``"cauchy_schwarz"``.
        detach_teacher_relation: whether L_d leaves the module without gradient through the teacher's relation.
        global_batch: whether the loss is that of the samples of all processes of the default group together. Each has
            samples of its own, of which a single one will do, and calls the loss as often as the others, in validation
            too. Right where gradients are averaged over these processes, those of the relation module too, as DDP and
            FSDP do. Without several processes it changes nothing.
        check_finite: whether to look for NaN and inf first; waits for the device.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``; an explicit choice never falls back.

    Returns:
        :class:`InfoSAMTerms` in fp32, or fp64 if any feature is. First derivatives only.

    Raises:
        TypeError: a feature is not a floating-point tensor.
        ValueError: shapes, devices or indices do not fit, also between processes, there are fewer than two samples,
            nothing of the student requires grad (while gradients are on), an argument is out of its range, or, under
            ``check_finite``, a feature is not finite. Under ``global_batch``, features of teacher and student that do
            not fit each other raise in every process; an error before that leaves the others waiting, as in DDP.

    Cost: four reads of each map and one write of the student's; see ``ops``. Extra memory is O(s n h w) and a few
    blocks, nothing of a map's size but the gradient. Under ``global_batch`` every process receives the teacher's maps
    and all scores, and the host waits for their numbers of samples.

    Source: Zhang et al., InfoSAM, ICML 2025 (arXiv 2505.21920), whose loss is the default.

    >>> import torch
    >>> relation = RelationModule(8)
    >>> teacher = SAMFeatures(torch.randn(4, 8, 6, 6), torch.randn(4, 1, 8))
    >>> student = SAMFeatures(torch.randn(4, 8, 6, 6, requires_grad=True), torch.randn(4, 1, 8))
    >>> infosam_terms(relation, teacher, student).loss.backward()
    >>> bool(infosam_terms(relation, teacher, student, distillation="cauchy_schwarz").distillation > 0)
    True

    """
    if not isinstance(relation, RelationModule):
        raise TypeError(
            f"infosam_terms: relation must be a RelationModule, got {type(relation).__name__}; "
            "of an InfoSAMLoss it is infosam_loss.relation"
        )
    objective = Objective(lambda_r, lambda_d, alpha, distillation, detach_teacher_relation)
    check_objective("infosam_terms", objective)
    check_impl("infosam_terms", impl)
    check_features("infosam_terms", "teacher", teacher)
    check_features("infosam_terms", "student", student)
    scope = Scope(global_batch)
    terms, _ = relation_terms(
        "infosam_terms", relation, teacher, student, objective, scope, check_finite=check_finite, impl=impl
    )
    return terms


def relation_terms(
    function: str,
    relation: RelationModule,
    teacher: SAMFeatures,
    student: SAMFeatures,
    objective: Objective,
    scope: Scope,
    *,
    check_finite: bool,
    impl: Impl,
) -> tuple[InfoSAMTerms, tuple[Tensor, Tensor]]:
    """Return the loss with its terms, and the Grams of both relations.

    The objective and each model's features were checked before; ``function`` begins the messages of what is wrong with
    the pair.
    """
    images = scope.images(function, teacher, student, check_finite=check_finite)
    pair = Pair(teacher.image_features, teacher.mask_tokens, student.image_features, student.mask_tokens, images)
    value = relation.value(student.mask_tokens, function=function)
    terms = feature_terms(pair, value, objective, join=scope.join(function), impl=impl)
    return InfoSAMTerms(*terms[:3]), (terms.teacher_gram, terms.student_gram)
