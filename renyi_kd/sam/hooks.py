"""Hooks that tell a recording what a model does; the model is not edited."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from renyi_kd.sam.inputs import argument_names, seen
from renyi_kd.sam.memory import is_fake, leaves
from renyi_kd.sam.module_paths import Place, modules_at, plain, taken
from renyi_kd.sam.parts import Decoder, image_encoder_of, prompt_encoder_of
from renyi_kd.sam.reads import is_view_of
from renyi_kd.sam.recording import Recording

# Of the tap, the module, its args, its kwargs and its output.
React = Callable[[Any, nn.Module, Any, Any, Any], None]

# Whose hooks alone react: while a teacher is run, a module that it shares with the student is not the student's.
_only: ContextVar[object | None] = ContextVar("renyi_kd_only", default=None)


class Listener(Protocol):
    """What hooks report to."""

    ran_as_replicas: bool

    @property
    def _recording(self) -> Recording:
        """What the thread that is running has left behind."""


class Hooks:
    """The hooks of a tap in its model.

    Attributes:
        image_encoder: the module whose inputs are taken as images, or None.
        prompt_encoder: likewise, as prompts.
        decoders: the mask decoders that were found; empty where places were named.

    """

    def __init__(self, listener: Listener) -> None:
        # Weak: a tap that nobody holds takes its hooks along at once.
        self._listener = weakref.ref(listener)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._token_modules: list[list[nn.Module]] = []
        self.image_encoder: nn.Module | None = None
        self.prompt_encoder: nn.Module | None = None
        self.decoders: list[Decoder] = []
        weakref.finalize(self, _remove, self._handles)

    def __bool__(self) -> bool:
        return bool(self._handles)

    def remove(self) -> None:
        """Take all hooks out of the model."""
        _remove(self._handles)

    def before(self, module: nn.Module, react: React) -> None:
        """Let the recording react before each call of a module."""
        self._handles.append(module.register_forward_pre_hook(_Hook(self._listener, react), with_kwargs=True))

    def after(self, module: nn.Module, react: React, *, always: bool = False) -> None:
        """Let the recording react after each call of a module; ``always``: also where it raised."""
        hook = _Hook(self._listener, react)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always))

    def attach_to_decoders(self, model: nn.Module, decoders: list[Decoder]) -> None:
        """Read mask decoders, and what reaches the encoders beside them."""
        self.decoders = decoders
        self._token_modules = [decoder.token_modules for decoder in decoders]
        self._attach_to_prompt_encoder(prompt_encoder_of(model, decoders[0].name))
        self._attach_to_image_encoder(image_encoder_of(model, decoders[0].name))
        for decoder in decoders:
            self._attach_to_decoder(decoder, reads_prompts=self.prompt_encoder is None)

    def attach_to_places(self, model: nn.Module, image_features: Place, mask_tokens: Place) -> None:
        """Read what the user named."""

        def add_image(tap: Listener, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            features = taken("image_features", image_features, output)
            tap._recording.begin_place(features, _source(features, output))

        def add_tokens(tap: Listener, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            tokens = taken("mask_tokens", mask_tokens, output)
            source = _source(tokens, output)
            tokens = tokens[:, None] if tokens.ndim == 2 else tokens
            for number, token in enumerate(tokens.unbind(-2)):
                tap._recording.add_tokens(number, token, source=source)
            # What the function took is a tensor of its own; backward runs through the module's.
            tap._recording.end_place(output)

        for module in modules_at(model, "image_features", image_features):
            self.after(module, add_image)
            self._attach_to_image_encoder(module)
        for module in modules_at(model, "mask_tokens", mask_tokens):
            self.after(module, add_tokens)
        path = mask_tokens if isinstance(mask_tokens, str) else mask_tokens[0]
        self._attach_to_prompt_encoder(prompt_encoder_of(model, path))

    def hypernetworks_changed(self) -> bool:
        """Return whether a decoder has other hypernetworks than when it was tapped."""
        now = [decoder.token_modules for decoder in self.decoders]
        return any(len(a) != len(b) or any(map(_is_other, a, b)) for a, b in zip(self._token_modules, now, strict=True))

    def _attach_to_prompt_encoder(self, encoder: nn.Module | None) -> None:
        self.prompt_encoder = encoder
        if encoder is not None:
            names = argument_names(encoder)
            self.before(encoder, lambda tap, _module, *call: tap._recording.begin_prompts(seen(names, *call[:2])))
            self.after(encoder, lambda tap, *_call: tap._recording.end_prompts())

    def _attach_to_image_encoder(self, encoder: nn.Module | None) -> None:
        if encoder is None:
            return
        self.image_encoder = encoder
        names = argument_names(encoder)
        self.before(encoder, lambda tap, _module, *call: tap._recording.begin_images(seen(names, *call[:2])))

        def end(tap: Listener, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            tap._recording.end_images(output)
            if (
                tap._recording.observing
                or not torch.is_grad_enabled()
                or any(_requires_grad(leaf) for leaf in leaves(output))
            ):
                return
            tap._recording.encoder_lost_gradient |= any(parameter.requires_grad for parameter in module.parameters())

        self.after(encoder, end)

    def _attach_to_decoder(self, decoder: Decoder, *, reads_prompts: bool) -> None:
        family, names = decoder.family, argument_names(decoder.module)

        def begin(tap: Listener, _module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            arguments = seen(names, args, kwargs)
            image = arguments.arguments.get(family.image_argument)
            if image is None and len(args) > family.image_position:
                image = args[family.image_position]
            # Where the argument is missing the model's own error follows.
            if not isinstance(image, Tensor):
                return
            prompts = {
                name: value for name, value in arguments.arguments.items() if "sparse" in name or "prompt" in name
            }
            if reads_prompts:
                own = {name: value for name, value in prompts.items() if "dense" not in name}
                tap._recording.begin_prompts(seen((), (), own))
                tap._recording.end_prompts()
            shapes = (value.shape for name, value in prompts.items() if "sparse" in name and isinstance(value, Tensor))
            layout = next(((shape[0], shape[1]) for shape in shapes if len(shape) == 4), None)
            tap._recording.begin_call(image, plain(decoder.name), layout)

        self.before(decoder.module, begin)
        for number, module in enumerate(decoder.token_modules):

            def add(
                tap: Listener, _module: nn.Module, args: Any, _kwargs: Any, _output: Any, number: int = number
            ) -> None:
                for each, tokens in decoder.mask_tokens(number, args[0]):
                    tap._recording.add_tokens(each, tokens, decoder.n_tokens, args[0])
                tap._recording.watch(args[0])

            self.before(module, add)

        def end(tap: Listener, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            tap._recording.watch(output)
            tap._recording.end_call()

        self.after(decoder.module, end)


class _Hook:
    """Reacts to a module's call on behalf of a tap, as long as that lives.

    In a pickle or a copy of the model stands a bound method of the standard library that does nothing: the copy
    neither writes into the original's recording nor needs this package to be loaded.
    """

    def __init__(self, listener: weakref.ref[Listener], react: React) -> None:
        self._listener = listener
        self._react = react

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if torch.compiler.is_compiling():
            _respond_uncompiled(self, module, args, kwargs, *output)
        else:
            self._respond(module, args, kwargs, *output)

    def _respond(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        listener, only = self._listener(), _only.get()
        if listener is None or (only is not None and only is not listener):
            return
        # A forward inside a backward pass is checkpointing's second run of what was already collected.
        if torch._C._current_graph_task_id() != -1 or any(map(is_fake, (*args, *kwargs.values()))):
            return
        # Replicas share the hooks, and their threads would mix images and tokens.
        if getattr(module, "_is_replica", False):
            listener.ran_as_replicas |= torch.is_grad_enabled()
            return
        self._react(listener, module, args, kwargs, output[0] if output else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _respond_uncompiled(hook: _Hook, *call: Any) -> None:
    """Let a hook react in a compiled model: neither it nor anything in it can be traced."""
    torch.compiler.disable(hook._respond)(*call)  # type: ignore[no-untyped-call]


# What torch.compiler.disable sets, which here would import the compiler. The reason is what fullgraph=True says.
_respond_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
_respond_uncompiled._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "tap: a model with a tap must be compiled without fullgraph=True, as hooks cannot be traced; leave it out, or "
    "compile the parts that have no hooks, such as the layers of the image encoder"
)


@contextmanager
def listening_alone(listener: object) -> Iterator[None]:
    """Let no hooks but those of one tap react."""
    token = _only.set(listener)
    try:
        yield
    finally:
        _only.reset(token)


def drop_hooks_of_copied_taps(model: nn.Module) -> None:
    """Remove what stands for the hooks of a tap in a copy of its model; of copies of copies there could be many."""
    for module in model.modules():
        for hooks, settings in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), nullcontext)]:
                del hooks[key]
                # In another process a new hook may have the number, and is not called as those were.
                for setting in settings:
                    setting.pop(key, None)


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _source(value: Tensor, output: Any) -> Tensor:
    """Return the tensor of a module's output that a value is or is a view of, or else any: it was computed from it."""
    known = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
    return next((leaf for leaf in known if is_view_of(value, leaf)), [*known, value][0])


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_other(a: nn.Module, b: nn.Module) -> bool:
    return a is not b
