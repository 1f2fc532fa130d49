"""The flags that verbs share, spelled as the arguments of ``graphopt.optimize``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "json_option",
    "optimize_options",
    "output_option",
    "pipeline_option",
    "plan_options",
    "target_argument",
]

F = TypeVar("F", bound=Callable[..., Any])

target_argument = click.argument("target", metavar="TARGET")
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON instead of text.")
pipeline_option = click.option(
    "--pipeline", "-p", metavar="PIPELINE", help="A preset, a .yaml file, or pass,pass{option=value}."
)
output_option = click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file."
)

_SHARED = (
    click.option("--device", metavar="NAME", help="Predict for this device (default: the model's own)."),
    click.option(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="Function from the model's output to the loss of a training step.",
    ),
    click.option(
        "--emit",
        type=click.Choice(["auto", "eager", "inductor"]),
        default="auto",
        show_default=True,
        help="Code generator.",
    ),
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
    """``--device``, ``--loss``, ``--emit``."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


def optimize_options(command: F) -> F:
    """``plan_options`` and ``--budget``, ``--pipeline``, ``--allow``."""
    command = plan_options(command)
    for option in reversed(_CHOOSING):
        command = option(command)
    return command
