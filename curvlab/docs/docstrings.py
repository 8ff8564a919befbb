"""Docstrings as markdown; hides their labels: Estimator, Error, Fails, Args, Raises, Returns, Source, Example."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

LABELS = ("Estimator", "Error", "Fails", "Args", "Raises", "Returns", "Source", "Example", "Attributes")
VERDICTS = ("Holds", "Does not hold", "Undecided", "Not applicable")
_LABEL = re.compile(rf"^({'|'.join(LABELS)}):[ \n]", re.M)


def sections(documented: Any) -> dict[str, str]:
    """The parts of a docstring by label; what comes before the first label is under ""."""
    text = (inspect.getdoc(documented) or "") + "\n"
    cuts = [*_LABEL.finditer(text)]
    ends = [*(cut.start() for cut in cuts), len(text)]
    found = {"": text[: ends[0]].strip()}
    for cut, end in zip(cuts, ends[1:], strict=True):
        body = text[cut.end() :][: end - cut.end()]
        found[cut[1]] = textwrap.dedent(body).strip() if cut[0].endswith("\n") else body.strip()
    return found


def prose(text: str) -> str:
    """Text of a docstring as markdown: a capital first, one backtick instead of two, paragraphs in one line."""
    word = re.match(r"[a-z]{2,}[ ,]", text)  # not the name of a variable
    text = (text[0].upper() + text[1:] if word else text).replace("``", "`")
    blocks = re.split(rf"\n\n|\n(?=(?:{'|'.join(VERDICTS)}): )", text)
    return "\n\n".join(block if block.startswith("    ") else _joined(block) for block in blocks)


def entries(text: str) -> dict[str, str]:
    """What a section such as Args says of each name; "a, b: text" says it of both."""
    found: dict[str, str] = {}
    for item in re.split(r"\n(?! )", text):
        names, _, said = item.partition(":")
        found |= {name.strip(): _joined(said.replace("``", "`")) for name in names.split(",")}
    return found


def page(title: str, lead: list[str], documented: Any) -> str:
    """A page of something that has a docstring: `lead`, then all the docstring's sections."""
    parts = sections(documented)
    out = [f"# {title}", *lead, prose(parts.pop(""))]
    for label, text in parts.items():
        if label == "Example":
            code = "\n".join(line[4:] for line in text.splitlines() if line.startswith((">>> ", "... ")))
            text = f"```python\n{code}\n```"
        elif label in ("Args", "Raises", "Attributes"):
            text = "\n".join(f"- `{name}`: {said}" for name, said in entries(text).items())
        else:
            text = prose(text)
        out += [f"## {label}", text]
    return "\n\n".join(part for part in out if part) + "\n"


def _joined(text: str) -> str:
    """Lines joined where they are only wrapped: a line that starts a list item stays one."""
    return re.sub(r"\s*\n\s*(?!- )", " ", text.strip())
