"""What becomes of the relations in training, with and without a term: maps and values early, midway and late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.devices import on_device
from benchmarks.files import whole_file
from benchmarks.sam.data import PIXEL_MEAN, PIXEL_STD
from benchmarks.segmentation.distillers import InfoSAM
from benchmarks.segmentation.models import Batch
from benchmarks.segmentation.training import Run, Step, with_prompt
from renyi_kd.plot import relation_figure

N_IMAGES = 3


def save_relations(runs: Mapping[str, Run], folder: Path, tick: Callable[[], object] = lambda: None) -> list[Path]:
    """Train the runs, each with InfoSAM as its distiller, and write a picture of teacher and of student relations.

    Maps are those of the first test images after a tenth, half and all of the steps.

    Returns:
        The paths of the pictures.

    """
    found: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
    for name, run in runs.items():
        batch = on_device(first_images(run), run.device)
        moments = {max(0, run.n_steps // 10 - 1): "early", run.n_steps // 2: "midway", run.n_steps - 1: "late"}

        def watch(
            step: Step, name: str = name, run: Run = run, batch: Batch = batch, moments: dict[int, str] = moments
        ) -> None:
            if step.index in moments:
                for role, maps in relations_of(run, batch).items():
                    found[role][f"{name}, {moments[step.index]}"] = maps

        run(watch=watch, tick=tick)
    images = ((batch["pixel_values"].cpu() * PIXEL_STD + PIXEL_MEAN) / 255) * batch["inside"].cpu()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for role, maps in found.items():
        paths.append(folder / f"relations_{role}.png")
        with whole_file(paths[-1]) as temporary:
            relation_figure(maps, images).savefig(temporary, dpi=110, format="png")
    return paths


def first_images(run: Run) -> Batch:
    """Return the first test images with the prompts of evaluation."""
    items = [run.test[index] for index in range(min(N_IMAGES, len(run.test)))]
    return with_prompt(default_collate(items), run.settings.prompt)


@torch.no_grad()
def relations_of(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Return the relation maps ``[s, 1, h, w]`` of teacher and student as they are now."""
    if not isinstance(run.distiller, InfoSAM):
        raise TypeError(f"relations_of: the distiller must be InfoSAM, got {type(run.distiller).__name__}")
    seen = {"teacher": run.teacher.observe(batch), "student": run.student.observe(batch)}
    relation = run.distiller.infosam.relation
    return {
        role: relation(one.features.image_features, one.features.mask_tokens[:, :1], one.features.image_index)
        for role, one in seen.items()
    }
