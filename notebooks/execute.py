"""Make the notebooks: NN_name.ipynb is NN_name.py (jupytext's py:percent), executed.

    python notebooks/execute.py [NN_name ...]

A cell may have a `reduced` setting, code that is put at its end for a quick run, as the tests do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The sources of all notebooks, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read(source: Path, *, reduced: bool = False) -> Any:
    """A source as a notebook without outputs, with the same cell ids each time."""
    import jupytext

    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        if reduced and "reduced" in cell.metadata:
            cell.source += "\n" + cell.metadata["reduced"]
    return notebook


def execute(source: Path, *, reduced: bool = False) -> Any:
    """A source as a notebook with its outputs; an error in a cell is an error here."""
    from nbclient import NotebookClient

    notebook = read(source, reduced=reduced)
    NotebookClient(notebook, kernel_name=KERNEL["name"], record_timing=False, timeout=600).execute()
    notebook.metadata["kernelspec"] = KERNEL
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(names: list[str]) -> None:
    import nbformat

    for source in [FOLDER / f"{name}.py" for name in names] or sources():
        nbformat.write(execute(source), source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb").name)


if __name__ == "__main__":
    main(sys.argv[1:])
