"""All studies by name, at small scale and at that of the papers. Imports no torch."""

from __future__ import annotations

from typing import Literal

from .novack_studies import NOVACK
from .presets import ABOUT, PRESETS, Experiment
from .rows import Row, Study
from .smith_studies import SMITH

Scale = Literal["small", "paper"]
STUDIES: dict[str, Study] = {**NOVACK, **SMITH}


def study(name: str, scale: Scale = "small") -> Study:
    """A study, or a preset as a study of one row.

    Args:
        scale: "small", for minutes on a CPU, or "paper", with the paper's model, data and lengths.

    Raises:
        ValueError: an unknown name, or one that does not exist at this scale.
    """
    found = studies(scale)
    if name not in found:
        other: Scale = "small" if scale == "paper" else "paper"
        where = f" at --scale {scale}, but at --scale {other}" if name in studies(other) else ""
        raise ValueError(f"there is no preset {name!r}{where}; there are {', '.join(found)}")
    return found[name]


def studies(scale: Scale = "small") -> dict[str, Study]:
    """All studies of a scale, and its presets as studies of one row."""
    if scale == "paper":
        from .paper import PAPER

        return PAPER
    return STUDIES | {name: Study(ABOUT[name], experiment, {"": Row()}) for name, experiment in PRESETS.items()}


def preset(name: str, scale: Scale = "small") -> Experiment:
    """The experiment of a preset.

    Raises:
        ValueError: an unknown name, one that does not exist at this scale, or a study of several rows.
    """
    asked = study(name, scale)
    if list(asked.rows) != [""]:
        raise ValueError(f"{name} is a study of {len(asked.rows)} rows; run it by `curvlab sweep {name}`")
    return asked.base
