"""The hooks that one writes first: they keep what two modules last returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from renyi_kd import SAMFeatures


class NaiveTap:
    """The interface of a tap over two forward hooks."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any] | None = None) -> None:
        self.model, self.call = model, call or (lambda model, batch: model(**batch))
        self.images, self.tokens = None, None
        encoder = "vision_encoder" if hasattr(model, "vision_encoder") else "image_encoder"
        model.get_submodule(encoder).register_forward_hook(
            lambda _module, _args, output: setattr(self, "images", output)
        )
        model.get_submodule("mask_decoder.transformer").register_forward_hook(
            lambda _module, _args, output: setattr(self, "tokens", output[0])
        )

    def __call__(self, batch: Any) -> Any:
        return self.call(self.model, batch)

    def take(self) -> SAMFeatures:
        images = self.images if isinstance(self.images, Tensor) else self.images["last_hidden_state"]
        return SAMFeatures(images, self.tokens.flatten(0, -3)[:, 1:5])

    def observe(self, batch: Any) -> SAMFeatures:
        with torch.no_grad():
            self(batch)
        return self.take()


class NaiveArgumentTap(NaiveTap):
    """Reads the decoder's ``image_embeddings`` where positional arguments are."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any] | None = None) -> None:
        super().__init__(model, call)
        model.mask_decoder.register_forward_pre_hook(lambda _module, args: setattr(self, "images", args[0]))
