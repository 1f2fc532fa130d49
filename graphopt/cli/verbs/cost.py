"""``graphopt cost``: what one step of a target takes as it is, by the cost model."""

from __future__ import annotations

from dataclasses import asdict

import click

from graphopt.cli.options import json_option, plan_options, target_argument
from graphopt.cli.output import talking, write_json, write_table

__all__ = ["command"]


@click.command("cost")
@target_argument
@plan_options
@json_option
def command(target: str, device: str | None, loss: str | None, emit: str, infer: bool, as_json: bool) -> None:
    """Say what one step of TARGET takes as it is."""
    from graphopt.api import plan
    from graphopt.budget import format_bytes
    from graphopt.cli.target import load_loss, load_target, step_mode
    from graphopt.duration import format_seconds

    with step_mode(infer), talking(f"capturing {target}"):
        loaded = load_target(target)
        planned = plan(
            loaded.model, loaded.inputs, pipeline=(), device=device, emit=emit, loss_fn=load_loss(loss)
        )
    cost = planned.baseline
    if as_json:
        write_json({"target": target, "device": planned.device, "emit": planned.emit, **asdict(cost)})
        return
    rows = [
        ("peak", format_bytes(cost.peak_bytes), f"{cost.peak_bytes} B"),
        ("weights", format_bytes(cost.weight_bytes), f"{cost.weight_bytes} B"),
        ("time", format_seconds(cost.seconds) if cost.seconds is not None else "not known", ""),
        ("FLOPs", f"{cost.flops:,}" if cost.flops is not None else "not known", ""),
    ]
    write_table(
        ("one step", f"on {planned.device}", "exactly"), rows, right=(f"on {planned.device}", "exactly")
    )
