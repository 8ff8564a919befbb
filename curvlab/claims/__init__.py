"""What papers say should hold, as rules that read a run's log and nothing else; one file per paper."""

from . import cohen2021, lee2022
from .registry import CLAIMS, Verdict, check, claim

__all__ = ["CLAIMS", "Verdict", "check", "claim", "cohen2021", "lee2022"]
