"""A SAM in the comparison: run it, and keep what the distillers ask of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.sam.models import Sam
from benchmarks.segmentation.observation import Observation
from renyi_kd import CachedTeacher, SAMFeatures, Tap, tap
from renyi_kd.teachers.cached import encoder_of

Batch = dict[str, Any]
# SemCKD and ReviewKD take as many stages as the pyramids that they were written for.
N_STAGES = 4


class Watched:
    """A SAM under a tap, of which the mask logits and, if asked, maps of the encoder's stages are kept as well.

    ``watched(batch)`` runs the model; ``take()`` is what it computed, for the student, and ``observe(batch)`` runs it
    as a teacher does: without gradient. With a ``cache`` the encoder of a teacher runs once per image. ``unwrapped`` is
    the pre-trained model, whatever a PEFT method has put around it.
    """

    def __init__(self, model: nn.Module, sam: Sam, *, with_layers: bool = False, cache: Path | None = None) -> None:
        self.model, self.unwrapped = model, sam.model
        self._segment = sam.segment
        self._logits: Tensor | None = None
        self._layers: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._hooks = [stage.register_forward_hook(self._keep) for stage in stages(model)] if with_layers else []
        self.tap: Tap = tap(model, call=self._run)
        # The cache stands in for the encoder, so its stages would not be seen.
        self._teacher = self.tap if cache is None or with_layers else CachedTeacher(self.tap, cache)

    def __call__(self, batch: Batch) -> Tensor:
        """Return mask logits ``[b, p, S, S]``."""
        self._layers.clear()
        self._outputs.clear()
        return self.tap(batch)

    def take(self) -> Observation:
        """Return what the last call computed, attached to its graph."""
        return self._observation(self.tap.take())

    def observe(self, batch: Batch) -> Observation:
        """Return what the model computes for a batch, without gradient."""
        self._layers.clear()
        self._outputs.clear()
        return self._observation(self._teacher.observe(batch))

    def forget(self) -> None:
        """Drop what the last call computed."""
        self.tap.clear()
        self._layers.clear()
        self._outputs.clear()
        self._logits = None

    def close(self) -> None:
        """Take all hooks off the model."""
        self.tap.close()
        for hook in self._hooks:
            hook.remove()

    def _run(self, model: nn.Module, batch: Batch) -> Tensor:
        self._logits = self._segment(model, batch)
        return self._logits

    def _observation(self, features: SAMFeatures) -> Observation:
        observation = Observation(features, self._logits, tuple(self._layers), tuple(self._outputs))
        self.forget()
        return observation

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._outputs.append(output[0] if isinstance(output, tuple) else output)
        # While the model runs: made later, gradients would add up in another order, and runs differ in the last bits.
        self._layers.append(as_map(self._outputs[-1]))


def stages(model: nn.Module) -> list[nn.Module]:
    """Return the modules after each quarter of the image encoder: blocks of a ViT, or the stages of a TinyViT.

    Raises:
        ValueError: the encoder has no list of layers or blocks that is known.

    """
    encoder = encoder_of(model, None)
    backbone = getattr(encoder, "backbone", encoder)
    blocks = list(getattr(backbone, "layers", None) or getattr(backbone, "blocks", None) or [])
    if not blocks:
        raise ValueError(
            f"stages: the encoder must have layers or blocks, got {type(encoder).__name__}; take a distiller without "
            "layers of the encoder"
        )
    return [blocks[round(len(blocks) * (i + 1) / N_STAGES) - 1] for i in range(min(N_STAGES, len(blocks)))]


def as_map(output: Tensor) -> Tensor:
    """Return the output of a stage as ``[b, c, h, w]``: from that itself, ``[b, h, w, c]`` or ``[b, h * w, c]``.

    A map is told from a map with channels last by its square sides.
    """
    if output.ndim == 3:
        side = int(output.shape[1] ** 0.5)
        return output.mT.unflatten(2, (side, side))
    return output if output.shape[2] == output.shape[3] else output.permute(0, 3, 1, 2)


def encoder_is_frozen(model: nn.Module) -> bool:
    """Return whether nothing of the image encoder is trained."""
    return not any(parameter.requires_grad for parameter in encoder_of(model, None).parameters())


def takes_embeddings(model: nn.Module) -> bool:
    """Return whether the decoder of the model wants the encoder's last map alone, as that of the first SAM does."""
    return type(model).__name__ in ("Sam", "SamModel")


def image_embeddings(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return what the image encoder makes of ``[b, 3, S, S]``, for a decoder that takes it."""
    output = encoder_of(model, None)(pixel_values)
    return output if isinstance(output, Tensor) else output[0]
