"""Records of benchmarks: one line of JSON each, with where it comes from; hides file names and what is left out of them."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from curvlab.runs import provenance

RECORDS = Path(__file__).with_name("records")


def append(record: dict[str, Any], folder: Path = RECORDS) -> Path:
    """Add a record, completed by its environment, to ``folder/<benchmark>.jsonl``; lines that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{record['benchmark']}.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**record, "environment": environment()}, ensure_ascii=False) + "\n")
    return file


def environment() -> dict[str, Any]:
    """Command, commit, versions, platform, threads and load: all that moves a timing, and nothing that names the machine."""
    found = provenance()
    found["command"] = [Path(sys.argv[0]).name, *_options(sys.argv[1:])]
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["cores"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["load"] = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # of a quiet machine below 1
    return found


def _options(arguments: list[str]) -> list[str]:
    """Without the folder of the records, which is a path of the machine's."""
    keep, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--records"):
            keep.append(argument)
        skip = argument == "--records"
    return keep
