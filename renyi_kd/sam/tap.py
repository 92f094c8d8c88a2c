"""A model with hooks that collect its image features and mask tokens."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import nn

from renyi_kd.sam.assembly import features_of_calls
from renyi_kd.sam.bound_forward import refuse_forward_of_another_model
from renyi_kd.sam.explanation import AS_REPLICAS, BESIDE_A_TEACHER, why_nothing
from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.hooks import Hooks, drop_hooks_of_copied_taps, listening_alone
from renyi_kd.sam.module_paths import Place
from renyi_kd.sam.parts import known_decoders
from renyi_kd.sam.recording import Recording
from renyi_kd.sam.replay import replaying_prompts
from renyi_kd.sam.run import CallFunction, evaluating, named_errors, positional_names, run_model, runs_of_step
from renyi_kd.sam.step import Step
from renyi_kd.sam.threads import observed_elsewhere, observing


class TapSettings(NamedTuple):
    """What a tap was made with, beside its model."""

    image_features: Place | None
    mask_tokens: Place | None
    call: CallFunction | None
    replay_prompts: bool
    decoder_loops_over_images: bool


class _Thread:
    """What a tap keeps of a thread that runs its model.

    Attributes:
        recording: the step of this thread, which no other thread writes into.
        error_before: what was being handled when the forward under way began.

    """

    def __init__(self) -> None:
        self.recording = Recording()
        self.error_before: BaseException | None = None


def tap(
    model: nn.Module,
    *,
    image_features: Place | None = None,
    mask_tokens: Place | None = None,
    call: CallFunction | None = None,
    replay_prompts: bool = False,
    decoder_loops_over_images: bool = False,
) -> Tap:
    """Attach to a model so that the loss can read its image features and mask tokens.

    The mask decoder is found by its structure, inside DDP, torch.compile and peft. It is read where no token index is
    needed: the image features are the decoder's ``image_embeddings`` argument, mask token i is the input of
    hypernetwork MLP i. For any other model name both places.

    Args:
        model: the module that the training loop calls, wrapped or not. Tap it before its first compiled call, and after
            peft or anything else has replaced its modules.
        image_features: for a model that is not recognised. The path of the module whose output is the image features
            ``[b, d, h, w]``, or ``(path, take)`` with a function that takes them from the output.
        mask_tokens: likewise, for mask tokens ``[s, n, d]``, ``[s, d]`` or ``[b, p, n, d]``; that module must run
            after the one of ``image_features``. With several prompts for each of several images only the last form
            tells which belongs to which.
        call: ``call(model, batch)`` runs the model where the batch is not what its forward takes.
        replay_prompts: of a teacher, whether its prompt encoder is handed the student's points, labels and boxes, call
            by call. For a forward that draws its prompts, or makes others in eval mode.
        decoder_loops_over_images: whether one call of the decoder makes a group of mask tokens for each of its images,
            in their order.

    Returns:
        The :class:`Tap`, which stays attached until it is closed or collected.

    Raises:
        TypeError: ``model`` is not a module, or was made by ``torch.jit``; or a place is not a path.
        ValueError: no mask decoder is found, a path names no module, or only one of the two places is given. Or a
            module has a ``forward`` of its own that runs another model, as a deep copy of a compiled one has.

    """
    settings = TapSettings(image_features, mask_tokens, call, replay_prompts, decoder_loops_over_images)
    return Tap(model, settings)


class Tap:
    """A model with hooks that collect its image features and mask tokens; made by :func:`tap`.

    Calling the tap runs the model; so does a loop of your own that calls the model or its parts: the hooks see both.
    Every decoder call since the loss was last computed is collected, with (image, prompt) pairs as samples, and taken
    once. What runs without gradient is not collected: neither a validation nor a first pass inside the forward. Nor
    are the repeated calls of activation checkpointing, and prompts that are the padding of transformers' processors.
    What a backward pass has already used when the next step begins is not collected either.

    Each thread has a step of its own: the loss is computed, and ``clear()`` called, in the thread that ran the student;
    backward may run in any. Teachers, which switch modes of their model, run one after the other. What is collected
    goes with its thread.

    The model is never edited: its state dict, signature, pickles and copies are as before, and a copy of it is not
    tapped. Close the tap before ``torch.save(model)`` of a whole model: another process numbers its hooks anew, and
    calls its own as those that stood there. A copy of the tap itself taps the copy of its model. A tap is no module, so
    it adds no parameters to what holds it. Leaving ``with tap(model) as tapped:`` closes it.
    """

    def __init__(self, model: nn.Module, settings: TapSettings) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"tap: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise TypeError(
                f"tap: model must be made of Python modules, got {type(model).__name__} with parts made by torch.jit, "
                "whose inner calls no hook sees; tap the model that was scripted or traced"
            )
        if settings.call is not None and not callable(settings.call):
            raise TypeError(
                f"tap: call must be a function of model and batch, got {settings.call!r}; leave it out for a plain call"
            )
        self.model = model
        # Of whom whether it was run by nn.DataParallel, in whose threads nobody takes what they collect.
        self.ran_as_replicas = False
        self._settings = settings
        self._names = positional_names(model)
        self._local = threading.local()
        self._threads: WeakValueDictionary[int, _Thread] = WeakValueDictionary()
        refuse_forward_of_another_model(model)
        drop_hooks_of_copied_taps(model)
        self._hooks = Hooks(self)
        try:
            self._attach()
        except BaseException:
            # Who keeps the error, as a shell does, keeps this tap, and with it hooks that nobody can close.
            self._hooks.remove()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and return what it returns.

        With a single positional argument, that is the batch: a mapping (only the names that the forward takes are
        passed), a tensor, a tuple or list of positional arguments, a list of dicts (Meta's format), or whatever
        ``call`` or the forward takes as a whole. Anything else is passed on as it is.
        """
        if kwargs or len(args) != 1:
            return self.model(*args, **kwargs)
        return self._run(args[0])

    def take(self, batch: Any = None) -> SAMFeatures:
        """Return what was collected since the last time, and forget it; run the model on ``batch`` if there is none.

        Args:
            batch: the batch of this step. May be None if the model has run; if it was run through the tap, it must
                be the batch that it was run on.

        Returns:
            :class:`SAMFeatures` with all mask tokens, as the model computed them, attached to its graph.

        Raises:
            RuntimeError: nothing was collected and there is no batch, the model ran without gradient or without its
                decoder, or what was collected is stale: of another batch, overwritten, or already differentiated.

        """
        return self.take_step(batch)[0]

    def take_step(self, batch: Any = None) -> tuple[SAMFeatures, Step]:
        """Return what :meth:`take` does, and with it what a teacher has to know of the step."""
        self._check_open()
        if batch is not None and not torch.is_grad_enabled():
            features, recording = self._observe(Step(batch), "student")
            return features, Step(batch, seen=recording.inputs())
        if self._recording.differentiated:
            self.clear()
            raise RuntimeError(
                "tap: the loss must be computed before backward, got a capture that backward has already run through; "
                "run the student, then compute the loss, then call backward once on the sum (the capture is dropped)"
            )
        if not self.pending:
            self._refuse_step_of_another_thread()
            if batch is None or self._recording.ran_without_decoder or self._recording.ran_past_its_call:
                raise RuntimeError(self._why_nothing(self._recording))
            self._run(batch)
        step = Step(batch, tuple(self._recording.runs), self._recording.inputs())
        if batch is not None and not step.ran_on(batch):
            count = len(step.ran)
            self.clear()
            raise RuntimeError(
                "tap: the batch must be all that the model ran on since the last loss, got another or one of "
                f"{count} (the stale capture is now dropped), or one that was overwritten; pass the same object to "
                "model and loss, leave the batch out to use all, and call clear() after a step whose loss is skipped"
            )
        if self._recording.encoder_lost_gradient:
            self.clear()
            raise RuntimeError(
                "tap: the image features must have a gradient where the image encoder is trained, got features without "
                "one from an encoder that was called with gradients on, as under reentrant checkpointing; checkpoint "
                "with use_reentrant=False: gradient_checkpointing_enable({'use_reentrant': False}), or freeze the "
                "encoder"
            )
        features, _ = self._finish()
        return features, step

    def observe(self, step: Any) -> SAMFeatures:
        """Run the model on what the student saw, without gradient, in eval mode: the teacher's part.

        What was collected before is dropped, and every module is left in the mode it was in.

        Args:
            step: the :class:`Step`, or a batch to run the model on.

        Returns:
            :class:`SAMFeatures` of the same samples as the student's.

        Raises:
            RuntimeError: the model ran without calling a mask decoder, or what the student ran on was overwritten.
            ValueError: nothing says what to run on, or the model saw other images or prompts than the student.

        """
        step = step if isinstance(step, Step) else Step(step)
        features, recording = self._observe(step, "teacher")
        if step.comparison is not None and step.seen is not None:
            step.comparison(step.seen, recording.inputs())
        return features

    @property
    def pending(self) -> bool:
        """Whether anything that this thread ran waits to be taken."""
        return len(self._recording) > 0

    def clear(self) -> None:
        """Drop what was collected in this thread, as after a step whose loss is skipped."""
        self._recording = Recording()
        self.ran_as_replicas = False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Keep what was collected out of reach, and put it back in the end."""
        before, self._recording = self._recording, Recording()
        try:
            yield
        finally:
            self._recording = before

    def close(self) -> None:
        """Remove the hooks and drop what was collected in any thread; the tap cannot be used again."""
        self._hooks.remove()
        self._local = threading.local()

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (self.model, self._settings)

    def _attach(self) -> None:
        """Register all hooks.

        Raises:
            ValueError: there is nothing to read, or not where the settings say.

        """
        image_features, mask_tokens = self._settings.image_features, self._settings.mask_tokens
        # First and last, also where the model is its own decoder: its call lies around those of its parts.
        self._hooks.before(self.model, lambda tap, _module, args, kwargs, _output: tap._begin_forward(args, kwargs))
        if image_features is None and mask_tokens is None:
            self._hooks.attach_to_decoders(self.model, known_decoders(self.model))
        elif image_features is None or mask_tokens is None:
            raise ValueError(
                "tap: image_features and mask_tokens must be given together, got only one; "
                "name both places, or none to have them found"
            )
        else:
            self._hooks.attach_to_places(self.model, image_features, mask_tokens)
        # A step that fails in a later image leaves whole calls of the earlier ones.
        self._hooks.after(self.model, lambda tap, *call: tap._end_forward(call[-1]), always=True)

    def _observe(self, step: Step, role: str) -> tuple[SAMFeatures, Recording]:
        self._check_open()
        with observing(self.model):
            return self._observe_alone(step, role)

    def _observe_alone(self, step: Step, role: str) -> tuple[SAMFeatures, Recording]:
        if any(each.recording.runs_with_gradient for each in self._other_threads()):
            raise RuntimeError(BESIDE_A_TEACHER)
        runs = runs_of_step(self.model, step, self._settings.call)
        self._recording = Recording(observing=True)
        prompts = (
            replaying_prompts(self._hooks.prompt_encoder, step.seen) if self._settings.replay_prompts else nullcontext()
        )
        try:
            with (
                listening_alone(self),
                torch.no_grad(),
                evaluating(self.model),
                prompts,
                named_errors(role, self.model),
            ):
                for run in runs:
                    run()
            if step.seen is not None:
                self._recording.leave_out(step.seen.with_gradient)
            return self._finish()
        finally:
            self.clear()

    def _begin_forward(self, args: Any, kwargs: Any) -> None:
        self._thread.error_before = sys.exc_info()[1]
        self._recording.begin_forward(args, kwargs, self._names)
        self._recording.ran_beside_a_teacher |= torch.is_grad_enabled() and observed_elsewhere(self.model)

    def _end_forward(self, output: Any) -> None:
        self._recording.end_run()
        # An exception that was there before is being handled by the caller: the model may well return None.
        failed = output is None and sys.exc_info()[1] is not self._thread.error_before
        # An exception holds the frames that it left, and all that is in them.
        self._thread.error_before = None
        if failed:
            self.clear()

    def _run(self, batch: Any) -> Any:
        self._recording.begin_run(batch)
        call = self._settings.call
        try:
            with named_errors("student", self.model):
                output = call(self.model, batch) if call else run_model(self.model, batch)
        except BaseException:
            self.clear()
            raise
        self._recording.end_run()
        return output

    def _finish(self) -> tuple[SAMFeatures, Recording]:
        """Return the features of what was collected, and what else is known of it; and forget it."""
        recording = self._recording
        if not self.pending:
            raise RuntimeError(self._why_nothing(recording, after_a_run=True))
        as_replicas = self.ran_as_replicas
        self.clear()
        if as_replicas:
            raise RuntimeError(AS_REPLICAS)
        if recording.ran_beside_a_teacher:
            raise RuntimeError(BESIDE_A_TEACHER)
        if self._hooks.hypernetworks_changed():
            raise RuntimeError(
                "tap: the mask decoder must have the hypernetworks that it was tapped with, got others; tap the model "
                "again after modules were replaced, as by peft's modules_to_save"
            )
        features = features_of_calls(recording.calls, self._settings.decoder_loops_over_images)
        if features.image_features.is_inference() and not torch.is_inference_mode_enabled():
            # Autograd cannot save an inference tensor for backward.
            image_features, mask_tokens = features.image_features.clone(), features.mask_tokens.clone()
            return SAMFeatures(image_features, mask_tokens, features.image_index), recording
        return features, recording

    @property
    def _recording(self) -> Recording:
        """What this thread has left behind."""
        return self._thread.recording

    @_recording.setter
    def _recording(self, recording: Recording) -> None:
        self._thread.recording = recording

    @property
    def _thread(self) -> _Thread:
        thread: _Thread | None = getattr(self._local, "thread", None)
        if thread is None:
            thread = self._local.thread = self._threads[threading.get_ident()] = _Thread()
        return thread

    def _other_threads(self) -> list[_Thread]:
        known = (each() for each in self._threads.valuerefs())
        return [each for each in known if each is not None and each is not self._thread]

    def _refuse_step_of_another_thread(self) -> None:
        waiting = [each.recording for each in self._other_threads() if not each.recording.differentiated]
        count = sum(len(recording) for recording in waiting if not recording.observing)
        if count:
            raise RuntimeError(
                "tap: the loss must be computed in the thread in which the student ran, got no decoder calls in this "
                f"one, and {count} in another that wait for a loss; run the student here first, or call take() there "
                "and give the loss the features; in a step whose loss is skipped, call clear() there"
            )

    def _why_nothing(self, recording: Recording, *, after_a_run: bool = False) -> str:
        if self.ran_as_replicas:
            # Said once: the next run may be as it must.
            self.clear()
            return AS_REPLICAS
        return why_nothing(self.model, self._hooks.decoders, recording, after_a_run=after_a_run)

    def _check_open(self) -> None:
        if not self._hooks:
            raise RuntimeError("tap: the tap must be open, got one that was closed; tap the model again")
