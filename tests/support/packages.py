"""The packages of SAM families, most of which are installed only where all of them are."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from typing import Any

import pytest

EVERYTHING = os.environ.get("RENYI_KD_ALL_FAMILIES") == "1"


def need(module: str, distribution: str, install: str) -> str:
    """Return distribution and version, or skip."""
    missing = [name for name in (module, *_more_modules(install)) if importlib.util.find_spec(name) is None]
    if missing:
        assert not EVERYTHING, f"{missing[0]} is not installed: {install}"
        pytest.skip(install)
    return f"{distribution} {importlib.metadata.version(distribution)}"


def _more_modules(install: str) -> list[str]:
    return [name for name in ("timm", "hydra", "iopath", "tensordict") if re.search(rf"\b{name}", install)]


def import_quietly(name: str) -> Any:
    """Import a package whose import warns: of others' deprecated parts, and of names that several ports register."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
