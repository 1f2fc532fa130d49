"""``graphopt plugins``: who is installed, and what is wrong with them."""

from __future__ import annotations

from dataclasses import asdict

import click

from graphopt.cli.options import json_option
from graphopt.cli.output import write_json, write_table
from graphopt.plugins import default_host

__all__ = ["command"]


@click.command("plugins")
@click.option("--check", is_flag=True, help="Ask every hook of every plugin; exit 1 if one fails.")
@json_option
@click.pass_context
def command(ctx: click.Context, check: bool, as_json: bool) -> None:
    """List plugins and what is wrong with them."""
    host = default_host()
    records = host.check() if check else host.records()
    if as_json:
        write_json([asdict(record) for record in records])
    else:
        write_table(
            ("plugin", "distribution", "version", "status", "hooks"),
            [(r.name, r.distribution, r.version, r.status, ", ".join(r.hooks) or "-") for r in records],
        )
    for record in records:
        if record.error:
            click.echo(f"graphopt: plugin {record.name!r} ({record.status}): {record.error}", err=True)
        for slow in record.slow:
            click.echo(f"graphopt: plugin {record.name!r}: {slow}", err=True)
    if check and any(record.status in ("failed", "incompatible") for record in records):
        ctx.exit(1)
