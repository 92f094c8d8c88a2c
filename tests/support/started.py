"""Processes that train together, each of which saves what it found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent


def run_processes(module: str, folder: Path, n_processes: int) -> list[dict[str, Any]]:
    """Run a module with a folder and each rank, and return what the processes saved there as ``RANK.pt``."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", "-m", module, str(folder), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n_processes)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            if process.returncode:
                raise RuntimeError(said)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(n_processes)]
