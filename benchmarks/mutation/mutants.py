"""Small changes of a module, as Cosmic Ray makes them, of which every one should make a test fail."""

from __future__ import annotations

import ast
import contextlib
import difflib
import random
from collections.abc import Iterator
from typing import NamedTuple

# One change for each operator in place of Cosmic Ray's ten, most of which fail at once; of comparisons the boundary and
# the opposite. Those that it has in one form are all taken.
BINARY = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_Mul", "Pow_Mul"),
    *("BitOr_BitAnd", "BitAnd_BitOr"),
)
COMPARISONS = (
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt"),
    *("Lt_GtE", "GtE_Lt", "Gt_LtE", "LtE_Gt"),
)
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in BINARY),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS),
    *("ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_USub_UAdd", "AddNot", "NumberReplacer"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop", "ExceptionReplacer"),
    "RemoveDecorator",
)


class Mutant(NamedTuple):
    """A changed module.

    Attributes:
        name: operator and number of the place among those that it finds.
        line: the first that changes, from 1.
        before: the lines that change, without indentation.
        after: what they become.
        source: of the whole module.

    """

    name: str
    line: int
    before: str
    after: str
    source: str


def mutants(source: str, count: int = 0, seed: int = 0) -> tuple[int, list[Mutant]]:
    """Return how many changes of a module there are, and so many of them, drawn by a seed; 0 for all.

    Annotations and what only a type checker reads stay as they are. What is no Python any more is left out.
    """
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    places = list(_places(source))
    chosen = range(len(places))
    if 0 < count < len(places):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    found = []
    for operator, index, line in (places[one] for one in chosen):
        changed = mutate_code(source.encode(), plugins.get_operator(f"core/{operator}")(), index)
        # The ** of a mapping that is unpacked is taken for a power.
        with contextlib.suppress(SyntaxError):
            ast.parse(changed)
            found.append(Mutant(f"{operator} {index}", line, *_lines(source, changed), changed))
    return len(places), found


def _places(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield operator, number of the place, and line."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    unread = list(_unread(ast.parse(source)))
    nodes = list(ast_nodes(get_ast(source)))
    for operator in OPERATORS:
        change = plugins.get_operator(f"core/{operator}")()
        found = [place for node in nodes for place in change.mutation_positions(node)]
        for index, (start, end) in enumerate(found):
            if not any(first <= start and end <= last for first, last in unread):
                yield operator, index, start[0]


def _unread(module: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield start and end of what is not evaluated."""
    for node in ast.walk(module):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            parts = [node]
        for part in parts:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def _lines(before: str, after: str) -> tuple[str, str]:
    """Return the lines that differ, each joined to one."""
    changes = [*difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")][2:]
    return tuple(" ".join(line[1:].strip() for line in changes if line[0] == sign) for sign in "-+")
