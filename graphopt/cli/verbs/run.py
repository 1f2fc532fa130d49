"""``graphopt run``: optimize a target, run one step, report predicted and measured."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.options import (
    NEW_FILE,
    OLD_FILE,
    json_option,
    optimize_options,
    policy_option,
    rewrites_option,
    target_argument,
)
from graphopt.cli.output import talking, write_json

__all__ = ["command"]


@click.command("run")
@target_argument
@optimize_options
@rewrites_option
@policy_option
@click.option(
    "--verify",
    type=click.Choice(["off", "structure", "numeric"]),
    default="structure",
    show_default=True,
    help="What to check of each rewritten program.",
)
@click.option(
    "--plan", "plan_file", type=OLD_FILE, help="Replay the plan in this file instead of choosing one."
)
@click.option("--save-plan", type=NEW_FILE, help="Write the plan to this file.")
@json_option
def command(
    target: str,
    budget: str | None,
    pipeline: str | None,
    allow: tuple[str, ...],
    device: str | None,
    loss: str | None,
    emit: str,
    infer: bool,
    rewrites: str | None,
    policy: str | None,
    verify: str,
    plan_file: Path | None,
    save_plan: Path | None,
    as_json: bool,
) -> None:
    """Optimize TARGET, run one step and report what it took."""
    from graphopt.api import optimize
    from graphopt.cli.rewrites import named_rewrites
    from graphopt.cli.target import load_loss, load_target, step_mode
    from graphopt.plans import Plan

    with step_mode(infer), talking(f"optimizing {target}"):
        loaded = load_target(target)
        optimized = optimize(
            loaded.model,
            loaded.inputs,
            budget=budget,
            allow=allow,
            pipeline=pipeline,
            emit=emit,
            verify=verify,
            device=device,
            loss_fn=load_loss(loss),
            rewrites=named_rewrites(rewrites),
            policy=policy,
            plan=Plan.load(plan_file) if plan_file is not None else None,
        )
    with step_mode(infer), talking("running one step"):
        optimized.measure(loaded.inputs)
    report = optimized.report
    if save_plan is not None:
        optimized.plan.save(save_plan)
        click.echo(f"wrote {save_plan}", err=True)
    if as_json:
        write_json(report.to_json())
    else:
        click.echo(str(report))
