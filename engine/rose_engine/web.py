"""Pieces of an HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every text is escaped."""
    cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"  # noqa: E731
    return f"<table><thead>{cells(heads, 'th')}</thead><tbody>{''.join(cells(row, 'td') for row in rows)}</tbody></table>"


def picture(name: str, png: bytes) -> str:
    """A PNG within the page, `name` read out in its place."""
    return f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
