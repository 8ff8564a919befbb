"""A model of the user's: objects named as package.module:name, called where they are factories, and a saved state dict."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..checks import trainable, usable_device
from ..objective import Objective
from ..runs import read_tensors
from ..unwrap import unwrap

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
PREFIXES = ("module.", "model.")  # of DistributedDataParallel and Lightning
HERE = Path(__file__).parents[1]
_INSTALLED = re.compile(r"site-packages|dist-packages|^<|/lib/python3")  # where the user's own code is not
EXAMPLE = "package.module:make_model"


def objective(
    model: str, data: str, loss: str, *, seed: int = 0, checkpoint: Path | None = None, **settings: Any
) -> tuple[Objective, int | None]:
    """The objective of a model, its data and its loss, each named; and the step that the checkpoint states.

    Args:
        model, data: a function without arguments, or the object itself; `data` gives what `Objective` takes.
        loss: a name, or an object; a class is instantiated.
        seed: of the global generator, before anything of the user's is called.
        settings: of `Objective`.

    Raises:
        ValueError: a name that does not lead to what is expected, or what `Objective` refuses; one line with the fix.
    """
    names = {"model": model, "data": data} | ({"loss": loss} if ":" in loss else {})
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        torch.manual_seed(seed)
        there = {option: found(option, name) for option, name in names.items()}
        torch.manual_seed(seed)  # again, since what an import draws is drawn once in a process
        network = _made("model", model, there["model"])
        if not isinstance(network, nn.Module):
            raise ValueError(f"--model {model} gave a {type(network).__name__}; expected a torch.nn.Module")
        step = None if checkpoint is None else restore(network, checkpoint)
        batches = _made("data", data, there["data"])
        criterion = there.get("loss", loss)
        criterion = _called("loss", loss, criterion) if inspect.isclass(criterion) else criterion
        with _told(f"{model} on {data} with loss {loss}"):
            return Objective(network, criterion, batches, **as_taken(**settings)), step


def as_taken(device: str | None = None, dtype: str | None = None, **others: Any) -> dict[str, Any]:
    """Settings of the command line as `Objective` takes them."""
    usable_device(device)
    return {**others, "device": device, "dtype": None if dtype is None else getattr(torch, dtype)}


def _made(option: str, name: str, there: Any) -> Any:
    """An object, or what it returns if it is a function or a class."""
    return there if isinstance(there, nn.Module) or not callable(there) else _called(option, name, there)


def found(option: str, name: str) -> Any:
    """The object that package.module:name stands for; modules of the current directory are found first.

    Raises:
        ValueError: no such module or attribute, or a module that fails while it is imported.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"--{option} is {name!r}; expected {EXAMPLE.replace('model', option)}, with a colon")
    if "/" in module or module.endswith(".py"):
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(f"--{option} is {name!r}; name the module, not its file: {dotted}:{attribute}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with _told(f"importing {module}", unless=module):
            there = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no module {error.name!r} in {os.getcwd()} or on Python's path; run curvlab where it lies, or add its "
            "folder to PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not hasattr(there, part):
            public = [n for n in vars(there) if not n.startswith("_")] if hasattr(there, "__dict__") else []
            near = difflib.get_close_matches(part, public, n=3) or public[:12]
            raise ValueError(f"{module} has no {part!r}; it has {', '.join(near) or 'nothing public'}")
        there = getattr(there, part)
    return there


def restore(model: nn.Module, file: Path) -> int | None:
    """Put the parameters and buffers of a checkpoint into a model; returns the step that it states.

    It is a state dict that torch saved, alone or under "state_dict", "model_state_dict" or "model", with or without the
    prefixes that wrappers add; or the `final.pt` of a run of `curvlab.train`.

    Raises:
        ValueError: a file that is damaged or holds something else; or names and shapes that do not match.
    """
    content, model = read(file), unwrap(model)
    step = next((content[key] for key in ("step", "global_step") if isinstance(content.get(key), int)), None)
    if isinstance(content.get("params"), Tensor) and "buffers" in content:
        _assign(model, content, file)
        return step
    # A state dict has no mapping in it, but what lies around one may have tensors.
    states = [dict(x) for x in (*map(content.get, NESTED), content) if _is_state(x)]
    if not states:
        raise ValueError(
            f"{file} holds no state dict; expected one, or one under {', '.join(NESTED)}; it has "
            f"{', '.join(map(str, list(content)[:8])) or 'nothing'}"
        )
    own = model.state_dict()
    state, beside = _unprefixed(states[0], set(own))
    if beside:
        print(f"curvlab: left out of {file}, being outside of the model: {_listed(beside)}", file=sys.stderr)
    _match(own, state, file)
    with _told(f"loading {file}"):
        model.load_state_dict(state)
    return step


def read(file: Path) -> dict[str, Any]:
    """The content of a file of `torch.save`: tensors and plain values, nothing is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; --checkpoint is a file of torch.save(model.state_dict(), ...)")
    content = read_tensors(file)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{file} holds a {type(content).__name__}; expected a state dict: torch.save(model.state_dict(), ...)"
        )
    return dict(content)


def _is_state(x: Any) -> TypeGuard[Mapping[str, Any]]:
    return (
        isinstance(x, Mapping)
        and bool(x)
        and all(isinstance(key, str) for key in x)
        and any(isinstance(value, Tensor) for value in x.values())
    )


def _unprefixed(state: Mapping[str, Any], own: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The same without the prefixes that wrappers add, if it takes that to meet the names of the model.

    And the names that lie beside the prefix, such as those of the metrics of a Lightning module.
    """
    compiled = any("_orig_mod." in name for name in own)
    state = {key if compiled else key.replace("_orig_mod.", ""): value for key, value in state.items()}
    beside: list[str] = []
    while not own & set(state):
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        beside += [key for key in state if not key.startswith(prefix)]
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state, beside


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _match(own: Mapping[str, Any], state: Mapping[str, Any], file: Path) -> None:
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != value.shape
    ]
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (("missing", missing), ("not in the model", unknown), ("shapes differ", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{file} does not fit the model; {'; '.join(problems)}. Make the model that was saved")


def _assign(model: nn.Module, content: Mapping[str, Any], file: Path) -> None:
    """The flat vector of curvlab's own final.pt."""
    variables, w = list(trainable(model).values()), content["params"]
    sizes = [p.numel() for p in variables]
    if w.shape != (sum(sizes),):
        raise ValueError(f"{file} has {w.numel()} parameters, and the model {sum(sizes)}; make the model of that run")
    for p, part in zip(variables, w.split(sizes), strict=True):
        p.data.copy_(part.view(p.shape))
    model.load_state_dict(content["buffers"], strict=False)


def _called(option: str, name: str, factory: Callable[[], Any]) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        raise ValueError(
            f"--{option} {name}{inspect.signature(factory)} needs arguments, and curvlab calls it without any; give them "
            "defaults, or name a function that fills them in"
        ) from None
    except ValueError:
        pass  # builtins have no signature
    with _told(f"{name}()"):
        return factory()


@contextlib.contextmanager
def _told(what: str, unless: str = "") -> Iterator[None]:
    """An error of the user's code in one line: what failed, how, and where; but not that the module `unless` is missing."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{unless}.".startswith(f"{error.name}."):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        if (
            Path(frames[-1].filename).is_relative_to(HERE)
            and isinstance(error, ValueError | TypeError)
            and len(frames) > 1
        ):
            raise ValueError(str(error)) from error  # what curvlab refuses says what it needs
        theirs = [f for f in frames if not Path(f.filename).is_relative_to(HERE) and not _INSTALLED.search(f.filename)]
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        hint = "; put what a script runs under if __name__ == '__main__'" if isinstance(error, SystemExit) else ""
        raise ValueError(f"{what} failed: {type(error).__name__}: {error}{place}{hint}") from error
