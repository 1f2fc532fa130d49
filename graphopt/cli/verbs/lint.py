"""``graphopt lint``: everything that is wrong with pipeline files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from graphopt.cli.options import OLD_FILE, json_option
from graphopt.cli.output import write_json

__all__ = ["command"]


@click.command("lint")
@click.argument("files", metavar="PIPELINE.yaml...", type=OLD_FILE, nargs=-1, required=True)
@json_option
def command(files: tuple[Path, ...], as_json: bool) -> None:
    """Say what is wrong with pipeline files; exit with 1 if anything is."""
    from graphopt.pipeline_lint import lint_pipeline
    from graphopt.plugins import default_host

    found = [(file, problem) for file in files for problem in lint_pipeline(file, default_host())]
    if as_json:
        write_json([{"file": str(file), **asdict(problem)} for file, problem in found])
    else:
        for file, p in found:
            click.echo(f"{file}:{p.line}:{p.column}: {p.message} [{p.code}]")
        click.echo(f"{len(found)} problems in {len(files)} files" if found else "nothing is wrong", err=True)
    if found:
        click.get_current_context().exit(1)
