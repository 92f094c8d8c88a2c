"""Imports what most examples import, once for all that are forked from this process."""

from __future__ import annotations

import importlib
import os

from benchmarks.torchvision_compat import ensure_importable

os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="agg")
ensure_importable()
for module in ("PIL.Image", "peft", "scipy.ndimage", "transformers.models.sam.modeling_sam"):
    importlib.import_module(module)
