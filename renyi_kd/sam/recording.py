"""What one step left behind: the calls of the model and of its parts, until the loss takes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from renyi_kd.sam.decoder_call import DecoderCall, are_one, hold
from renyi_kd.sam.inputs import Inputs, Seen
from renyi_kd.sam.memory import leaves, memory_of, snapshot, storage_of
from renyi_kd.sam.step import Call

# Encoder calls that no decoder call has followed: embeddings that are computed for later use. Each keeps its images.
_MOST_WAITING = 32
# Seven clicks on each of eight frames are 64 calls; far more than that is a forgotten loss, and holds its graph.
_MANY_CALLS = 256


@dataclass
class _Encoded:
    """A call of the image encoder that ended.

    Attributes:
        images: what reached it.
        maps: the memory of what it returned.
        in_run: whether that was in the run that is under way.
        decoded: whether a validation has decoded it.

    """

    images: Seen
    maps: set[StorageWeakRef]
    in_run: bool
    decoded: bool = False

    def forgotten(self) -> bool:
        """Return whether a validation has used it up."""
        return self.decoded and all(memory.expired() for memory in self.maps)  # type: ignore[no-untyped-call]


class _UnderWay(NamedTuple):
    """A run that has begun, and what there was before it."""

    call: Call
    with_gradient: bool
    n_calls: int
    n_runs: int
    n_encoded: int
    encoded_before: bool


class _Backward:
    """Whether a backward pass has run through a step; apart, so that the graph's hooks do not hold the tensors."""

    seen = False

    def note(self, _gradient: Tensor) -> None:
        self.seen = True


class Recording:
    """Collects a step: what reaches the encoders, the decoder's calls with their tokens, the calls of the whole model.

    Which calls count is one rule: those with gradient. Those without, inside a run of the model with gradient, are kept
    as calls that do not count, so that the teacher's can be told apart in the same way; others leave nothing. A call
    that did not end, because an exception left it, does not count.

    Args:
        observing: whether everything counts, as in a run without gradient that is made for the features.

    """

    def __init__(self, observing: bool = False) -> None:
        self.observing = observing
        # The runs that are under way, from the outermost.
        self._under_way: list[_UnderWay] = []
        self._restart()

    def _restart(self) -> None:
        self.calls: list[DecoderCall] = []
        self.runs: list[Call] = []
        # What happened that keeps a step from having features.
        self.ran_without_gradient = False
        self.ran_past_its_call = False
        self.ran_beside_a_teacher = False
        self.encoder_lost_gradient = False
        self.ran_without_decoder = False
        self._encoded: list[_Encoded] = []
        self._n_encoded = 0
        # The memory of image features whose images are known.
        self._maps_of_calls: set[StorageWeakRef] = set()
        self._lost_images = False
        self._prompts: list[Seen] = []
        # What reached an encoder whose call has not ended.
        self._images_begun: Seen | None = None
        self._prompts_begun: Seen | None = None
        self._open: DecoderCall | None = None
        self._backward = _Backward()

    def __len__(self) -> int:
        return sum(call.with_gradient for call in self.calls)

    @property
    def differentiated(self) -> bool:
        """Whether backward has run through the calls."""
        return self._backward.seen

    @property
    def runs_with_gradient(self) -> bool:
        """Whether a run is under way that counts."""
        return any(each.with_gradient for each in self._under_way)

    def begin_run(self, batch: Any) -> None:
        """Begin a run of the model, or of a function that runs it, on a batch."""
        self._begin(Call(batch=snapshot(batch)))

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
        """Begin a call of the whole model, by the loop or within a run; ``names`` are those that args may have."""
        around = self._under_way[-1].call.batch if self._under_way else None
        self._begin(Call(around, snapshot((args, kwargs)), names))

    def end_run(self) -> None:
        """End a run or a call; later tokens belong to no image features that were last seen in it."""
        self._open = None
        if not self._under_way:
            return
        ended = self._under_way.pop()
        new = [call for call in self.calls[ended.n_calls :] if call.with_gradient]
        if not self._with_gradient() or len(self.runs) > ended.n_runs:
            return
        if not new:
            self.ran_without_decoder = True
            return
        encoded = self._n_encoded > ended.n_encoded
        given = not encoded and (
            ended.encoded_before or any(call.images or call.image.value.requires_grad for call in new)
        )
        own_embeddings = given and ended.call.arguments is not None
        self.runs.append(ended.call._replace(own_embeddings=own_embeddings, encoded=encoded))

    def begin_images(self, images: Seen) -> None:
        """Note what reaches the image encoder; not in a validation."""
        self._drop_differentiated()
        self._images_begun = None if self._in_validation() else images

    def end_images(self, output: Any) -> None:
        """Note what the image encoder returned: a call that an exception left is none."""
        if self._images_begun is None:
            return
        maps = {memory for leaf in leaves(output) if (memory := memory_of(leaf)) is not None}
        kept = [each for each in self._encoded if not each.forgotten()]
        self._lost_images |= len(kept) >= _MOST_WAITING
        self._encoded = [*kept[1 - _MOST_WAITING :], _Encoded(self._images_begun, maps, bool(self._under_way))]
        self._n_encoded += 1
        self._images_begun = None

    def begin_prompts(self, prompts: Seen) -> None:
        """Note what reaches the prompt encoder; not in a validation."""
        self._drop_differentiated()
        self._prompts_begun = None if self._in_validation() else prompts

    def end_prompts(self) -> None:
        """Note that the prompt encoder's call has ended."""
        if self._prompts_begun is not None:
            self._prompts = [*self._prompts[1 - _MOST_WAITING :], self._prompts_begun]
            self._prompts_begun = None

    def begin_call(self, image_features: Tensor, decoder: str = "", layout: tuple[int, int] | None = None) -> None:
        """Begin a call of a decoder on these image features."""
        self._drop_differentiated()
        with_gradient = self._with_gradient()
        if not with_gradient:
            self.ran_without_gradient = True
        if not with_gradient and not (self._under_way and self._under_way[0].with_gradient):
            # A validation that calls the model's parts. Its maps may be decoded again with gradient.
            for each in self._encoded_for(image_features):
                each.decoded = True
            self._prompts, self._open = [], None
            return
        self._open_call(image_features, with_gradient, decoder, layout)

    def begin_place(self, image_features: Tensor, source: Tensor | None = None) -> None:
        """Begin a call whose image features the user named; whether it has gradient is for its tokens to say."""
        self._drop_differentiated()
        if not self._in_validation():
            self._open_call(image_features, True, source=source)

    def add_tokens(
        self, number: int | None, tokens: Tensor, n_tokens: int | None = None, source: Tensor | None = None
    ) -> None:
        """Add mask token ``number``, or the next of ``n_tokens``, of the open call: ``[..., d]``, a row a sample.

        ``source`` is the tensor of the model that they were taken from.
        """
        if self._open is None:
            self.ran_past_its_call |= not self._in_validation() and self._with_gradient()
            return
        groups = self._open.groups
        if not groups or (number is None and n_tokens is not None and len(groups[-1]) >= n_tokens):
            groups.append({})
        number = len(groups[-1]) if number is None else number
        held = hold(tokens, source)
        if number in groups[-1]:
            if are_one(groups[-1][number], held):
                return
            groups.append({})
        groups[-1][number] = held

    def watch(self, value: Any) -> None:
        """Note when backward runs through a tensor of the model, alone or in a module's output."""
        if isinstance(value, Tensor):
            if value.requires_grad:
                value.register_hook(self._backward.note)  # type: ignore[no-untyped-call]
        elif isinstance(value, Mapping):
            self.watch(tuple(value.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                self.watch(item)

    def end_call(self) -> None:
        """Count the open call, which has all its tokens; more may follow for the same image features.

        A call whose tokens no hook has seen, as in a part of the model that was compiled before, does not count.
        """
        call = self._open
        if call is None or not call.groups:
            return
        encoded = self._encoded_for(call.image.value)
        call.images = [each.images for each in encoded]
        self._encoded = [each for each in self._encoded if all(each is not other for other in encoded)]
        self._maps_of_calls.update(*(each.maps for each in encoded))
        self.calls.append(call)
        if len(self.calls) == _MANY_CALLS and not self.observing:
            warnings.warn(
                f"tap: {_MANY_CALLS} decoder calls are waiting for a loss, and keep their graph in memory; run what "
                "needs no loss under torch.no_grad(), or call clear() on the tap when a step's loss is skipped",
                stacklevel=2,
            )
        self._open = DecoderCall(call.decoder, call.image, call.with_gradient, call.layout)

    def end_place(self, output: Any) -> None:
        """End a call whose image features and tokens the user named; without gradient it counts as a validation."""
        if self._open is not None and not self._with_gradient():
            self.ran_without_gradient = True
            self._open.with_gradient = False
            if not self._under_way:
                self._open = None
        if self._open is not None:
            # The image features that opened the call may come before the prompts.
            self._open.prompts = [*self._open.prompts, *self._prompts]
            self._prompts = []
        self.watch(output)
        self.end_call()

    def inputs(self) -> Inputs:
        """Return what reached the encoders for the calls that count."""
        counted = [call for call in self.calls if call.with_gradient]
        images: list[Seen] = []
        earlier: list[Seen] = []
        for call in self.calls:
            # Of a pass that does not count, only what the next one decodes again.
            earlier = call.images or earlier
            if call.with_gradient:
                images += earlier
                earlier = []
        return Inputs(
            () if self._lost_images else tuple(images),
            tuple(each for call in counted for each in call.prompts),
            frozenset(storage for call in counted if (storage := storage_of(call.image.value)) is not None),
            tuple(call.with_gradient for call in self.calls),
            tuple(each for call in self.calls for each in call.prompts),
        )

    def leave_out(self, with_gradient: Sequence[bool]) -> None:
        """Let only those calls count whose counterparts do; ``with_gradient`` says of each whether it does.

        Raises:
            RuntimeError: there are not as many calls.

        """
        if all(with_gradient):
            return
        if len(self.calls) == len(with_gradient):
            for call, counts in zip(self.calls, with_gradient, strict=True):
                call.with_gradient = counts
        elif len(self.calls) != sum(with_gradient):
            raise RuntimeError(
                f"tap: the teacher must call its decoder as often as the student, got {len(self.calls)} calls where "
                f"the student made {sum(with_gradient)} with gradient and {with_gradient.count(False)} without; run "
                "both by the same function: tap(model, call=...)"
            )

    def _open_call(
        self,
        image_features: Tensor,
        with_gradient: bool,
        decoder: str = "",
        layout: tuple[int, int] | None = None,
        source: Tensor | None = None,
    ) -> None:
        image = hold(image_features, source)
        known = next((call.image for call in self.calls if are_one(call.image, image)), image)
        self._open = DecoderCall(decoder, known, with_gradient, layout, prompts=self._prompts)
        self._prompts = []

    def _encoded_for(self, image_features: Tensor) -> list[_Encoded]:
        """Return the calls of the image encoder that made these features, or may have: those of the run, or any."""
        memory = memory_of(image_features)
        made = [each for each in self._encoded if memory in each.maps]
        if made or memory in self._maps_of_calls:
            return made
        if self._under_way and self._n_encoded > self._under_way[0].n_encoded:
            return [each for each in self._encoded if each.in_run]
        return [each for each in self._encoded if not each.decoded]

    def _with_gradient(self) -> bool:
        return self.observing or torch.is_grad_enabled()

    def _in_validation(self) -> bool:
        return bool(self._under_way) and not self._under_way[0].with_gradient

    def _begin(self, call: Call) -> None:
        self._drop_differentiated()
        if not self._under_way:
            for each in self._encoded:
                each.in_run = False
        encoded_before = any(not each.decoded for each in self._encoded)
        before = _UnderWay(
            call, self._with_gradient(), len(self.calls), len(self.runs), self._n_encoded, encoded_before
        )
        self._under_way.append(before)

    def _drop_differentiated(self) -> None:
        """Forget calls that a backward pass has used already."""
        if self.differentiated:
            self._restart()
            self._under_way = [each._replace(n_calls=0, n_runs=0, n_encoded=0) for each in self._under_way]
