"""Print what a tap finds in a model: ``python -m renyi_kd MODEL``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from renyi_kd.sam.report import report
from renyi_kd.sam.run import forward_parameters


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 if a tap attaches, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m renyi_kd", description="Print what a tap finds in a model.")
    parser.add_argument(
        "model",
        help="name or folder of a transformers model (its weights are not loaded), or module:factory, a function "
        "without arguments that returns a model",
    )
    parser.add_argument(
        "--batch", help="module:function that returns a batch to run the model on; a transformers model gets its own"
    )
    parser.add_argument("--call", help="module:function of model and batch that runs the model")
    options = parser.parse_args(arguments)
    # The current folder comes first, as for python -m.
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        if _is_function(options.model):
            model = _function(options.model)()
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"renyi_kd: {options.model} must return a torch.nn.Module, got {type(model).__name__}; "
                    "name a function that builds the model"
                )
            batch = _function(options.batch)() if options.batch else None
        else:
            model = _transformers_model(options.model)
            batch = _function(options.batch)() if options.batch else _transformers_batch(model)
        print(report(model, batch, call=_function(options.call) if options.call else None))
    except (ImportError, AttributeError, OSError, TypeError, ValueError, RuntimeError) as error:
        print(_explained(error), file=sys.stderr)
        return 1
    return 0


def _explained(error: BaseException) -> str:
    """Return an error's message, with its cause where the import of a package hides it."""
    causes = list(_causes(error))
    for cause in causes:
        if "torchvision" in str(cause) and not isinstance(cause, ModuleNotFoundError):
            return (
                "renyi_kd: torchvision must be built for the torch that is installed, got torchvision "
                f"{_version('torchvision')} beside torch {torch.__version__} ({cause}), so that packages which look "
                "for it cannot be imported; pip uninstall torchvision, which the SAMs of transformers do without, or "
                "install both again from one index: pip install --force-reinstall torch torchvision"
            )
    if isinstance(error, ImportError) and causes and not str(error).startswith("renyi_kd:"):
        return f"{error}; caused by {type(causes[-1]).__name__}: {causes[-1]}"
    return str(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield what an error was raised from, and what that was raised from."""
    cause = error.__cause__
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _is_function(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"renyi_kd: a function must be given as module:function, got {name!r}; as in train:make_model")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(
            f"renyi_kd: {module!r} must be a module of this folder or an installed one, got none of that name; "
            "run the command where the file lies, and leave .py out"
        ) from error
    if not hasattr(found, function):
        near = difflib.get_close_matches(function, dir(found))
        raise AttributeError(
            f"renyi_kd: {module} must hold what {name!r} names, got nothing called {function!r}; "
            + (f"near it: {', '.join(near)}" if near else "name a function that it defines")
        )
    return getattr(found, function)


def _check_name(name: str) -> None:
    """Raise for what is neither a folder nor a possible name at the hub, and say so before the hub is asked."""
    if Path(name).is_dir():
        return
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if file.is_file():
        raise ValueError(
            f"renyi_kd: a model of {file} must be named by its function, got {name!r}; as in {file.stem}:make_model"
        )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(
            f"renyi_kd: the model must be a folder, a name at the Hugging Face hub or module:factory, got {name!r}, "
            "which is no folder here; look at the path"
        )
    print(f"renyi_kd: no folder {name!r} is here, so it is looked up at the Hugging Face hub", file=sys.stderr)


def _transformers_model(name: str) -> nn.Module:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"renyi_kd: transformers must be installed to look at {name!r}, got none; "
            "pip install transformers, or name a function of yours: module:factory"
        ) from error
    _check_name(name)
    config = transformers.AutoConfig.from_pretrained(name)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    # Structure and shapes need no weights.
    with torch.device("meta"):
        model: nn.Module = kind(config) if kind else transformers.AutoModel.from_config(config)
    return model


def _transformers_batch(model: Any) -> dict[str, Any] | None:
    """Return two images with one box each, of the size that the configuration names; None if it takes no such batch."""
    configs = (getattr(model.config, name, None) for name in ("prompt_encoder_config", "vision_config"))
    size = next((size for config in configs if (size := getattr(config, "image_size", None))), None)
    if not isinstance(size, int) or not {"pixel_values", "input_boxes"} <= forward_parameters(model).keys():
        return None
    with torch.device("meta"):
        return {"pixel_values": torch.empty(2, 3, size, size), "input_boxes": torch.zeros(2, 1, 4)}


if __name__ == "__main__":
    sys.exit(main())
