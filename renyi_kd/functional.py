"""The InfoSAM loss as a function of features: compress the teacher's relation, and carry it to the student."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from renyi_kd.diagnostics import Relations
from renyi_kd.objective import Distillation, InfoSAMTerms, Objective, check_objective
from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.dispatch import Impl, check_impl
from renyi_kd.ops.feature_terms import Pair, feature_terms
from renyi_kd.relation import RelationModule
from renyi_kd.sam.features import SAMFeatures, check_features
from renyi_kd.samples.agreement import telling_of_errors
from renyi_kd.samples.processes import check_group
from renyi_kd.samples.scope import Scope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    sample_weight: Tensor | None = None,
    global_batch: bool = False,
    process_group: ProcessGroup | None = None,
    check_finite: bool = False,
    impl: Impl = "auto",
) -> InfoSAMTerms:
    r"""Return the InfoSAM loss of a batch and its two terms, in bits.

    S is the Rényi entropy of order alpha over the s samples of the batch, each a pair of image and prompt. R are the
    relation maps, Z_I and Z_M the teacher's image features and mask tokens:

        L_r = S(R_T) - S(Z_I, Z_M, R_T)        L_d = -I(R_T; R_S)        loss = lambda_r L_r + lambda_d L_d

    The relation module gets gradients through both relations, as in the paper; the teacher's features get none. The
    loss couples all samples: that of a split batch is another loss, and needs at least two samples. L_d does not pull
    the student onto the teacher's relations: its minimum over the student has mutually orthogonal ones.

    The forms that do are not in the paper. G_T and G_S are the relations' Grams at unit diagonal, with entries t_ij and
    s_ij. r_T and r_S are the unit relation maps of one sample.

    ``distillation="cauchy_schwarz"``: the Cauchy-Schwarz divergence of the Grams,

        L_d = -log2(<G_T, G_S>^2 / (||G_T||_F^2 ||G_S||_F^2))

    It is symmetric; not negative but for rounding; zero, without gradient, exactly where the Grams are equal, even if
    both have collapsed; not blind to signs; and independent of alpha, which then orders L_r alone. Orthogonal Grams
    would make it infinite: two samples that are alike to the teacher and opposite to the student. So where
    <G_T, G_S> < 2^-20 s, the logarithm goes on along its tangent. Nowhere does that begin below 40 bits. L_d stays
    below 43 + 2 log2 s, and every gradient is finite.

    ``"debiased"``: mutual information less what each relation has with itself,

        L_d = S(R_T, R_S) - S(R_T, R_T) / 2 - S(R_S, R_S) / 2

    It is symmetric; not negative but for rounding; at alpha = 2 at most log2(s) / 2 and zero exactly where
    |s_ij| = |t_ij| for all pairs, without gradient; blind to signs, and unchanged where the whole batch is doubled. It
    needs alpha >= 2: below, it can be negative. It has local minima above zero, where signs of cosines contradict one
    another. A student far from the teacher may end there: ``benchmarks/descent.py`` shows one drawn at random.

    ``"jensen_renyi"``: the Jensen-Rényi divergence of order 2 of each sample's two relations, in its mean over samples,

        L_d = mean_i w_i (1 - log2(1 + <r_T,i, r_S,i>^2))

    It is in [0, 1] bits for weights w_i = 1: 0 where the maps are equal but for scale and sign, 1 where they are
    orthogonal. At a small angle it is theta^2 / (2 ln 2). It compares no sample with another, so one will do; L_r of
    one is 0. A mean over micro-batches or processes of as many samples is the loss of them all. Samples of a bank join
    L_r alone. The relation module is a constant in it, as it could make any two maps alike by forgetting the features.
    So with ``lambda_r=0`` nothing trains the module: leave it out of the optimiser, whose weight decay would still move
    it. As it is initialised, its relation is close to the inner product of the normalised token and pixels, which needs
    no parameters. At 256 channels the projections add 1/48 of a token's length to it. The maps keep a cosine of .9998
    where pixels are uncorrelated, and above .99 where they have most in common.

    Args:
        relation: the module that teacher and student share.
        teacher: its :class:`SAMFeatures`.
        student: likewise, of the same shapes and the same ``image_index``.
        lambda_r: weight of L_r.
        lambda_d: weight of L_d.
        alpha: order of the entropies, in (0, inf]; the paper's is 2.
        distillation: the form of L_d: ``"mutual_information"``, the paper's, ``"cauchy_schwarz"``, ``"debiased"`` or
            ``"jensen_renyi"``.
        detach_teacher_relation: whether L_d leaves the module without gradient through the teacher's relation.
        sample_weight: ``[s]``, on the device of the features, not negative: w_i of ``"jensen_renyi"``. With the
            teacher's IoU with the truth, a wrong teacher is not followed. The mean is over the number of samples, not
            over the sum of weights, so that weights matter in a batch of one. Zeros for all samples give L_d = 0,
            which ``check_finite`` refuses.
        global_batch: whether the loss is that of the samples of all processes of the group together. Each has samples
            of its own, of which a single one will do or, with features of b = s = 0, none; and calls the loss as often
            as the others, in validation too. Right where gradients are averaged over these processes, those of the
            relation module too, as DDP and FSDP do. Without several processes it changes nothing.
        process_group: the processes of ``global_batch``, where not all train: the ``torch.distributed.ProcessGroup``
            that DDP or the mesh of FSDP has too. None for the default group.
        check_finite: whether to look for NaN and inf first; waits for the device.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``; an explicit choice never falls back.

    Returns:
        :class:`InfoSAMTerms` in fp32, or fp64 if any feature is. First derivatives only.

    Raises:
        TypeError: a feature or ``sample_weight`` is not a floating-point tensor, or ``process_group`` is none.
        ValueError: shapes, devices or indices do not fit, also between processes. There are fewer than two samples, in
            all processes of ``global_batch``, where the form compares them, or none. ``process_group`` leaves out this
            process, or comes without ``global_batch``. Nothing of the student requires grad while gradients are on. An
            argument is out of its range. Weights are negative, or given to another form than ``"jensen_renyi"``. Under
            ``check_finite``: a feature is not finite, or all weights are zero. Weights on another device than the CPU
            are looked at under ``check_finite`` alone. Under ``global_batch``, features of teacher and student that do
            not fit each other raise in every process, as does every other error of one of them, and settings or weights
            of the module that differ. The weights are compared in the first step and after the first two changes.
        RuntimeError: under ``global_batch``, a process has died, hangs, or does not call the loss. It is named, at the
            latest after the timeout of the process group.

    Cost: four reads of each map and one write of the student's; see ``ops``. Extra memory is O(s n h w) and a few
    blocks, nothing of a map's size but the gradient. Under ``global_batch`` every process has a share of the channels
    of all maps. So it receives about as many bytes of maps as it has itself, and the tokens and scores of all; the
    host waits for their numbers of samples. Extra memory is then twice the teacher's own maps.

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
    check_group("infosam_terms", process_group)
    scope = Scope(global_batch, group=process_group)
    with (
        telling_of_errors(relation.key_proj.weight.device, group=process_group)
        if scope.spans_processes
        else nullcontext()
    ):
        if process_group is not None and not global_batch:
            raise ValueError(
                "infosam_terms: process_group must go with global_batch=True, got it without; leave it out for the "
                "loss of this process's samples"
            )
        objective = Objective(lambda_r, lambda_d, alpha, distillation, detach_teacher_relation)
        check_objective("infosam_terms", objective)
        check_impl("infosam_terms", impl)
        check_features("infosam_terms", "teacher", teacher, may_be_empty=scope.spans_processes)
        check_features("infosam_terms", "student", student, may_be_empty=scope.spans_processes)
        check_sample_weight("infosam_terms", sample_weight, objective, student, check_finite=check_finite)
        return relation_terms(
            "infosam_terms",
            relation,
            teacher,
            student,
            objective,
            scope,
            sample_weight,
            check_finite=check_finite,
            impl=impl,
        )


def relation_terms(
    function: str,
    relation: RelationModule,
    teacher: SAMFeatures,
    student: SAMFeatures,
    objective: Objective,
    scope: Scope,
    sample_weight: Tensor | None = None,
    settings: Mapping[str, object] | None = None,
    *,
    check_finite: bool,
    impl: Impl,
) -> InfoSAMTerms:
    """Return the loss with its terms and relations.

    The objective, each model's features and the weights of the samples were checked before; ``function`` begins the
    messages of what is wrong with the pair. ``settings`` are what all processes must have alike; None for the objective
    alone.
    """
    least = 1 if objective.compares_pairs else 2
    images = scope.images(function, teacher, student, least=least, check_finite=check_finite)
    pair = Pair(*teacher[:2], *student[:2], images, sample_weight)
    value = relation.value(student.mask_tokens, function=function)
    join = None
    if scope.joins:
        gram = partial(batch_gram, impl=impl)
        join = scope.join(function, settings or objective._asdict(), relation, gram, least=least)
    terms = feature_terms(pair, value, objective, join=join, impl=impl)
    return InfoSAMTerms(*terms[:3], Relations(terms.teacher_gram, terms.student_gram, objective.alpha))


def check_sample_weight(
    function: str, weight: Tensor | None, objective: Objective, student: SAMFeatures, *, check_finite: bool
) -> None:
    """Raise unless samples can have these weights; ``function`` begins the message.

    Raises:
        TypeError: they are not a floating-point tensor.
        ValueError: the form has none, they are not one per sample on the features' device, or their values are out of
            range.

    """
    if weight is None:
        return
    if not objective.compares_pairs:
        raise ValueError(
            f"{function}: sample_weight must go with distillation='jensen_renyi', got it with "
            f"{objective.distillation!r}, which compares samples with one another; leave it out"
        )
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        fact = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"{function}: sample_weight must be a floating-point tensor, got {fact}; give one number per sample"
        )
    tokens = student.mask_tokens
    if weight.shape != tokens.shape[:1]:
        raise ValueError(
            f"{function}: sample_weight must have shape [s] = [{len(tokens)}], got {list(weight.shape)}; give one "
            "number per sample (image, prompt), in the order of the mask tokens"
        )
    if weight.device != tokens.device:
        raise ValueError(
            f"{function}: sample_weight must be on the features' device {tokens.device}, got {weight.device}; move it "
            f"with sample_weight.to('{tokens.device}')"
        )
    if torch.compiler.is_compiling() or not (check_finite or weight.device.type == "cpu"):
        return
    values = weight.detach()
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(
            f"{function}: sample_weight must be finite and not negative, got {values.tolist()}; 0 leaves a sample out"
        )
    if check_finite and len(values) and not bool((values > 0).any()):
        raise ValueError(
            f"{function}: sample_weight must be above 0 for some sample under check_finite, got {values.tolist()}; "
            "leave the loss out of a step whose teacher is wrong on every sample"
        )
