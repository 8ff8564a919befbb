"""Any page by its name: quantities, penalties, methods, claims and topics, shipped or made on the spot."""

from __future__ import annotations

import difflib
import inspect

from ..claims import CLAIMS
from ..diagnostics import DIAGNOSTICS
from ..diagnostics.registry import ALIASES, TRAINED
from ..methods import METHODS
from ..problems.studies import studies
from ..regularizers import REGULARIZERS
from . import TOPICS, shipped
from .docstrings import page
from .quantity import quantity

_TRAINED = """`trained/{0}` is the quantity below of the objective that is trained: the loss with its penalties and the
weight decay that the optimizer adds to the gradient (not AdamW's). It exists in `train` only, and not where a quantity
needs gradients of single examples or outputs of the model: a penalty couples the examples of its micro-batch."""


def find(name: str) -> str:
    """The page of a name, as markdown.

    Raises:
        ValueError: there is nothing of this name; the message has those that come close.
    """
    if name.startswith(TRAINED):
        plain = name.removeprefix(TRAINED)
        plain = ALIASES.get(plain, plain)
        if plain in DIAGNOSTICS:
            return f"{' '.join(_TRAINED.format(plain).split())}\n\n{find(plain)}"
    name = ALIASES.get(name, name)
    found = shipped(name)
    if found:
        return found
    if name in DIAGNOSTICS:
        return quantity(name)
    if f"{name}_penalty" in REGULARIZERS:
        return find(f"{name}_penalty")
    if name in METHODS:
        return _method(name)
    if name in CLAIMS:
        return _claim(name)
    experiments = {key.replace("-", "_"): key for key in [*studies(), *studies("paper")]}
    if name in experiments:
        from .figures import about  # which loads what sweeps need

        return about(experiments[name])
    known = [name for group in contents().values() for name in group]
    close = difflib.get_close_matches(name.removeprefix(TRAINED), [*known, *ALIASES], n=4, cutoff=0.5)
    hint = (
        f"did you mean {', '.join(close)}?"
        if close
        else "it knows no such quantity, penalty, method, claim, preset or topic;"
    )
    raise ValueError(f"there is nothing to explain under {name!r}; {hint} `curvlab explain` lists all names")


def contents() -> dict[str, dict[str, str]]:
    """What there is, by group: names, and a line about each."""
    return {
        "topics": dict(TOPICS),
        "quantities": {n: f"{d.symbol}, {d.formula}" for n, d in DIAGNOSTICS.items() if n not in REGULARIZERS},
        "penalties, also measured": {n: f"{r.symbol}, {r.formula}" for n, r in REGULARIZERS.items()},
        "methods": {n: m.formula for n, m in METHODS.items()},
        "claims": {n: c.sentence for n, c in CLAIMS.items()},
        "presets and studies": {n: s.about for n, s in (studies("paper") | studies()).items()},
    }


def _method(name: str) -> str:
    cls = METHODS[name]
    signature = inspect.signature(cls)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    called = f"cl.methods.{cls.__name__}{signature.replace(parameters=bare, return_annotation=signature.empty)}"
    call = f"`{called}`; on the command line `curvlab run --method {name}`"
    return page(name, [f"`{cls.formula}`", call, f"Source: {cls.source}."], cls)


def _claim(name: str) -> str:
    entry = CLAIMS[name]
    about = "several runs" if entry.several else "a run"
    use = f"Judged on {about} by `curvlab claims` and `cl.claims.check`."
    return page(name, [f"> {entry.sentence}", f"Source: {entry.source}. {use}"], entry.function)
