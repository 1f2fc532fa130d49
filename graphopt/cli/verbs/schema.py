"""``graphopt schema``: the JSON Schema of pipeline files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from graphopt.cli.options import output_option

__all__ = ["command"]


@click.command("schema")
@output_option
def command(output: Path | None) -> None:
    """Write the JSON Schema of pipeline files, with the passes that are installed and their options."""
    from graphopt.atomic import write_atomically
    from graphopt.pipeline_schema import pipeline_schema
    from graphopt.plugins import default_host

    text = json.dumps(pipeline_schema(default_host()), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    write_atomically(output, text)
    click.echo(f"wrote {output}", err=True)
