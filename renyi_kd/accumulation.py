"""The loss of a whole batch in micro-batches, one of which at a time keeps its graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from renyi_kd.functional import check_sample_weight
from renyi_kd.gradient_cache import GradientCache, Replayed
from renyi_kd.loss import InfoSAMLoss, observed_features
from renyi_kd.micro_batches import MicroBatches
from renyi_kd.sam.memory import version
from renyi_kd.sam.rehearsal import RandomState, random_state, rehearsing
from renyi_kd.sam.tap import Tap
from renyi_kd.teachers.teacher import Teacher

# In so many whole batches features of both passes are compared in value, for which the host waits.
_COMPARED = 3


class _Collected(NamedTuple):
    """A micro-batch, and the random state that its run began with."""

    batch: Any
    random: RandomState


@dataclass
class _Passes:
    """Where both passes over the micro-batches of a step stand.

    Attributes:
        cache: their features, and then the gradients.
        collected: the micro-batches of the first pass.
        versions: of the weights that are trained, in it.
        replaying: whether the second pass has begun.
        waiting: whether a micro-batch of the second pass has no loss yet.
        n_done: how many have one.

    """

    cache: GradientCache
    collected: list[_Collected] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)
    replaying: bool = False
    waiting: bool = False
    n_done: int = 0


class Accumulation:
    """The loss of a whole batch whose micro-batches run, and are differentiated, one after the other.

    The loss compares all samples of a batch, so a mean of the losses of its parts is another one. Here a first pass
    runs student and teacher on each micro-batch and keeps their features alone. A second pass runs the student once
    more, and passes on the gradient that the loss of them all has at its features:

        accumulation = Accumulation(infosam_loss, teacher, student)
        for batch in micro_batches:
            accumulation.collect(batch)
        for batch in accumulation.replay():
            loss = task_loss(student(batch), batch["masks"]) + accumulation.loss()
            (loss / len(micro_batches)).backward()
        optimizer.step()

    Gradients of student and relation module are, to rounding, those of ``infosam_loss(teacher, student)`` after the
    student has run on all micro-batches, with all their graphs in memory. In the second pass every micro-batch begins
    with the random state of PyTorch that it began with in the first. The first leaves the model's buffers, such as
    running statistics, as they were, and exchanges no gradients under DDP. What else a forward counts or draws, it
    counts or draws twice. Micro-batches may have different numbers of images and prompts, and a single sample. The
    bank, ``global_batch`` and ``gradient_share`` see one step with all samples; ``infosam_loss.scalars()`` and
    ``diagnostics()`` tell of it.

    Args:
        infosam_loss: the loss, wrapped like the model or not.
        teacher: the tap of the frozen model, or another teacher; not features.
        student: the tap of the model in training. ``student(batch)`` must run it as the loop does; where the loop calls
            its parts, say how by ``tap(model, call=...)``.

    Raises:
        TypeError: an argument is none of these.

    Cost: the student's forward once more. Memory: the graph of one micro-batch. Beside it the image features of student
    and teacher of all micro-batches until the loss is computed, then also the gradient at the student's; and from then
    on that gradient. For a SAM at 1024 pixels each of the three is 4 MiB an image in fp32. While a micro-batch is
    collected there is a copy of the student's buffers too.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021.

    """

    def __init__(self, infosam_loss: nn.Module, teacher: Teacher, student: Tap) -> None:
        modules = infosam_loss.modules() if isinstance(infosam_loss, nn.Module) else ()
        inner = next((module for module in modules if isinstance(module, InfoSAMLoss)), None)
        if inner is None:
            raise TypeError(
                "Accumulation: infosam_loss must be an InfoSAMLoss, wrapped or not, got "
                f"{type(infosam_loss).__name__}; make one: InfoSAMLoss(dim=256)"
            )
        for name, source, kind in (("teacher", teacher, Teacher), ("student", student, Tap)):
            if not isinstance(source, kind):
                raise TypeError(
                    f"Accumulation: {name} must be a tap, got {type(source).__name__}; attach to a model once, before "
                    f"the loop: {name} = tap(model)"
                )
        self._infosam_loss = infosam_loss
        self._inner = inner
        self._teacher = teacher
        self._student = student
        self._n_compared = 0
        self.clear()

    def collect(self, batch: Any, *, sample_weight: Tensor | None = None) -> None:
        """Run student and teacher on a micro-batch of the first pass, and keep their features.

        Call it in the autocast that the second pass runs in.

        Args:
            batch: what the student's tap is called with, and the teacher runs on.
            sample_weight: ``[s]``: of its samples in ``"jensen_renyi"``; for all micro-batches or for none.

        Raises:
            RuntimeError: the second pass of the micro-batches before has not ended, or the student has run since the
                last loss.
            ValueError: the features do not fit those of the micro-batches before; and as :meth:`InfoSAMLoss.terms`.

        """
        passes = self._passes
        if passes.replaying:
            raise RuntimeError(
                "Accumulation: collect must follow the end of replay(), got a second pass with "
                f"{len(passes.collected) - passes.n_done} of {len(passes.collected)} micro-batches to go; compute the "
                "loss of each, or call clear() after a step that is skipped"
            )
        if self._student.pending:
            raise RuntimeError(
                "Accumulation: collect must run the student itself, got one that has run since the last loss; call "
                "it in the second pass alone, or clear() on the student's tap"
            )
        model, inner = self._student.model, self._inner
        random = random_state(model, batch)
        # Under global_batch they wait for the loss of all micro-batches.
        with inner._telling_of_errors():
            with rehearsing(model):
                teacher, student = observed_features(inner, self._teacher, self._student, batch)
            check_sample_weight(
                "Accumulation", sample_weight, inner.objective, student, check_finite=inner.check_finite
            )
            passes.cache.micro_batches.add(teacher, student, sample_weight)
        if not passes.collected:
            passes.versions = _versions(model)
        passes.collected.append(_Collected(batch, random))

    def replay(self) -> Iterator[Any]:
        """Return the micro-batches in their order, each with the random state that it had in the first pass.

        Run the student on each, and compute :meth:`loss` once, before the next.

        Raises:
            RuntimeError: there was no first pass, or its replay has begun; or, on the way, the loss of a micro-batch
                was not computed.

        """
        passes = self._passes
        if passes.replaying or not passes.collected:
            fact = "a second call of it" if passes.replaying else "no micro-batches"
            raise RuntimeError(
                f"Accumulation: replay must follow a first pass, once, got {fact}; call collect(batch) for each "
                "micro-batch, or clear() after a step that is skipped"
            )
        passes.replaying = True
        return _replayed(passes)

    def loss(self) -> Tensor:
        """Return the loss of the whole batch, ``[]`` in bits, for the micro-batch that the student has just run on.

        Its value is that of the whole batch in every micro-batch. Its gradient is what the micro-batch is due, times
        their number: divide it by that like the task's loss, or leave it to the framework that divides both. The mean
        over the micro-batches is then the loss, with its gradient, however uneven they are. First derivatives only.

        Raises:
            RuntimeError: no micro-batch of :meth:`replay` waits for its loss; gradients are off; the student has not
                run, was trained since the first pass, or gives other features than there. Their number and shapes are
                compared in every step, and values in the first three whole batches, to 3 %.
            ValueError: as :meth:`InfoSAMLoss.terms`.

        """
        passes = self._passes
        if not passes.waiting:
            raise RuntimeError(
                "Accumulation: loss must be computed once for each micro-batch of replay(), got "
                f"{'a second one' if passes.n_done else 'none of it'}; loop over the second pass: "
                "for batch in accumulation.replay()"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "Accumulation: loss must be computed with gradient, got torch.no_grad(); for a validation use "
                "infosam_loss(teacher, student, batch)"
            )
        now = _versions(self._student.model)
        if any(now.get(key, before) != before for key, before in passes.versions.items()):
            raise RuntimeError(
                "Accumulation: the student must stay as it is from collect() to the last loss(), got weights that were "
                "written to; call optimizer.step() once, after the second pass"
            )
        features, _ = self._student.take_step()
        part: Tensor = self._infosam_loss(self._teacher, Replayed(passes.cache, passes.n_done, features))
        passes.waiting, passes.n_done = False, passes.n_done + 1
        if passes.n_done == len(passes.collected):
            self._n_compared += 1
            self.clear()
        return part

    def clear(self) -> None:
        """Drop what was collected, as after a step that is skipped."""
        self._passes = _Passes(GradientCache(MicroBatches(compares_values=self._n_compared < _COMPARED)))


def _replayed(passes: _Passes) -> Iterator[Any]:
    for batch, random in passes.collected:
        _check_done(passes)
        passes.waiting = True
        random.restore()
        yield batch
    _check_done(passes)


def _check_done(passes: _Passes) -> None:
    if passes.waiting:
        raise RuntimeError(
            "Accumulation: loss must be computed once for each micro-batch of replay(), got none for micro-batch "
            f"{passes.n_done + 1} of {len(passes.collected)}; call accumulation.loss() after the student has run on it"
        )


def _versions(model: nn.Module) -> dict[int, int]:
    """Return how often each weight that is trained was written to; of wrappers that move them that is not known."""
    trained = (value for value in model.parameters() if value.requires_grad and type(value) in (Tensor, nn.Parameter))
    return {id(value): version(value) for value in trained}
