"""`curvlab verify`: every quantity of a run's end, or of a model of one's own, against dense references on a small copy."""

from __future__ import annotations

from typing import Any

import tyro

from .points import Source, ask, heading, of_model, of_run, one_source


def verify_command(arguments: list[str]) -> int:
    def options(
        source: tyro.conf.OmitArgPrefixes[Source],
        diagnostics: tuple[str, ...] = (),
        examples: int = 7,
        batch_size: int = 2,
        lr: float | None = None,
        max_parameters: int = 300,
    ) -> dict[str, Any]:
        """Compare what curvlab measures with dense references, on a copy in float64 with a few examples.

        The exit status is 1 if a number is wrong.

        Args:
            diagnostics: Which quantities; default all.
            examples: How many of the data.
            batch_size: b of S_b.
            lr: Learning rate of a step; default half of 1/lambda_max.
            max_parameters: For dense matrices; of a larger model whole tensors are taken, the smallest first.
        """
        return locals()

    asked = ask(options, arguments, "verify")
    one_source(asked, "verify")
    from ..verification import verified

    at = of_run(asked) if asked["run"] else of_model(asked)
    names = ("examples", "batch_size", "lr", "max_parameters", "seed")
    found = verified(
        at.objective, at.w, diagnostics=asked["diagnostics"] or None, **{name: asked[name] for name in names}
    )
    print(f"{heading(at)}\n{found}")
    return 0 if found.ok else 1
