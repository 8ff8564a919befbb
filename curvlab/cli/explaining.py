"""`curvlab explain`: what a quantity, penalty, method, claim, preset or topic is, from the shipped documentation."""

from __future__ import annotations

from typing import Annotated

import tyro

from ..docs import shipped
from ..docs.plain import plain


def explain_command(arguments: list[str]) -> int:
    def options(name: Annotated[str, tyro.conf.Positional] = "", markdown: bool = False) -> tuple[str, bool]:
        """What a name means: definition, estimator, error, cost, when it fails, options, an example.

        Args:
            name: A quantity (also trained/NAME), penalty, method, claim, preset or study, or a topic: errors, right,
                estimators, figures, claims, glossary, stability, changelog. Without a name: what there is.
            markdown: Print markdown instead of plain text.
        """
        return name, markdown

    name, markdown = tyro.cli(options, args=arguments, prog="curvlab explain")
    page = _page(name)
    print(page if markdown else plain(page), end="")
    return 0


def _page(name: str) -> str:
    found = shipped(name.replace("-", "_"))
    if found:  # without importing torch
        return found
    from ..docs.pages import contents, find

    if name:
        return find(name.replace("-", "_"))
    groups = [f"## {title}\n\n{_listing(group)}" for title, group in contents().items()]
    return "\n\n".join(["# curvlab explain NAME", *groups]) + "\n"


def _listing(group: dict[str, str]) -> str:
    rows = [f"| {name} | {about.replace('|', chr(92) + '|')} |" for name, about in group.items()]
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])
