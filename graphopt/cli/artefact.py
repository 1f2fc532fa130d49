"""Saved artefacts as targets: shown as they were saved. Nothing is planned, compiled or run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.output import talking, write_json

if TYPE_CHECKING:
    from graphopt.artefact.contents import StepContents

__all__ = ["artefact_only", "dump_artefact", "explain_artefact"]

_SHOWN = ("target", "stage", "form", "output", "as_json", "memory", "layers", "top", "max_tokens")


def artefact_only(target: str) -> bool:
    """Whether ``target`` is a saved artefact. Raises ``click.UsageError`` for flags that would plan anew."""
    from graphopt.artefact.folder import is_artefact

    if ":" in target or not is_artefact(target):
        return False
    context = click.get_current_context()
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _SHOWN and source is not click.core.ParameterSource.DEFAULT:
            flag = name.replace("_", "-")
            raise click.UsageError(f"{target} is shown as it was saved: --{flag} is for what is planned here")
    return True


def dump_artefact(target: str, form: str, stage: str) -> str:
    """The programs of all steps of an artefact in a dump format. Raises ``ArtefactError``."""
    from graphopt.api import make_session
    from graphopt.artefact.contents import read_contents
    from graphopt.artefact.operators import Operators
    from graphopt.dumping import dumped
    from graphopt.plugins import default_host

    host = default_host()
    contents = read_contents(target)
    device = contents.steps[-1].report.environment.device
    cost = make_session(device, emit="eager", pipeline=()).cost
    operators = Operators(host)
    group = [
        captured
        for step in contents.steps
        for captured in step.captured(step.programs(operators, step.numbers()))
    ]
    return dumped(group, host, cost, form, stage)


def explain_artefact(target: str, *, whole: bool, top: int, output: Path | None, as_json: bool) -> None:
    """Write what holds the peak of each saved step, after its report if ``whole``; ``output``: a picture of
    the last. Raises ``ArtefactError``."""
    from graphopt.artefact.contents import read_contents

    with talking(f"reading {target}"):
        contents = read_contents(target)
    last = contents.steps[-1]
    if output is not None:
        last.memory.explanation.picture(output)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        told = [_explained(step, whole) for step in contents.steps]
        write_json({"target": target, **told[-1], "earlier": told[:-1]})
        return
    for step in contents.steps:
        if len(contents.steps) > 1:
            click.echo(f"{step.name}\n")
        if whole:
            click.echo(f"{step.report}\n")
        click.echo(step.memory.explanation.text(top) + ("" if step is last else "\n"))


def _explained(step: StepContents, whole: bool) -> dict[str, Any]:
    report = {"report": step.report.to_json()} if whole else {}
    return {"step": step.name, **report, **step.memory.explanation.to_json()}
