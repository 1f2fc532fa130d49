"""``graphopt pareto``: the frontier of peak bytes against time, as data and as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.options import (
    PICTURE_FILE,
    json_option,
    pipeline_option,
    plan_options,
    target_argument,
)
from graphopt.cli.output import talking, write_json, write_table

__all__ = ["command"]


@click.command("pareto")
@target_argument
@plan_options
@pipeline_option
@click.option("--output", "-o", type=PICTURE_FILE, help="Draw the curve into this SVG file.")
@json_option
def command(
    target: str,
    device: str | None,
    loss: str | None,
    emit: str,
    infer: bool,
    pipeline: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show peak bytes against time of TARGET."""
    from graphopt.api import pareto
    from graphopt.budget import format_bytes
    from graphopt.cli.target import load_loss, load_target, step_mode
    from graphopt.duration import format_seconds

    with step_mode(infer), talking(f"searching the frontier of {target}"):
        loaded = load_target(target)
        found = pareto(
            loaded.model,
            loaded.inputs,
            pipeline=pipeline,
            device=device,
            emit=emit,
            loss_fn=load_loss(loss),
        )
    if output is not None:
        found.picture(output)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        write_json(found.to_json())
        return
    rows = [(format_bytes(p.peak_bytes), format_seconds(p.seconds), p.label) for p in found.points]
    write_table(("peak", "time", "plan"), rows, right=("peak", "time"))
