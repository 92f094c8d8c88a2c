"""Runs an example as ``python PATH`` does, or a notebook cell by cell, where torchvision may not fit torch.

    python -m tests.support.run_example PATH

A notebook's outputs are not kept; what it prints is printed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from benchmarks.torchvision_compat import ensure_importable

ROOT = Path(__file__).parent.parent.parent
SECONDS = 900


def run_in_fork(path: Path, log: Path) -> int | None:
    """Return how a process ended that ran an example, and write what it printed; None where it ran out of time.

    The process is forked from one that has imported the packages of most examples, which takes longer than many run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.example_packages"])
    process = context.Process(target=_run_logged, args=(path, log))
    process.start()
    process.join(SECONDS)
    process.kill()
    return process.exitcode


def _run_logged(path: Path, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = [str(path)]
    run(path)


def main() -> None:
    del sys.argv[0]
    run(Path(sys.argv[0]))


def run(path: Path) -> None:
    path = path.resolve()
    # The folder of the script in place of the one that this began in, so that it finds what a user's would.
    sys.path[0] = str(path.parent)
    ensure_importable()
    if path.suffix == ".ipynb":
        run_notebook(path)
    else:
        runpy.run_path(str(path), run_name="__main__")


def run_notebook(path: Path) -> None:
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)


if __name__ == "__main__":
    main()
