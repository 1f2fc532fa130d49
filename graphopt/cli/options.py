"""The flags that verbs share, spelled as the arguments of ``graphopt.optimize``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "NEW_FILE",
    "OLD_FILE",
    "PICTURE_FILE",
    "inference_options",
    "json_option",
    "optimize_options",
    "output_option",
    "pipeline_option",
    "plan_options",
    "policy_option",
    "rewrites_option",
    "step_options",
    "target_argument",
    "write_options",
]

F = TypeVar("F", bound=Callable[..., Any])


class _NewFile(click.Path):
    """A file that can be written; a folder that is missing is said before any work is done for it.

    ``suffix``: what its name ends in, where it ends in anything.
    """

    def __init__(self, suffix: str = "") -> None:
        super().__init__(dir_okay=False)
        self._suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder '{path.parent}' to write {path.name} into", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"folder '{path.parent}' cannot be written to", param, ctx)
        if self._suffix and path.suffix.lower() not in ("", self._suffix):
            self.fail(f"cannot write {path.name}: the file is {self._suffix[1:].upper()}", param, ctx)
        return path


class _NewFolder(click.Path):
    """A folder that is not there yet, or is empty."""

    def __init__(self) -> None:
        super().__init__(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder '{path.parent}' to make {path.name} in", param, ctx)
        if path.is_dir() and any(path.iterdir()):
            self.fail(f"folder '{path}' is not empty: give one that is, or a new name", param, ctx)
        return path


NEW_FILE = _NewFile()
NEW_FOLDER = _NewFolder()
PICTURE_FILE = _NewFile(".svg")
OLD_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)

target_argument = click.argument("target", metavar="TARGET")
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON instead of text.")
pipeline_option = click.option(
    "--pipeline", "-p", metavar="PIPELINE", help="A preset, a .yaml file, or pass,pass{option=value}."
)
rewrites_option = click.option(
    "--rewrites", metavar="NAMES", help="Apply these alone: a,b or @FILE with one a line."
)
policy_option = click.option(
    "--policy", metavar="NAME", help="Who picks within the budget (default: the planner, the fastest)."
)
output_option = click.option("--output", "-o", type=NEW_FILE, help="Write to this file.")

_STEP = (
    click.option(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="Function from the model's output to the loss of a training step.",
    ),
    click.option(
        "--infer",
        is_flag=True,
        help="The step is a forward without gradients, whatever mode the model is in.",
    ),
)
_DEVICE = click.option("--device", metavar="NAME", help="Predict for this device (default: the model's own).")
_SHARED = (_DEVICE, *_STEP)
_EMIT = click.option(
    "--emit",
    type=click.Choice(["auto", "eager", "inductor"]),
    default="auto",
    show_default=True,
    help="Code generator.",
)
_CHOOSING = (
    click.option(
        "--budget",
        metavar="BYTES",
        help="Bound on the peak of a step: 8GiB, 512MiB, 60%.",
    ),
    pipeline_option,
    click.option("--allow", multiple=True, metavar="PASS", help="Allow a lossy pass; may be repeated."),
)


def plan_options(command: F) -> F:
    """``--device``, ``--loss``, ``--emit``, ``--infer``."""
    command = _EMIT(command)
    for option in reversed(_SHARED):
        command = option(command)
    return command


def write_options(command: F) -> F:
    """``--device``, ``--loss``, ``--infer``, ``--budget``, ``--pipeline``, ``--allow``: for verbs that are
    code
    generators themselves."""
    for option in reversed((*_CHOOSING, *_SHARED)):
        command = option(command)
    return command


def step_options(command: F) -> F:
    """As ``optimize_options``, without ``--device``: for verbs that run on a device rather than predict."""
    command = _EMIT(command)
    for option in reversed((*_CHOOSING, *_STEP)):
        command = option(command)
    return command


def inference_options(command: F) -> F:
    """As ``optimize_options``, without ``--loss`` and ``--infer``: for verbs that run forwards alone."""
    command = _EMIT(command)
    for option in reversed((*_CHOOSING, _DEVICE)):
        command = option(command)
    return command


def optimize_options(command: F) -> F:
    """``plan_options`` and ``--budget``, ``--pipeline``, ``--allow``."""
    command = plan_options(command)
    for option in reversed(_CHOOSING):
        command = option(command)
    return command
