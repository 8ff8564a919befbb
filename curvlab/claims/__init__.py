"""What papers say should hold, as rules that read a run's log and nothing else; one file per paper."""

from . import (
    andreyev2024,
    cohen2021,
    lee2022,
    lee2022_events,
    lee2022_iir,
    lee2022_scaling,
    novack2022,
    novack2022_norms,
    smith2021,
    smith2021_scores,
)
from .datasets import by_data_set
from .registry import CLAIMS, Verdict, check, claim

__all__ = [
    "CLAIMS",
    "Verdict",
    "andreyev2024",
    "by_data_set",
    "check",
    "claim",
    "cohen2021",
    "lee2022",
    "lee2022_events",
    "lee2022_iir",
    "lee2022_scaling",
    "novack2022",
    "novack2022_norms",
    "smith2021",
    "smith2021_scores",
]
