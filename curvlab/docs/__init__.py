"""The documentation that ships with the package, as markdown; hides where it lies. Reading it imports no torch."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
TOPICS = {
    "errors": "what exact, bound and sem mean",
    "right": "is my number right?",
    "estimators": "which estimator should I use?",
    "figures": "from the papers' figures to commands",
    "claims": "what the papers' claims say here",
    "glossary": "from the papers' symbols to the names here",
    "stability": "which names stay as they are",
    "changelog": "what changed",
}


def shipped(name: str) -> str | None:
    """The page of a topic or a quantity; None if there is none of this name."""
    for folder in (FOLDER, FOLDER / "quantities"):
        file = folder / f"{name}.md"
        if name.isidentifier() and file.exists():
            return file.read_text(encoding="utf-8")
    return None
