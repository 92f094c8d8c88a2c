"""Forward hooks that read image features and mask tokens from a model while it runs; the model is not edited."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.module_paths import Place, modules_at, plain, taken
from renyi_kd.sam.parts import FAMILIES, Decoder, find_decoders, why_unsupported
from renyi_kd.sam.recording import Capture
from renyi_kd.sam.run import differ, evaluating, forward_parameters, run_model

Call = Callable[[nn.Module, Any], Any]

# Seven clicks on each of eight frames are 64 calls; far more than that is a forgotten loss, and holds its graph.
_MANY_CALLS = 256


def tap(
    model: nn.Module,
    *,
    image_features: Place | None = None,
    mask_tokens: Place | None = None,
    call: Call | None = None,
) -> Tap:
    """Attach to a model so that the loss can read its image features and mask tokens.

    The mask decoder is found by its structure, inside DDP, torch.compile and peft, and read
    where no token index is needed: the image features are the decoder's ``image_embeddings`` argument, mask token i
    is the input of hypernetwork MLP i. For any other model name both places.

    Args:
        model: the module that the training loop calls, wrapped or not. Tap it before its first compiled call.
        image_features: for a model that is not recognised, the path of the module whose output is the image features
            ``[b, d, h, w]``, or ``(path, take)`` with a function that takes them from the output.
        mask_tokens: likewise, for mask tokens ``[s, n, d]``, ``[s, d]`` or ``[b, p, n, d]``; that module must run
            after the one of ``image_features``.
        call: ``call(model, batch)`` runs the model where the batch is not what its forward takes.

    Returns:
        The :class:`Tap`, which stays attached until it is closed or collected.

    Raises:
        TypeError: ``model`` is not a module, or a place is not a path.
        ValueError: no mask decoder is found, a path names no module, or only one of the two places is given.

    """
    return Tap(model, image_features=image_features, mask_tokens=mask_tokens, call=call)


class Tap:
    """A model with hooks that collect its image features and mask tokens; made by :func:`tap`.

    Calling the tap runs the model; so does a loop of your own that calls the model or its parts: the hooks see both.
    Every decoder call since the loss was last computed is collected, with (image, prompt) pairs as samples, and taken
    once. What runs without gradient, such as a validation, is not collected. Neither are the repeated calls of
    activation checkpointing, nor what a backward pass has already used when the next step begins.

    The model is never edited: its state dict, signature, pickles and copies are as before, and a copy of it is not
    tapped. A copy of the tap itself taps the copy of its model. A tap is no module, so it adds no parameters to what
    holds it. Leaving ``with tap(model) as tapped:`` closes it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_features: Place | None = None,
        mask_tokens: Place | None = None,
        call: Call | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"tap: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
        self.model = model
        self._places = (image_features, mask_tokens)
        self._call = call
        self._capture = Capture()
        self._batches: list[Any] = []
        self._observing = False
        self._ran_without_gradient = False
        if call is not None and not callable(call):
            raise TypeError(
                f"tap: call must be a function of model and batch, got {call!r}; leave it out for a plain call"
            )
        self._running = False
        self._error_before: BaseException | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)
        _drop_hooks_of_copied_taps(model)
        self._hook_before(model, lambda tap, args, kwargs: tap._begin_forward(args, kwargs))
        # A step that fails in a later image leaves whole calls of the earlier ones. always_call: also after errors.
        end = _Hook(self, lambda tap, _args, _kwargs, output: tap._end_forward(output), without_gradient=True)
        self._handles.append(model.register_forward_hook(end, with_kwargs=True, always_call=True))
        if image_features is None and mask_tokens is None:
            self._attach_to_decoders(_found_decoders(model))
        elif image_features is None or mask_tokens is None:
            raise ValueError(
                "tap: image_features and mask_tokens must be given together, got only one; "
                "name both places, or none to have them found"
            )
        else:
            self._attach_to_places(image_features, mask_tokens)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and return what it returns.

        With a single positional argument, that is the batch: a mapping (only the names that the forward takes are
        passed), a tensor, a tuple or list of positional arguments, a list of dicts (Meta's format), or whatever
        ``call`` takes. Anything else is passed on as it is.
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
            RuntimeError: nothing was collected and there is no batch, the model ran without gradient, or what was
                collected is stale: of another batch, or already differentiated.

        """
        self._check_open()
        if batch is not None and not torch.is_grad_enabled():
            return self.observe(batch)
        if self._capture.differentiated:
            self.clear()
            raise RuntimeError(
                "tap: the loss must be computed before backward, got a capture that backward has already run through; "
                "run the student, then compute the loss, then call backward once on the sum (the capture is dropped)"
            )
        if len(self._capture) == 0:
            if batch is None:
                raise RuntimeError(self._explain_nothing("got no batch and nothing collected"))
            self._run(batch)
        elif batch is not None and any(differ(batch, known) for known in self._batches):
            count = len(self._batches)
            self.clear()
            raise RuntimeError(
                "tap: the batch must be all that the model ran on since the last loss, got another or one of "
                f"{count} (the stale capture is now dropped); pass the same object to model and loss, leave the batch "
                "out to use all, and call clear() after a step whose loss is skipped"
            )
        return self._collect()

    def observe(self, *batches: Any) -> SAMFeatures:
        """Run the model on each batch without gradient, in eval mode, and return its features: the teacher's part.

        What was collected before is dropped, and every module is left in the mode it was in.

        Raises:
            RuntimeError: the model ran without calling a mask decoder.

        """
        self._check_open()
        self.clear()
        self._observing = True
        try:
            with torch.no_grad(), evaluating(self.model):
                for batch in batches:
                    self._run(batch)
        finally:
            self._observing = False
        return self._collect()

    @property
    def batches(self) -> tuple[Any, ...]:
        """What the pending capture came from: batches given to the tap, and the named arguments of other calls."""
        return tuple(self._batches)

    def clear(self) -> None:
        """Drop what was collected, as after a step whose loss is skipped."""
        self._capture = Capture()
        self._batches = []
        self._ran_without_gradient = False

    def close(self) -> None:
        """Remove the hooks and drop what was collected; the tap cannot be used again."""
        _remove(self._handles)
        self.clear()

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        image_features, mask_tokens = self._places
        return _tap_again, (self.model, image_features, mask_tokens, self._call)

    @property
    def pending(self) -> bool:
        """Whether anything waits to be taken."""
        return len(self._capture) > 0

    @property
    def needs_batch(self) -> bool:
        """Whether the model is run by a function of the user's, which takes the batch and nothing else."""
        return self._call is not None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Keep what was collected out of reach, and put it back in the end."""
        before = self._capture, self._batches, self._ran_without_gradient
        self.clear()
        try:
            yield
        finally:
            self._capture, self._batches, self._ran_without_gradient = before

    def _attach_to_decoders(self, decoders: list[Decoder]) -> None:
        for decoder in decoders:

            def begin(tap: Tap, args: Any, kwargs: Any, decoder: Decoder = decoder) -> None:
                family = decoder.family
                # Where the argument is missing the model's own error follows.
                if family.image_argument in kwargs:
                    tap._add_image(kwargs[family.image_argument], plain(decoder.name))
                elif len(args) > family.image_position:
                    tap._add_image(args[family.image_position], plain(decoder.name))

            self._hook_before(decoder.module, begin)
            for number, module in enumerate(decoder.token_modules):

                def add(tap: Tap, args: Any, _kwargs: Any, decoder: Decoder = decoder, number: int = number) -> None:
                    for each, tokens in decoder.mask_tokens(number, args[0]):
                        tap._capture.add_tokens(each, tokens)
                    tap._capture.watch(args[0])

                self._hook_before(module, add)
            self._hook_after(decoder.module, lambda tap, _args, _kwargs, output: tap._end_call(output))

    def _attach_to_places(self, image_features: Place, mask_tokens: Place) -> None:
        def add_image(tap: Tap, _args: Any, _kwargs: Any, output: Any) -> None:
            tap._add_image(taken("image_features", image_features, output))

        def add_tokens(tap: Tap, _args: Any, _kwargs: Any, output: Any) -> None:
            tokens = taken("mask_tokens", mask_tokens, output)
            tokens = tokens[:, None] if tokens.ndim == 2 else tokens.flatten(0, -3)
            for number, token in enumerate(tokens.unbind(1)):
                tap._capture.add_tokens(number, token)
            # What the function took is a tensor of its own; backward runs through the module's.
            tap._end_call(output)

        for module in modules_at(self.model, "image_features", image_features):
            # A frozen encoder may run without gradient in a step that trains the decoder.
            handle = module.register_forward_hook(_Hook(self, add_image, without_gradient=True), with_kwargs=True)
            self._handles.append(handle)
        for module in modules_at(self.model, "mask_tokens", mask_tokens):
            self._hook_after(module, add_tokens)

    def _hook_before(self, module: nn.Module, react: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(_Hook(self, react), with_kwargs=True))

    def _hook_after(self, module: nn.Module, react: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_hook(_Hook(self, react), with_kwargs=True))

    def _add_image(self, image_features: Tensor, decoder: str = "") -> None:
        if self._capture.differentiated:
            self.clear()
        self._capture.add_image(image_features, decoder)

    def _end_call(self, output: Any) -> None:
        self._capture.watch(output)
        self._capture.end_call()
        if len(self._capture) == _MANY_CALLS and not self._observing:
            warnings.warn(
                f"tap: {_MANY_CALLS} decoder calls are waiting for a loss, and keep their graph in memory; run what "
                "needs no loss under torch.no_grad(), or call clear() on the tap when a step's loss is skipped",
                stacklevel=2,
            )

    def _begin_forward(self, args: Any, kwargs: Any) -> None:
        self._error_before = sys.exc_info()[1]
        if self._capture.differentiated:
            self.clear()
        if len(self._capture) == 0:
            self._batches = []
        if not self._running:
            self._batches.append({**dict(zip(forward_parameters(self.model), args, strict=False)), **kwargs})

    def _end_forward(self, output: Any) -> None:
        self._capture.end_forward()
        # An exception that was there before is being handled by the caller: the model may well return None.
        if output is None and sys.exc_info()[1] is not self._error_before:
            self.clear()

    def _run(self, batch: Any) -> Any:
        if self._capture.differentiated:
            self.clear()
        before = len(self._capture)
        if before == 0:
            self._batches = []
        self._running = True
        try:
            output = self._call(self.model, batch) if self._call else run_model(self.model, batch)
        except BaseException:
            self.clear()
            raise
        finally:
            self._running = False
        if len(self._capture) > before:
            self._batches.append(batch)
        return output

    def _collect(self) -> SAMFeatures:
        if len(self._capture) == 0:
            raise RuntimeError(
                self._explain_nothing(
                    "got a run with nothing collected",
                    "call the decoder in the forward, run it in tap(model, call=...), or name the places of another",
                )
            )
        try:
            image_features, mask_tokens, image_index = self._capture.features()
        finally:
            self.clear()
        if image_features.is_inference() and not torch.is_inference_mode_enabled():
            # Autograd cannot save an inference tensor for backward.
            image_features, mask_tokens = image_features.clone(), mask_tokens.clone()
        return SAMFeatures(image_features, mask_tokens, image_index)

    def _explain_nothing(self, fact: str, way_out: str = "pass a batch or run the model") -> str:
        if self._ran_without_gradient:
            return (
                f"tap: the model must run with gradient to be a student, {fact}: its mask decoder ran without "
                "gradient, as in a forward or predictor decorated with torch.no_grad (Meta's Sam.forward), under "
                "torch.no_grad itself, or under reentrant checkpointing; call the model's parts in a loop of your own "
                "(tap(model, call=...)) and checkpoint with use_reentrant=False"
            )
        hint = ""
        if any(_is_compiled(module) for module in self.model.modules()):
            hint = "; tap a compiled model before its first call, hooks that are set later never run"
        return f"tap: the model must call its mask decoder before the loss, {fact}; {way_out}{hint}"

    def _check_open(self) -> None:
        if not self._handles:
            raise RuntimeError("tap: the tap must be open, got one that was closed; tap the model again")

    def _listens(self, without_gradient: bool) -> bool:
        # A forward inside a backward pass is checkpointing's second run of what was already collected.
        if torch._C._current_graph_task_id() != -1:
            return False
        if self._observing or without_gradient or torch.is_grad_enabled():
            return True
        self._ran_without_gradient = True
        return False


class _Hook:
    """Reacts to a module's call on behalf of a tap, as long as that lives.

    In a pickle or a copy of the model stands a bound method of the standard library that does nothing: the copy
    neither writes into the original's capture nor needs this package to be loaded.
    """

    def __init__(self, tap: Tap, react: Callable[..., None], without_gradient: bool = False) -> None:
        self._tap = weakref.ref(tap)
        self._react = react
        self._without_gradient = without_gradient

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        tap = self._tap()
        if tap is not None and tap._listens(self._without_gradient):
            # Replicas share the hooks, and their threads would mix images and tokens.
            if not self._without_gradient and getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "tap: the model must run in one thread, got a replica made by nn.DataParallel; use one process per "
                    "GPU (DistributedDataParallel), or show the process a single GPU"
                )
            self._react(tap, args, kwargs, *output)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _drop_hooks_of_copied_taps(model: nn.Module) -> None:
    """Remove what stands for the hooks of a tap in a copy of its model; of copies of copies there could be many."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), nullcontext)]:
                del hooks[key]


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _tap_again(model: nn.Module, image_features: Place | None, mask_tokens: Place | None, call: Call | None) -> Tap:
    return Tap(model, image_features=image_features, mask_tokens=mask_tokens, call=call)


def _found_decoders(model: nn.Module) -> list[Decoder]:
    decoders = find_decoders(model)
    if not decoders:
        reason = why_unsupported(model)
        if reason is not None:
            raise ValueError(f"tap: model must have mask tokens, got {type(model).__name__}, {reason}")
        sought = "; ".join(f"a {family.name}: a module with {', '.join(sorted(family.marks))}" for family in FAMILIES)
        children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
        raise ValueError(
            f"tap: model must hold a mask decoder that is known, got {type(model).__name__} with the parts "
            f"{', '.join(children) or 'none'}; looked for {sought}. Name the places of any other model: "
            "tap(model, image_features='path.of.module', mask_tokens='path.of.module')"
        )
    return decoders


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
