"""Makes what the pages link to outside of ``docs/`` a part of the site: pictures, examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
# A link of a page to a file of the repository, as it works where the page is read there.
_OUTSIDE = re.compile(r"(?<=\]\()\.\./(?P<path>[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to, beside those of ``docs/``."""
    pages = [Path(page.abs_src_path).read_text() for page in files.documentation_pages() if page.abs_src_path]
    for path in sorted({match["path"] for text in pages for match in _OUTSIDE.finditer(text)}):
        if (ROOT / path).is_file():
            copy = File.generated(
                config, f"repository/{path}", abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(copy)
    return files


def on_page_markdown(markdown: str, **_more: Any) -> str:
    """Return a page whose links lead to those copies."""
    return _OUTSIDE.sub(r"repository/\g<path>", markdown)
