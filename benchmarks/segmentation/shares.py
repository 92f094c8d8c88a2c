"""How large the gradient of InfoSAM is beside the task's in training, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas

from benchmarks import measure
from benchmarks.segmentation.distillers import InfoSAM
from benchmarks.segmentation.training import Run, Step


def save_shares(run: Run, path: Path, tick: Callable[[], object] = lambda: None) -> None:
    """Train a run with a form of InfoSAM, and append a row a step to a CSV file.

    Raises:
        TypeError: the run has another distiller.

    """
    if not isinstance(run.distiller, InfoSAM):
        raise TypeError(f"save_shares: the distiller must be a form of InfoSAM, got {run.settings.distiller}")
    columns = ("model", "data", "peft", "distiller", "seed", "image_size")
    named = {name: getattr(run.settings, name) for name in columns}
    rows: list[dict[str, Any]] = []

    def watch(step: Step) -> None:
        rows.append({**named, "step": step.index + 1, "of": step.of, **run.distiller.state()})

    run(watch=watch, tick=tick)
    environment = measure.environment(run.device.type)
    measure.append_rows(path, [{**row, **environment} for row in rows])


def shares_table(rows: pandas.DataFrame, steps: tuple[int, ...] = (1, 20, 100)) -> pandas.DataFrame:
    """Return the shares at image features / mask tokens by data set and distiller, at some steps and in the mean."""
    rows = rows.astype({"step": int, "image_features_share": float, "mask_tokens_share": float})
    keys = ["data", "distiller"]
    newest = rows.groupby([*keys, "step"], sort=False).last().reset_index("step")
    cells = {f"step {step}": newest[newest["step"] == step].groupby(keys, sort=False).last() for step in steps}
    late = newest[newest["step"] > steps[-2]]
    cells[f"mean of {steps[-2] + 1} to {int(late['step'].max())}"] = late.groupby(keys, sort=False)[
        ["image_features_share", "mask_tokens_share"]
    ].mean()
    return pandas.DataFrame(
        {
            title: found["image_features_share"].map("{:.3g}".format)
            + " / "
            + found["mask_tokens_share"].map("{:.3g}".format)
            for title, found in cells.items()
        }
    )
