"""Command lines out of dataclasses: a field is an option, and its line in the docstring what --help says of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import tyro
from safetensors import SafetensorError

Options = TypeVar("Options")


def parsed(options: type[Options], module: str, description: str | None, argv: Sequence[str] | None) -> Options:
    """Return the options of ``python -m module``; one that is unknown or unreadable ends the program.

    Args:
        options: the dataclass.
        module: its name, as it is run.
        description: what --help says first.
        argv: words of the command line; None for those that the program was started with.

    """
    return tyro.cli(options, prog=f"python -m {module}", description=description, args=argv)


@contextmanager
def sentence_at_fault(module: str) -> Iterator[None]:
    """End the program with what an error says, without the places in the code that it passed."""
    try:
        yield
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        print(f"python -m {module}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
