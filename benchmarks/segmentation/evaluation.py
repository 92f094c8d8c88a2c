"""What a model does on images beside the test images of its own row: which images, and the IoU of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from benchmarks.devices import Amp, autocast, on_device
from benchmarks.segmentation.data import MaskDataset
from benchmarks.segmentation.metrics import mean_iou
from benchmarks.segmentation.models import Watched, image_embeddings, takes_embeddings
from benchmarks.segmentation.prompts import with_prompt
from benchmarks.segmentation.settings import Prompt

# Of a run that is over: the state after its last step.
LAST = "last"


class Probe(NamedTuple):
    """Images that a model is tested on, and with which prompts.

    Attributes:
        name: of the folder, and what is done to its images if anything: "kvasir_seg jpeg".
        data: the images.
        prompts: one result each.
        along: whether states along the run are tested too, and not only its end and what is made of that.

    """

    name: str
    data: MaskDataset
    prompts: tuple[Prompt, ...]
    along: bool = True

    def states(self, names: Sequence[str]) -> list[str]:
        """Return those of a run's states in which it is tested on these images."""
        return [name for name in names if self.along or not is_along(name)]

    @property
    def keys(self) -> dict[str, list[str]]:
        """Names of the results, each with those of its images."""
        images = self.data.sample_ids
        return {f"{self.name}/{prompt}": images for prompt in self.prompts}


@torch.no_grad()
def ious(
    model: Watched, tested: Probe, device: torch.device, amp: Amp, tick: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return of every result the IoU per image: the mean over its instances where it has several.

    The encoder runs once per image, whatever the number of prompts and instances, where the decoder takes its output.
    """
    found: dict[str, list[float]] = {name: [] for name in tested.keys}
    for index, item in enumerate(DataLoader(tested.data)):
        batch = on_device(item, device)
        masks = tested.data.original_masks(index)
        with autocast(device, amp):
            if takes_embeddings(model.unwrapped):
                batch = {**batch, "image_embeddings": image_embeddings(model.model, batch["pixel_values"])}
            for (_, values), prompt in zip(found.items(), tested.prompts, strict=True):
                logits = model(with_prompt(batch, prompt))
                model.forget()
                values.append(mean_iou(logits[0].float().cpu(), item["inside"][0, 0], masks))
        tick()
    return found


def lacks(also: dict[str, dict], asked: Sequence[Probe], states: Sequence[str]) -> bool:
    """Return whether results of a finished run lack a test, a state or an image that is asked for."""
    return any(
        name not in also or also[name]["images"] != images or not set(one.states(states)) <= also[name]["iou"].keys()
        for one in asked
        for name, images in one.keys.items()
    )


def kept(also: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """Return results of the same weights, with later ones in the place of earlier ones."""
    merged = dict(also)
    for name, result in new.items():
        before = also.get(name)
        same = before is not None and before["images"] == result["images"]
        merged[name] = {**result, "iou": {**before["iou"], **result["iou"]}} if same else result
    return merged


def is_along(state: str) -> bool:
    """Return whether a state is one along the run, named by its fraction of the steps."""
    return state.replace(".", "").isdigit()
