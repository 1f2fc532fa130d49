"""``graphopt new-plugin``: a plugin to start from."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command("new-plugin")
@click.argument("name")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Where to write it (default: here).",
)
def command(name: str, folder: Path) -> None:
    """Write a plugin NAME: a project with a pass, its entry point and a test."""
    from graphopt.plugins.scaffold import new_plugin

    target = new_plugin(name, folder)
    click.echo(f"wrote {target}", err=True)
    click.echo(f"cd {target} && pip install -e . && graphopt plugins --check && pytest")
