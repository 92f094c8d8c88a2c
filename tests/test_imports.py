"""Imports of the package run one way, from the loss down to reading a SAM and to entropies."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import renyi_kd

FOLDER = Path(renyi_kd.__file__).parent
# What each room may import of the others; a room is a file or a folder of the package.
ALLOWED = {
    "sam": set(),
    "fp64": set(),
    "whole_state": set(),
    "magnitude": set(),
    "entropy": {"fp64", "magnitude"},
    "gram": {"fp64", "magnitude"},
    "samples": {"sam", "whole_state"},
    "gradient_share": {"sam"},
    "share_control": {"gradient_share", "samples", "whole_state"},
    "diagnostics": {"entropy", "gradient_share"},
    "objective": {"entropy", "diagnostics"},
    "ops": {"objective", "samples", "entropy", "gram", "fp64"},
    "feature_entropy": {"gram", "fp64", "magnitude", "ops"},
    "relation": {"ops", "sam", "whole_state"},
    "gradient_watch": {"relation"},
    "micro_batches": {"sam"},
    "gradient_cache": {"micro_batches", "gradient_share", "ops", "sam"},
    "functional": {"objective", "diagnostics", "relation", "samples", "ops", "sam"},
    "teachers": {"sam"},
    "loss": {
        *("functional", "teachers", "diagnostics", "gradient_share", "gradient_watch", "share_control", "objective"),
        *("relation", "gradient_cache", "whole_state"),
        *("samples", "ops", "sam"),
    },
    "accumulation": {"loss", "functional", "gradient_cache", "micro_batches", "teachers", "sam"},
    "plot": set(),
    "__main__": {"sam"},
}


def name_of(path: Path) -> str:
    """Return the dotted name of a module, a package by its folder."""
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(FOLDER.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Yield the package's modules that a file names, those that only some functions or type checkers import too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield from {module if module in MODULES else node.module} & MODULES.keys()


IMPORTS = {name: set(imported(path)) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_those_below_it_alone(room):
    modules = [name for name in MODULES if room_of(name) == room]
    assert modules, f"{room} is gone"
    wrong = {
        f"{name} imports {other}"
        for name in modules
        for other in IMPORTS[name]
        if room_of(other) not in ALLOWED[room] | {room}
    }
    assert not wrong


def test_every_room_has_its_place():
    assert {room_of(name) for name in MODULES} == {"", *ALLOWED}


def test_there_is_no_cycle():
    # Both say which, if there is one.
    TopologicalSorter(ALLOWED).prepare()
    TopologicalSorter(IMPORTS).prepare()


def test_references_and_kernels_do_not_import_each_other():
    references = {name for name in MODULES if name.endswith(".reference")}
    kernels = {name for name, path in MODULES.items() if "triton.jit" in path.read_text() or name.endswith(".triton")}
    assert references
    for name in references:
        assert not IMPORTS[name] & kernels
    for name in kernels:
        assert not IMPORTS[name] & references
