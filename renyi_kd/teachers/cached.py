"""A frozen teacher whose image encoder runs once per image, its features kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.memory import version
from renyi_kd.sam.parts import encoder_of
from renyi_kd.sam.step import Step
from renyi_kd.sam.tap import Tap
from renyi_kd.sam.threads import observing
from renyi_kd.teachers.adapters import adapter_state
from renyi_kd.teachers.encoder_cache import (
    EncoderCache,
    Entry,
    fingerprint,
    image_part,
    probe,
    show_other_images,
    some_numbers,
)


class CachedTeacher:
    """A frozen teacher whose image encoder runs once per image; afterwards its features come from disk.

    While the model runs, its encoder answers from the cache; the rest runs as ever, with this step's prompts. What the
    encoder returns is kept per image, in ``dtype``, and used in that precision from the first time on.

    Args:
        teacher: the tap of the frozen model.
        folder: where the features lie, one file per image; several processes may share it. A relative path is of the
            directory at this moment, and ``~`` the user's home.
        sample_ids: the name under which a batch, or every dict of a list, holds one id per image. Or a function from
            the batch to the ids. An id stands for an image with its augmentations. What is flipped, cropped, blurred
            or given noise at random needs an id for each of its forms.
        preprocessing: anything that distinguishes how images are prepared, beside their size.
        encoder: the path of the image encoder; None for the first ``image_encoder`` or ``vision_encoder``.
        dtype: of the cached features, fp16 or bf16.
        check_pixels: whether a thumbnail of every image is compared with that of the cached one. It tells other images,
            flips, crops and colours, but hardly noise or blur. On a GPU this waits for the device.

    Raises:
        TypeError: ``teacher`` is not a tap, or ``dtype`` is neither fp16 nor bf16.
        ValueError: no encoder is found.
        OSError: the folder cannot be made.

    Cost: 2 bytes per number of all that the encoder returns. At 1024 pixels that is 2 MiB for an image of a SAM 1, 26
    for SAM-HQ, and 86 for a SAM 2, whose encoder returns more levels and their position encodings. A read and a copy to
    the device of that, and the decoder, per step. Its checksum takes about one second per GiB on one core. A start
    lists the folder. One image that is not cached yet runs the encoder on its whole batch.

    """

    def __init__(
        self,
        teacher: Tap,
        folder: str | Path,
        *,
        sample_ids: str | Callable[[Any], Sequence[str | int]] = "sample_id",
        preprocessing: str = "",
        encoder: str | None = None,
        dtype: torch.dtype = torch.float16,
        check_pixels: bool = True,
    ) -> None:
        if not isinstance(teacher, Tap):
            raise TypeError(
                f"CachedTeacher: teacher must be the tap of a frozen model, got {type(teacher).__name__}; "
                "attach first: tap(model)"
            )
        self.teacher = teacher
        self._encoder = encoder_of(teacher.model, encoder)
        self._sample_ids = sample_ids
        self._check_pixels = check_pixels
        place = Path(folder)
        # A "~name" of no user is a name like any other.
        with suppress(RuntimeError):
            place = place.expanduser()
        # Hydra and others go to another directory later.
        self._cache = EncoderCache(place.absolute(), preprocessing=preprocessing, dtype=dtype)
        self._weights = ""
        self._known: tuple[Any, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self.teacher.model

    def observe(self, step: Any) -> SAMFeatures:
        """Return the features of a step; the encoder runs where an image of its call is not cached yet.

        Args:
            step: the :class:`Step`, whose given batch holds the ids; or the batch itself.

        Raises:
            ValueError: the batch does not hold one id per image; or the cache is of other weights, another
                preprocessing, image size or image, or holds a file that is not the cache's.
            TypeError: the encoder returns complex tensors, or a structure that cannot be written, as a named tuple.
            OSError: a file cannot be read, or not be written, as on a full disk. What is cached stays.

        Warns:
            UserWarning: a file is damaged, or of an earlier version without a checksum; it is written again.

        """
        step = step if isinstance(step, Step) else Step(step)
        ids = [sample for batch in _batches_of(step) for sample in self._ids_of(batch)]
        weights = self._fingerprint()
        fresh: dict[str, tuple[tuple[int, ...], Entry]] = {}
        n_images = 0

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_images
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if len(tensors) != 1:
                raise ValueError(
                    f"CachedTeacher: the encoder must be called with one tensor, its images, got {len(tensors)}; "
                    "use the tap itself as teacher, or name a module that takes the images alone: encoder='path'"
                )
            (images,) = tensors
            samples = ids[n_images : n_images + len(images)]
            n_images += len(images)
            if len(samples) < len(images):
                # The features are thrown away: the numbers are compared below.
                return encode(*args, **kwargs)
            return self._answer(samples, weights, images, lambda: encode(*args, **kwargs), fresh)

        # Python and files, which torch.compile cannot trace.
        disabled = torch.compiler.disable(answer)  # type: ignore[no-untyped-call]
        # The encoder's own forward is found behind the lock: before it, that may be the answer of another thread.
        with observing(self.model), _forward_replaced(self._encoder, disabled) as encode:
            features = self.teacher.observe(step)
            if n_images != len(ids):
                raise ValueError(
                    "CachedTeacher: batches must hold one sample id per image that the encoder sees, got "
                    f"{len(ids)} ids and {n_images} images; give the ids in the order of the images, and images, not "
                    "their embeddings"
                )
        # Not before: a batch whose ids do not fit would leave images under other names.
        for sample, (size, entry) in fresh.items():
            self._cache.write(sample, weights, size, entry)
        return features

    def _answer(
        self,
        samples: list[str],
        weights: str,
        images: Tensor,
        encode: Callable[[], Any],
        fresh: dict[str, tuple[tuple[int, ...], Entry]],
    ) -> Any:
        """Return what the encoder would, from the cache or by running it; what is new goes into ``fresh``."""
        size = tuple(images.shape[1:])
        entries: dict[str, Entry] = {}
        for sample in samples:
            known = fresh[sample][1] if sample in fresh else self._cache.read(sample, weights, size)
            if known is not None:
                entries[sample] = known
        missing = [sample for sample in samples if sample not in entries]
        probes = probe(images) if missing or self._check_pixels else images.new_empty(0)
        if missing:
            leaves, structure = tree_flatten(encode())
            for row, sample in enumerate(samples):
                if sample not in entries:
                    parts = [image_part(leaf, row, len(images)) for leaf in leaves]
                    entries[sample] = self._cache.entry(sample, parts, structure, probes[row])
                    fresh[sample] = size, entries[sample]
        found = [entries[sample] for sample in samples]
        if self._check_pixels:
            for sample, entry, seen in zip(samples, found, probes, strict=True):
                if show_other_images(entry.probe, seen):
                    raise ValueError(
                        f"CachedTeacher: sample {sample!r} must be the image that was cached under this id, got other "
                        "pixels; make random augmentations part of the id, apply them after the features are known, or "
                        "do without a cache"
                    )
        dtype = next((parameter.dtype for parameter in self._encoder.parameters()), torch.float32)
        values = []
        # Autocast cannot stack fp16 on a CPU.
        with torch.autocast("cpu", enabled=False):
            for leaf in zip(*(entry.leaves for entry in found), strict=True):
                value = torch.stack(leaf).to(images.device)
                values.append(value.to(dtype) if value.is_floating_point() else value)
        return tree_unflatten(values, found[0].structure)

    def _ids_of(self, batch: Any) -> list[str]:
        name = self._sample_ids
        ids: Any = None
        if callable(name):
            ids = name(batch)
        elif isinstance(batch, Mapping):
            ids = batch.get(name)
        elif isinstance(batch, tuple | list) and batch and all(isinstance(item, Mapping) for item in batch):
            ids = [item[name] for item in batch if name in item]
        # Tensors and arrays, whole or one number each.
        each = [] if ids is None else [ids] if isinstance(ids, str | int) else ids
        samples = [item for sample in each for item in _listed(sample)]
        if not samples or not all(isinstance(sample, str | int) for sample in samples):
            what = f"{name!r} of the batch" if isinstance(name, str) else "sample_ids(batch)"
            raise ValueError(
                f"CachedTeacher: {what} must be one id (a string or an integer) per image, got {ids!r}; add the ids to "
                "the batch that the loss is given (transformers' Trainer drops them unless "
                "remove_unused_columns=False), or pass sample_ids=lambda batch: [...]"
            )
        return [str(sample) for sample in samples]

    def _fingerprint(self) -> str:
        # Digesting the weights takes a second or so. Whether they were changed since is known from their versions and,
        # where somebody writes past autograd (through .data, as in an EMA), from some numbers of each.
        tensors = [*self._encoder.parameters(), *self._encoder.buffers()]
        adapters = adapter_state(self._encoder)
        known = (
            adapters,
            [(id(tensor), tensor.dtype, tensor.data_ptr(), version(tensor)) for tensor in tensors],
            some_numbers(tensors),
        )
        if known != self._known:
            self._weights, self._known = fingerprint(self._encoder, adapters), known
        return self._weights


def _batches_of(step: Step) -> list[Any]:
    """Return what may hold the ids of a step: the given batch, or what each call was of."""
    if step.given is not None:
        return [step.given]
    return [call.kwargs if call.batch is None else call.batch.value for call in step.ran]


def _listed(value: Any) -> list[Any]:
    values = value.tolist() if hasattr(value, "tolist") else value
    return values if isinstance(values, list) else [values]


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let the module answer with another function, by an attribute that hides the class's; yield what did so before."""
    had, before = module.__dict__.get("forward"), module.forward
    module.forward = forward
    try:
        yield before
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had
