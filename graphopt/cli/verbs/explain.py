"""``graphopt explain``: what holds the peak of a step, of a target as it is and as planned; or its layers."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.options import PICTURE_FILE, json_option, optimize_options, target_argument
from graphopt.cli.output import talking, write_json

__all__ = ["command"]


@click.command("explain")
@target_argument
@optimize_options
@click.option("--memory", is_flag=True, help="What is alive at the peak, and where that is.")
@click.option("--layers", is_flag=True, help="Layers of a decoder: what makes keys and values, what is read.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=4096,
    show_default=True,
    help="Positions of a sequence, for --layers.",
)
@click.option("--top", type=click.IntRange(min=1), default=12, show_default=True, help="Values to list.")
@click.option("--output", "-o", type=PICTURE_FILE, help="Draw memory over the step into this SVG file.")
@json_option
def command(
    target: str,
    device: str | None,
    loss: str | None,
    emit: str,
    infer: bool,
    budget: str | None,
    pipeline: str | None,
    allow: tuple[str, ...],
    memory: bool,
    layers: bool,
    max_tokens: int,
    top: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Explain what holds the peak of TARGET, or which layers it has; of an artefact, what was saved."""
    from graphopt.cli.artefact import artefact_only, explain_artefact

    if artefact_only(target):
        if layers:
            raise click.UsageError("an artefact holds programs, not a model whose layers could be looked at")
        explain_artefact(target, whole=not memory, top=top, output=output, as_json=as_json)
        return
    if memory == layers:
        raise click.UsageError("say what to explain: one of --memory and --layers")
    if layers:
        _explain_layers(target, max_tokens, as_json)
        return
    from graphopt.api import explain_memory
    from graphopt.cli.target import load_loss, load_target, step_mode

    with step_mode(infer), talking(f"planning {target}"):
        loaded = load_target(target)
        found = explain_memory(
            loaded.model,
            loaded.inputs,
            budget=budget,
            pipeline=pipeline,
            allow=allow,
            device=device,
            emit=emit,
            loss_fn=load_loss(loss),
        )
    if output is not None:
        found.picture(output)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        write_json({"target": target, **found.to_json()})
        return
    click.echo(found.text(top))


def _explain_layers(target: str, max_tokens: int, as_json: bool) -> None:
    from graphopt.cli.target import load_target
    from graphopt.decoding.structure import explain_layers

    with talking(f"capturing {target}"):
        loaded = load_target(target)
        found = explain_layers(loaded.model, loaded.inputs, max_tokens=max_tokens)
    if as_json:
        write_json({"target": target, **found.to_json()})
        return
    click.echo(found.text())
