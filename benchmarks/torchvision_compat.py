"""Makes torchvision importable beside a CPU build of torch.

The torchvision of the package index is built for CUDA. Beside a CPU build of torch its compiled operators are missing,
its import fails ("operator torchvision::nms does not exist"), and with it the import of transformers, peft and
segment_anything, which look for torchvision but call none of these operators here.

    python -m benchmarks.torchvision_compat examples.finetune --limit 8

runs a module with its options in such an environment. One without torchvision needs none of this.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys

import torch


def ensure_importable() -> None:
    """Import torchvision, if it is installed; declare the operators whose absence is all that keeps it from it."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def main() -> None:
    """Run the module that the command line names, with the words after it."""
    if len(sys.argv) < 2:
        raise SystemExit("python -m benchmarks.torchvision_compat: error: MODULE must be named, got nothing")
    ensure_importable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
