"""Saved artefacts as targets: shown as they were saved. Nothing is planned, compiled or run."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.output import talking, write_json

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
    """The programs of an artefact in a dump format. Raises ``ArtefactError``."""
    from graphopt.api import make_session
    from graphopt.artefact.load import read_contents
    from graphopt.artefact.operators import Operators
    from graphopt.dumping import dumped
    from graphopt.plugins import default_host

    host = default_host()
    contents = read_contents(target)
    cost = make_session(contents.report.environment.device, emit="eager", pipeline=()).cost
    programs = contents.programs(Operators(host), contents.numbers())
    return dumped(contents.captured(programs), host, cost, form, stage)


def explain_artefact(target: str, *, whole: bool, top: int, output: Path | None, as_json: bool) -> None:
    """Write what holds the peak of a saved step, after its report if ``whole``. Raises ``ArtefactError``."""
    from graphopt.artefact.load import read_contents

    with talking(f"reading {target}"):
        contents = read_contents(target)
    found = contents.memory.explanation
    if output is not None:
        found.picture(output)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        report = {"report": contents.report.to_json()} if whole else {}
        write_json({"target": target, **report, **found.to_json()})
        return
    if whole:
        click.echo(f"{contents.report}\n")
    click.echo(found.text(top))
