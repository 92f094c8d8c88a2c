"""Runs an example as ``python PATH`` does, or a notebook cell by cell, where torchvision may not fit torch.

    python -m tests.support.run_example PATH

A notebook's outputs are not kept; what it prints is printed.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from benchmarks.torchvision_compat import ensure_importable


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    del sys.argv[0]
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
