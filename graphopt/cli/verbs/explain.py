"""``graphopt explain``: what was rewritten for what, what was not and why, what holds the peak; or layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphopt.cli.options import PICTURE_FILE, json_option, optimize_options, target_argument
from graphopt.cli.output import talking, write_json

if TYPE_CHECKING:
    from graphopt.report import Report

__all__ = ["command"]


@click.command("explain")
@target_argument
@optimize_options
@click.option("--memory", is_flag=True, help="Only what is alive at the peak, and where that is.")
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
    """Explain what TARGET becomes: what each rewrite buys, what was not done and why, what holds the peak.

    Nothing is compiled. --memory explains the peak alone, --layers which layers a decoder has; of an artefact
    it is what was saved.
    """
    from graphopt.cli.artefact import artefact_only, explain_artefact

    if artefact_only(target):
        if layers:
            raise click.UsageError("an artefact holds programs, not a model whose layers could be looked at")
        explain_artefact(target, whole=not memory, top=top, output=output, as_json=as_json)
        return
    if memory and layers:
        raise click.UsageError("--memory and --layers explain different things: give one of them")
    if layers:
        _explain_layers(target, max_tokens, as_json)
        return
    from graphopt.api import dry_run
    from graphopt.cli.target import load_loss, load_target, step_mode

    with step_mode(infer), talking(f"planning {target}"):
        loaded = load_target(target)
        options = {
            "budget": budget,
            "pipeline": pipeline,
            "allow": allow,
            "device": device,
            "emit": emit,
            "loss_fn": load_loss(loss),
        }
        planned = dry_run(loaded.model, loaded.inputs, options, "explain")
        found = planned.explain_memory()
    if output is not None:
        found.picture(output)
        click.echo(f"wrote {output}", err=True)
    report = None if memory else planned.report
    if as_json:
        told = {} if report is None else {"report": report.to_json()}
        write_json({"target": target, **told, **found.to_json()})
        return
    if report is not None:
        click.echo("\n".join(_told(report)))
    click.echo(found.text(top))


def _told(report: Report) -> Iterator[str]:
    """The report, and in full what it shows the beginning of."""
    from graphopt.report_table import rewrite_lines, undone_lines

    yield f"{report}\n"
    for title, lines in (
        ("what each rewrite buys (predicted)", rewrite_lines(report)),
        ("what was not done, and why", undone_lines(report, None)),
    ):
        yield title
        yield from (f"  {line}" for line in lines or ["nothing"])
        yield ""


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
