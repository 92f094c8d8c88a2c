"""The InfoSAM loss as a module, which takes its features from the taps of teacher and student."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn

from renyi_kd.diagnostics import RelationDiagnostics
from renyi_kd.functional import check_sample_weight, relation_terms
from renyi_kd.gradient_cache import Replayed
from renyi_kd.gradient_share import GradientMeasurement
from renyi_kd.gradient_watch import GradientWatch
from renyi_kd.objective import Distillation, InfoSAMTerms, Objective, check_objective
from renyi_kd.ops.dispatch import Impl, check_impl, resolve
from renyi_kd.relation import RelationModule, check_start
from renyi_kd.sam.features import SAMFeatures, check_features
from renyi_kd.sam.inputs import CompareInputs, Comparison
from renyi_kd.sam.reads import ReadFeatures, Reads, with_reads
from renyi_kd.sam.step import Step
from renyi_kd.sam.tap import Tap
from renyi_kd.samples.agreement import telling_of_errors
from renyi_kd.samples.bank import SampleBank
from renyi_kd.samples.processes import check_group, n_processes
from renyi_kd.samples.scope import Scope
from renyi_kd.share_control import ShareControl
from renyi_kd.teachers.model_pair import ModelPair
from renyi_kd.teachers.teacher import Teacher
from renyi_kd.whole_state import LoadsWhole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Token = Literal["first", "all"] | int
# Relations closer to one another than this leave gradients that are lost in those of any task.
ALIKE = 0.9999


class InfoSAMLoss(LoadsWhole):
    """The InfoSAM loss as a module: ``loss += infosam_loss(teacher, student, batch)``.

    It owns the relation module, whose parameters belong in the optimiser beside the student's:
    ``AdamW([*trainable, *infosam_loss.parameters()])``. Its state dict is that of the relation module under
    ``relation.``, and of ``gradient_share`` and a bank where there is one. With it and the same arguments a run goes on
    after a step as if it had never stopped; in several processes each saves its own. What it computes, and its limits,
    are those of :func:`infosam_terms`. Weights, order and form are its ``objective``, which a schedule replaces; see
    :class:`Objective`.

    Args:
        dim: channels of image features and mask tokens; 256 in every released SAM.
        lambda_r: weight of the compression term L_r.
        lambda_d: weight of the distillation term L_d.
        alpha: order of the entropies, in (0, inf].
        distillation: the form of L_d: ``"mutual_information"``, the paper's, or one that pulls the student's relations
            onto the teacher's: ``"cauchy_schwarz"``, ``"debiased"``, ``"jensen_renyi"``.
        gradient_share: the share that the loss is to have in the gradient, as ``diagnostics`` tells it. That is the
            norm of its own over that of the task's, at image features or mask tokens, whichever is larger. One weight
            of both terms follows the measured share of earlier steps, whatever the scale of the task, the form or the
            batch; a factor of your own before the loss has no effect then. In (0, 10]; None leaves the weights as they
            are. The weight begins at 2^-10, and at most doubles from step to step. It is part of the state dict. In
            several processes every process calls the loss, as often as the others.
        token: which mask tokens count: ``"first"`` as in the paper, an index, or ``"all"``.
        detach_teacher_relation: whether L_d leaves the module without gradient through the teacher's relation.
        global_batch: whether the loss is that of the samples of all processes together; for a loss that is wrapped in
            DDP or FSDP like the model. Every process calls it, as often as the others, in validation too. One may have
            no samples in a step: :class:`SAMFeatures` of b = s = 0, which taps refuse. Where one fails, the others name
            it, see :func:`infosam_terms`.
        process_group: the processes of ``global_batch`` and ``gradient_share``, where not all train: the
            ``torch.distributed.ProcessGroup`` that DDP or the mesh of FSDP has too. None for the default group. Copies
            have the same group; to be pickled, a loss must have none.
        bank_size: how many samples of earlier steps join those of a step, as constants, for batches of a few samples or
            of one. The first step of batches of one then gives 0. A step without gradient sees them too, and leaves
            none. The teacher's maps of so many samples stay in memory, 4 MiB each of a SAM at 1024 pixels, or 2 where
            they come in half precision, and are part of the state dict. Under ``global_batch`` every process then
            receives the whole maps of all.
        check_finite: whether to look for NaN and inf in every step; waits for the device.
        compare_inputs: whether images and prompts that reach teacher and student are compared. ``"first"``: in full in
            the first steps, and by number, shape and memory afterwards. ``"always"``: in full, which waits for the
            device in every step. ``"never"``: not at all, for models that are meant to see different things. Prompts
            that are masks are left out.
        impl: ``"auto"``, ``"reference"`` or ``"triton"``; an explicit choice never falls back.
        generator: what the relation module is drawn from; None for a start that is always the same, see
            :class:`RelationModule`.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: an argument is out of its range; or ``process_group`` leaves out this process, or has neither
            ``global_batch`` nor ``gradient_share`` to serve.
        RuntimeError: ``impl`` names an implementation that is not there.

    Source: Zhang et al., InfoSAM, ICML 2025.

    """

    def __init__(
        self,
        dim: int = 256,
        *,
        lambda_r: float = 1.0,
        lambda_d: float = 0.5,
        alpha: float = 2.0,
        distillation: Distillation = "mutual_information",
        gradient_share: float | None = None,
        token: Token = "first",
        detach_teacher_relation: bool = False,
        global_batch: bool = False,
        process_group: ProcessGroup | None = None,
        bank_size: int = 0,
        check_finite: bool = False,
        compare_inputs: CompareInputs = "first",
        impl: Impl = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_start("InfoSAMLoss", dim, generator)
        self.objective = Objective(lambda_r, lambda_d, alpha, distillation, detach_teacher_relation)
        if token not in ("first", "all") and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
            raise ValueError(f"InfoSAMLoss: token must be 'first', 'all' or an index, got {token!r}; the paper's is 0")
        if isinstance(bank_size, bool) or not isinstance(bank_size, int) or bank_size < 0:
            raise ValueError(
                f"InfoSAMLoss: bank_size must be a number of samples, got {bank_size!r}; 0 takes none of earlier steps"
            )
        if gradient_share is not None and not (_is_number(gradient_share) and 0 < gradient_share <= 10):
            raise ValueError(
                f"InfoSAMLoss: gradient_share must lie in (0, 10], got {gradient_share!r}; 0.1 is a tenth of the "
                "task's gradient, and None keeps the weights as they are"
            )
        check_group("InfoSAMLoss", process_group)
        if process_group is not None and not global_batch and gradient_share is None:
            raise ValueError(
                "InfoSAMLoss: process_group must go with global_batch=True or gradient_share=, got it alone; leave it "
                "out for the loss of each process's samples"
            )
        check_impl("InfoSAMLoss", impl)
        resolve(impl)
        self.relation = RelationModule(dim, generator=generator)
        self.token: Token = token
        self.check_finite = check_finite
        self.impl: Impl = impl
        self.bank = SampleBank(bank_size) if bank_size else None
        self._scope = Scope(global_batch, self.bank, process_group)
        self.share_control = None if gradient_share is None else ShareControl(gradient_share)
        self._last: InfoSAMTerms | None = None
        self._last_weight: Tensor | None = None
        self._pair = ModelPair()
        self._comparison = Comparison(compare_inputs)
        self._gradient_watch = GradientWatch()

    def forward(
        self,
        teacher: Teacher | SAMFeatures,
        student: Tap | SAMFeatures | Replayed,
        batch: Any = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a step, ``[]`` in bits; see :meth:`terms`."""
        if isinstance(student, Replayed):
            # Here and in no method of its own, as wrappers such as DDP must see a call of the module.
            return _part_uncompiled(self, student)
        return self.terms(teacher, student, batch, sample_weight=sample_weight).loss

    def terms(
        self,
        teacher: Teacher | SAMFeatures,
        student: Tap | SAMFeatures,
        batch: Any = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> InfoSAMTerms:
        """Return the loss of a step and its two terms, in bits.

        A tapped student contributes what it computed since the last call, or is run on ``batch`` if there is nothing.
        The teacher is always run here, on what the student ran on, in eval mode and without gradient.

        Args:
            teacher: the tap of the frozen model, :class:`AdapterDisabled`, :class:`CachedTeacher`, anything else with
                ``observe(step)``, or :class:`SAMFeatures`.
            student: the tap of the model in training, or its :class:`SAMFeatures`.
            batch: what the models run on. May be None if the student has run; the teacher then runs on what it ran
                on, which may be several batches. May be None too if no teacher has to run.
            sample_weight: ``[s]``: of the samples in ``"jensen_renyi"``, as in :func:`infosam_terms`.

        Raises:
            TypeError: ``teacher`` is neither a teacher nor features, or ``student`` neither a tap nor features.
            RuntimeError: a tap has nothing to give, see :meth:`Tap.take` and :meth:`Tap.observe`; ``gradient_share``
                has no task to be a share of, or features that a function computed; or a process is missing, under
                ``global_batch`` or ``gradient_share``.
            ValueError: as :func:`infosam_terms`, also for settings that differ between processes; or teacher and
                student share what is trained, or saw other images or prompts.

        Warns:
            UserWarning: the relation module's gradients are never cleared, or the teacher has the student's adapters.

        """
        if self.share_control is not None and torch.compiler.is_compiling():
            return _terms_uncompiled(self, teacher, student, batch, sample_weight)
        with self._telling_of_errors():
            if not isinstance(teacher, Teacher | SAMFeatures):
                raise TypeError(_not_tapped("teacher", teacher))
            if not isinstance(student, Tap | SAMFeatures):
                raise TypeError(_not_tapped("student", student))
            teacher, student = observed_features(self, teacher, student, batch)
            terms = self._terms_of(teacher, student, sample_weight)
            if torch.compiler.is_compiling() or not isinstance(student, ReadFeatures):
                return self._weighed(terms, None)
            return self._weighed(terms, self._measurement(student.reads))

    def diagnostics(self) -> RelationDiagnostics:
        """Return ``terms.diagnostics()`` of the last step: relations, and the loss's share of the gradient.

        Raises:
            RuntimeError: the loss was not computed yet.

        """
        if self._last is None:
            raise RuntimeError(
                "InfoSAMLoss: diagnostics must follow a step, got a loss that was not computed yet; call it first"
            )
        return self._last.diagnostics()

    def scalars(self) -> dict[str, float]:
        """Return the last step as plain numbers for a logger: loss, terms, diagnostics as far as known, and weight.

        Behind a wrapper such as DDP: ``wrapped.module.scalars()``. Waits for the device.

        Raises:
            RuntimeError: the loss was not computed yet.

        Warns:
            UserWarning: the teacher's relations of all samples are alike, so that there is nothing to learn from them.

        """
        diagnostics = self.diagnostics()._asdict()
        assert self._last is not None
        values = {
            "loss": self._last.loss,
            "compression": self._last.compression,
            "distillation": self._last.distillation,
            "weight": self._last_weight,
            **diagnostics,
        }
        numbers = {name: value.item() for name, value in values.items() if value is not None}
        if numbers["teacher_similarity"] > ALIKE:
            warnings.warn(
                "InfoSAMLoss: the teacher's relations must differ from sample to sample, got teacher_similarity "
                f"{numbers['teacher_similarity']:.4f}, so that the loss teaches nothing; load the pre-trained weights "
                "into the teacher, or give it batches of different images or prompts",
                UserWarning,
                stacklevel=2,
            )
        return numbers

    def _terms_of(self, teacher: SAMFeatures, student: SAMFeatures, sample_weight: Tensor | None) -> InfoSAMTerms:
        check_sample_weight("InfoSAMLoss", sample_weight, self.objective, student, check_finite=self.check_finite)
        return relation_terms(
            "InfoSAMLoss",
            self.relation,
            teacher,
            student,
            self.objective,
            self._scope,
            sample_weight,
            self._settings() if self._scope.joins else None,
            check_finite=self.check_finite,
            impl=self.impl,
        )

    def _part(self, replayed: Replayed) -> Tensor:
        """Return what a micro-batch adds to the loss of all, which the first of them computes."""
        cache = replayed.cache
        features = with_reads(self._with_token("student", replayed.features))
        parameters = list(self.relation.parameters())
        measurement = self._measurement(features.reads)
        if cache.gradients is None:
            with self._telling_of_errors():
                teacher, student, sample_weight = cache.micro_batches.join()
                terms = self._weighed(self._terms_of(teacher, student, sample_weight), measurement)
            cache.differentiate(terms.loss, student, parameters, measurement)
        elif cache.gradients.measurement is not None:
            cache.gradients.measurement.watch(features.reads)
        return cache.part(replayed.number, features, parameters)

    def _measurement(self, reads: Reads) -> GradientMeasurement | None:
        """Return what measures the share of a step that reads these tensors; None where nothing can."""
        if not torch.is_grad_enabled():
            return None
        if reads.image_features or reads.mask_tokens:
            return GradientMeasurement(reads)
        if self.share_control is not None:
            raise RuntimeError(
                "InfoSAMLoss: gradient_share must know the student's own tensors, got features that a function "
                "computed; name places whose functions return a module's output or a view of it, or leave it out"
            )
        return None

    def _weighed(self, terms: InfoSAMTerms, gradients: GradientMeasurement | None) -> InfoSAMTerms:
        """Return the terms with the weight that the share asks for, and with what measures the share."""
        control, weight = self.share_control, None
        loss, compression, distillation = terms
        if control is not None:
            if gradients is None:
                weight = control.weight.clone()
            else:
                weight = control.next_weight(self._settings(), group=self.process_group)
            loss = weight * loss
            if gradients is not None:
                control.follow(gradients, weight)
        relations = None if terms.relations is None else terms.relations._replace(gradients=gradients)
        terms = InfoSAMTerms(loss, compression, distillation, relations)
        self._last = InfoSAMTerms(loss.detach(), compression.detach(), distillation.detach(), relations)
        self._last_weight = weight
        return terms

    def _telling_of_errors(self) -> AbstractContextManager[None]:
        """Return what lets other processes hear of an error within it, where they wait for this one."""
        control, spans_processes = self.share_control, self._scope.spans_processes
        follows = control is not None and torch.is_grad_enabled() and n_processes(self.process_group) > 1
        if not (spans_processes or follows):
            return nullcontext()
        exchanges = spans_processes or (control is not None and not control.agreed)
        return telling_of_errors(self.relation.key_proj.weight.device, exchanges=exchanges, group=self.process_group)

    def _settings(self) -> dict[str, object]:
        """Return what all processes must have alike."""
        names = "gradient_share", "token", "global_batch", "bank_size"
        return {**self.objective._asdict(), **{name: getattr(self, name) for name in names}}

    @property
    def objective(self) -> Objective:
        """Weights, order and form of the loss; checked when it is set."""
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        check_objective("InfoSAMLoss", objective)
        self._objective = objective

    @property
    def gradient_share(self) -> float | None:
        """The share of the task's gradient that the loss is to have; None where its weights are as they are."""
        return None if self.share_control is None else self.share_control.share

    @property
    def lambda_r(self) -> float:
        """Weight of L_r."""
        return self.objective.lambda_r

    @property
    def lambda_d(self) -> float:
        """Weight of L_d."""
        return self.objective.lambda_d

    @property
    def alpha(self) -> float:
        """Order of the entropies."""
        return self.objective.alpha

    @property
    def distillation(self) -> Distillation:
        """Form of L_d."""
        return self.objective.distillation

    @property
    def detach_teacher_relation(self) -> bool:
        """Whether L_d leaves the module without gradient through the teacher's relation."""
        return self.objective.detach_teacher_relation

    @property
    def global_batch(self) -> bool:
        """Whether the loss goes over the samples of all processes."""
        return self._scope.global_batch

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that train together; None for those of the default group."""
        return self._scope.group

    @property
    def bank_size(self) -> int:
        """How many samples of earlier steps join those of a step."""
        return 0 if self._scope.bank is None else self._scope.bank.size

    def __getstate__(self) -> dict[str, Any]:
        # A copy has made no step.
        return {**self.__dict__, "_last": None, "_last_weight": None}

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.objective._asdict().items())
        if self.gradient_share is not None:
            settings += f", gradient_share={self.gradient_share!r}"
        settings += f", token={self.token!r}, global_batch={self.global_batch}, bank_size={self.bank_size}"
        if self.process_group is not None:
            settings += f", process_group={distributed.get_process_group_ranks(self.process_group)}"
        return settings

    def _with_token(self, name: str, features: SAMFeatures) -> SAMFeatures:
        """Return the features with the mask tokens that count."""
        check_features("InfoSAMLoss", name, features, may_be_empty=self._scope.spans_processes)
        if self.token == "all":
            return features
        index = 0 if self.token == "first" else self.token
        if index >= features.mask_tokens.shape[1]:
            raise ValueError(
                f"InfoSAMLoss: token must be below the number of mask tokens, got {index} with "
                f"{features.mask_tokens.shape[1]} tokens; 'first' and 'all' always exist"
            )
        return features._replace(mask_tokens=features.mask_tokens[:, index : index + 1])


def _terms_uncompiled(
    infosam_loss: InfoSAMLoss,
    teacher: Teacher | SAMFeatures,
    student: Tap | SAMFeatures,
    batch: Any,
    sample_weight: Tensor | None,
) -> InfoSAMTerms:
    """Compute a loss in a compiled step whose share must be measured: neither hooks nor the weight can be traced."""
    terms = torch.compiler.disable(infosam_loss.terms)  # type: ignore[no-untyped-call]
    result: InfoSAMTerms = terms(teacher, student, batch, sample_weight=sample_weight)
    return result


def _part_uncompiled(infosam_loss: InfoSAMLoss, replayed: Replayed) -> Tensor:
    """Compute a part of a loss, in a compiled step outside of the graph, which could not hold hooks and gradients."""
    if not torch.compiler.is_compiling():
        return infosam_loss._part(replayed)
    part: Tensor = torch.compiler.disable(infosam_loss._part)(replayed)  # type: ignore[no-untyped-call]
    return part


def observed_features(
    infosam_loss: InfoSAMLoss, teacher: Teacher | SAMFeatures, student: Tap | SAMFeatures, batch: Any
) -> tuple[SAMFeatures, SAMFeatures | ReadFeatures]:
    """Return the features that a loss reads of teacher and student in a step; see :meth:`InfoSAMLoss.terms`."""
    step = Step(batch)
    # The student first: what it has collected may be stale, and a teacher's forward takes long.
    if isinstance(student, Tap):
        frozen = getattr(teacher, "model", None)
        if isinstance(frozen, nn.Module):
            infosam_loss._pair.check(frozen, student.model)
        infosam_loss._gradient_watch.look(infosam_loss.relation, student.model)
        student, step = student.take_step(batch)
    # torch.compile traces no hooks, and would find aliases in the place of leaves.
    if not torch.compiler.is_compiling():
        check_features("InfoSAMLoss", "student", student, may_be_empty=infosam_loss._scope.spans_processes)
        student = with_reads(student)
    student = infosam_loss._with_token("student", student)
    if not isinstance(teacher, SAMFeatures):
        teacher = teacher.observe(step._replace(comparison=infosam_loss._comparison))
    return infosam_loss._with_token("teacher", teacher), student


# What torch.compiler.disable sets, which here would import the compiler. The reason is what fullgraph=True says.
_terms_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
_terms_uncompiled._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "InfoSAMLoss: gradient_share must be measured outside of torch.compile, which traces no hooks, got "
    "fullgraph=True; leave it out, or compile the models and leave the loss as it is"
)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _not_tapped(name: str, source: object) -> str:
    return (
        f"InfoSAMLoss: {name} must be a tap or SAMFeatures, got {type(source).__name__}; "
        f"attach to a model once, before the loop: {name} = tap(model)"
    )
