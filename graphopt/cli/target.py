"""What a command line's TARGET names: a model and the inputs of one step."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from graphopt.errors import TargetError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["Inputs", "Target", "import_object", "load_loss", "load_target", "step_mode"]

Inputs = tuple[Any, ...] | dict[str, Any]

_SPELLING = "a target is package.module:factory or a saved .pt2 file"


@dataclass(frozen=True)
class Target:
    """A model and the inputs of one step: a tuple of positional or a dict of keyword arguments."""

    name: str
    model: torch.nn.Module
    inputs: Inputs


def load_target(text: str) -> Target:
    """Load ``package.module:factory`` (the working directory is importable) or ``model.pt2``.

    The factory takes no arguments and returns ``(model, inputs)``, or a model that needs no
    inputs. Raises ``TargetError`` with the nearest name.
    """
    if text.endswith(".pt2"):
        return _load_exported(text)
    factory = import_object(text, "target")
    made = factory
    if not _is_module(factory):
        if not callable(factory):
            raise TargetError(f"{text!r} is {type(factory).__name__}, not a function that returns a model")
        try:
            made = factory()
        except Exception as error:
            raise TargetError(
                f"{text!r} raised {type(error).__name__}: {error}",
                hint="a factory takes no arguments and returns a model, or a model and its inputs",
            ) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not _is_module(model):
        raise TargetError(
            f"{text!r} returned {_described(made)}; expected a torch.nn.Module, or one and its inputs"
        )
    if inputs is None:
        _check_needs_nothing(text, model)
        return Target(text, model, ())
    if not isinstance(inputs, (tuple, dict)):
        raise TargetError(
            f"{text!r} returned inputs of type {type(inputs).__name__}; expected a tuple of positional or a "
            "dict of keyword arguments"
        )
    return Target(text, model, inputs)


def load_loss(text: str | None) -> Callable[[Any], Any] | None:
    """The function that ``--loss`` names, ``None`` for none; raises ``TargetError``."""
    if text is None:
        return None
    found = import_object(text, "loss")
    if not callable(found):
        raise TargetError(f"loss {text!r} is {type(found).__name__}, not a function")
    return cast("Callable[[Any], Any]", found)


def import_object(text: str, what: str) -> Any:
    """Import ``package.module:attribute``; ``what`` names it in errors. Raises ``TargetError``."""
    module_name, colon, attribute = text.partition(":")
    if not (module_name and colon and attribute):
        raise TargetError(f"cannot read {what} {text!r}: expected package.module:name", hint=_SPELLING)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _import_module(module_name, what)
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = nearest(part, [name for name in dir(found) if not name.startswith("_")])
            raise TargetError(
                f"{module_name!r} has no {attribute!r}" + (f"; did you mean {close!r}?" if close else "")
            )
        found = getattr(found, part)
    return found


def _import_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise TargetError(f"importing {name!r} failed: {error}") from error
        if "/" in name or name.endswith(".py"):
            dotted = name.removesuffix(".py").strip("./").replace("/", ".")
            raise TargetError(
                f"{name!r} is a path: a {what} names a module",
                hint=f"write {dotted}:..., from its root folder",
            ) from error
        parent, _, missing = error.name.rpartition(".")
        close = nearest(missing, _siblings(parent))
        raise TargetError(
            f"cannot find module {error.name!r} of {what} {name!r}"
            + (f"; did you mean {f'{parent}.{close}' if parent else close!r}?" if close else ""),
            hint="modules are looked up in the working directory and in the installed packages",
        ) from error
    except Exception as error:
        raise TargetError(f"importing {name!r} raised {type(error).__name__}: {error}") from error


def _siblings(parent: str) -> list[str]:
    """Modules beside the one that was not found: in its package, else in the working directory."""
    paths = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else [os.getcwd()]
    return [module.name for module in pkgutil.iter_modules(paths)]


def _check_needs_nothing(text: str, model: torch.nn.Module) -> None:
    try:
        inspect.signature(model.forward).bind()
    except TypeError as error:
        raise TargetError(
            f"{text!r} gives a model without inputs, and its forward is {error}",
            hint="return (model, inputs), inputs a tuple of positional or a dict of keyword arguments",
        ) from error


def _load_exported(text: str) -> Target:
    path = Path(text)
    if not path.is_file():
        there = [str(file) for file in path.parent.glob("*.pt2")] if path.parent.is_dir() else []
        close = nearest(text, there)
        raise TargetError(f"there is no file {text!r}" + (f"; did you mean {close!r}?" if close else ""))
    import torch

    with _logged_errors("torch.export") as logged:
        try:
            program = torch.export.load(path)
        except Exception as error:
            raise _unloadable(text, logged[-1] if logged else error) from error
    if program.example_inputs is None:
        raise TargetError(f"{text!r} was saved without example inputs")
    positional, keyword = program.example_inputs
    if positional and keyword:
        raise TargetError(
            f"{text!r} was exported with positional and keyword arguments",
            hint="export it with inputs of one kind: a tuple of positional or a dict of keyword arguments",
        )
    return Target(text, program.module(), dict(keyword) if keyword else tuple(positional))


@contextmanager
def _logged_errors(name: str) -> Iterator[list[BaseException]]:
    """The exceptions that a logger writes down, in place of its writing. ``torch.export.load`` logs why
    it fails and raises something that says to read the log."""
    found: list[BaseException] = []

    class _Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                found.append(record.exc_info[1])

    logger, keep = logging.getLogger(name), _Keep()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [keep], False
    try:
        yield found
    finally:
        logger.handlers, logger.propagate = before


def _unloadable(text: str, error: BaseException) -> TargetError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    hint = "save one with torch.export.save(torch.export.export(model, inputs), path)"
    if "pytree is not registered" in why:
        hint = (
            "its inputs or outputs are of a class that a package registers with torch when it is imported; "
            "name a factory that imports the package and returns torch.export.load(path).module() and inputs"
        )
    return TargetError(f"{text!r} is not a program that this torch can load: {why}", hint=hint)


@contextmanager
def step_mode(infer: bool) -> Iterator[None]:
    """How a step runs: without gradients for ``--infer``, else as the model's mode says."""
    if not infer:
        yield
        return
    import torch

    with torch.no_grad():
        yield


def _is_module(value: object) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _described(made: object) -> str:
    if isinstance(made, tuple):
        return "a tuple of " + ", ".join(type(item).__name__ for item in made)
    return type(made).__name__
