"""Reads the docstrings of the package as Markdown: roles of Sphinx become links, doctests become code."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

# Read and not imported: the pages can be built without torch.
_FOLDER = Path(__file__).parents[2] / "renyi_kd"
_PACKAGE = ast.parse((_FOLDER / "__init__.py").read_text())
_PUBLIC = next(
    ast.literal_eval(each.value)
    for each in _PACKAGE.body
    if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "__all__"
)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
# A product <a, b> in a paragraph, which would be a tag of HTML; in code it stays.
_ANGLE = re.compile(r"(`[^`]*`|^ .*$)|<(?=[A-Za-z])", re.MULTILINE)
_DOCTEST = re.compile(r"^(>>> .*(?:\n(?!\n).+)*)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_more: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            text = _ANGLE.sub(lambda match: match[1] or "&lt;", obj.docstring.value)
            text = _ROLE.sub(_link, text)
            obj.docstring.value = _DOCTEST.sub(r"```pycon\n\1\n```", text)


def _link(match: re.Match[str]) -> str:
    name = match[1]
    if name.partition(".")[0] not in _PUBLIC:
        return f"`{name}`"
    # A module of the package hides the function of its name.
    module = f"{name}." if (_FOLDER / f"{name}.py").is_file() else ""
    return f"[`{name}`][renyi_kd.{module}{name}]"
