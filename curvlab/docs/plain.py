"""Markdown as text for a terminal: wrapped paragraphs, aligned tables, indented code."""

from __future__ import annotations

import re
import textwrap
from unicodedata import combining


def plain(markdown: str, width: int = 100) -> str:
    """The same page without marks, in lines of at most `width` characters where words allow it."""
    out = [_block(block, width) for block in _blocks(markdown)]
    return "\n\n".join(block for block in out if block) + "\n"


def _blocks(markdown: str) -> list[str]:
    """What blank lines separate; fenced code is one block, whatever is in it."""
    parts = re.split(r"^(```.*?^```)$", markdown, flags=re.M | re.S)
    blocks = [[part] if i % 2 else re.split(r"\n\s*\n", part) for i, part in enumerate(parts)]
    return [block.strip("\n") for group in blocks for block in group if block.strip()]


def _block(block: str, width: int) -> str:
    if block.startswith("```"):
        return textwrap.indent("\n".join(block.splitlines()[1:-1]), "    ")
    block = "\n".join(line for line in block.splitlines() if not line.startswith("<!--"))
    if not block:
        return ""
    if block.startswith("    "):
        return block
    if block.startswith("#"):
        marks, _, title = _inline(block).partition(" ")
        return f"{title}\n{('=' if len(marks) == 1 else '-') * len(title)}"
    if block.startswith("|"):
        return _table([_cells(row) for row in block.splitlines()], width)
    items = re.split(r"\n(?=- )", block)
    return "\n".join(_wrapped(_inline(item), width, "  " if item.startswith("- ") else "") for item in items)


def _inline(text: str) -> str:
    """Text without marks; a link to a page becomes the command that shows it."""
    text = re.sub(r"\[([^\]]+)\]\((?:\.\./)?(?:quantities/)?(\w+)\.md\)", r"\1 (curvlab explain \2)", text)
    text = re.sub(r"\[([^\]]+)\]\((http[^)]+)\)", r"\1 (\2)", text)
    text = re.sub(r"(?<!\w)(\*\*?)(\w[^*]*?)\1(?!\w)", r"\2", text)
    return text.replace("`", "").replace("\\|", "|")


def _wrapped(text: str, width: int, hanging: str) -> str:
    quote = "  " if text.startswith("> ") else ""
    words = " ".join(text.removeprefix("> ").split())
    return textwrap.fill(
        words, width, initial_indent=quote, subsequent_indent=quote + hanging,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _cells(row: str) -> list[str]:
    return [_inline(cell.strip()) for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def _table(rows: list[list[str]], width: int) -> str:
    """Columns side by side; the widest give way until the table fits, and their cells are wrapped."""
    head, _, *body = rows
    columns = list(zip(head, *body, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    least = [max(_width(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > width and any(w > m for w, m in zip(widths, least, strict=True)):
        spare = [w if w > m else 0 for w, m in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    lines = [*_row(head, widths), "  ".join("-" * w for w in widths)]
    return "\n".join([*lines, *(line for row in body for line in _row(row, widths))])


def _row(cells: list[str], widths: list[int]) -> list[str]:
    wrapped = [
        textwrap.wrap(cell, w, break_long_words=False, break_on_hyphens=False)
        for cell, w in zip(cells, widths, strict=True)
    ]
    height = max(1, *(len(lines) for lines in wrapped))
    grid = [[*lines, *[""] * (height - len(lines))] for lines in wrapped]
    return [
        "  ".join(c + " " * (w - _width(c)) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*grid, strict=True)
    ]


def _width(text: str) -> int:
    """Places on the screen: a combining mark, as in R̄, takes none."""
    return sum(not combining(c) for c in text)
