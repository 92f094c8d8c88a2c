"""Tables in the README and on the terminal."""

from __future__ import annotations

import pandas


def markdown(table: pandas.DataFrame) -> str:
    """Return a table of text as Markdown, its index first.

    Cells are as wide as their text: padded to columns, as pandas does it, one new row would change every line.
    """
    cells = table.reset_index()
    rows = (f"| {' | '.join(row)} |" for row in (cells.columns, *cells.to_numpy()))
    return "\n".join([next(rows), "|---" * len(cells.columns) + "|", *rows])
