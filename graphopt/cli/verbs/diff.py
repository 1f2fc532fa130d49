"""``graphopt diff``: two programs, or one program before and after, call by call and layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.options import optimize_options, output_option
from graphopt.cli.output import talking, write_json
from graphopt.errors import TargetError, nearest

if TYPE_CHECKING:
    from graphopt.dump.difference import Difference
    from graphopt.dump.rows import Side

__all__ = ["command"]

_STAGES = ("captured", "semantic", "captured-joint", "joint", "captured-final", "final")
_LEVELS = {"captured": "semantic", "semantic": "semantic", "captured-joint": "joint", "joint": "joint"}


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@optimize_options
@click.option(
    "--format",
    "-f",
    "form",
    type=click.Choice(["text", "html"]),
    default="text",
    show_default=True,
    help="Lines, or a page with both graphs side by side.",
)
@output_option
@click.option("--exit-code", is_flag=True, help="Exit with 1 where they differ.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of text.")
def command(
    a: str,
    b: str,
    form: str,
    output: Path | None,
    exit_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare A with B: each a TARGET@STAGE or a file that `graphopt dump -f json` wrote.

    STAGE: captured, captured-joint or captured-final (no pass, no budget), semantic (the default), joint or
    final (with passes, under --budget).
    """
    # What cannot be read is said before any model is captured.
    asked = [_asked(text) for text in (a, b)]
    from graphopt.atomic import write_atomically
    from graphopt.dump.difference import difference
    from graphopt.dump.difference_page import difference_page

    sides = [_side(text, target, stage, options) for text, (target, stage) in zip((a, b), asked, strict=True)]
    found = difference(sides[0], sides[1])
    text = difference_page(found) if form == "html" else str(found) + "\n"
    if output is not None:
        write_atomically(output, text)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        write_json(_json(found))
    elif output is None:
        click.echo(text, nl=False)
    if exit_code and found.differs:
        click.get_current_context().exit(1)


def _asked(text: str) -> tuple[str, str]:
    """Target and stage; a file has no stage. Raises ``TargetError``."""
    if text.endswith(".json"):
        if not Path(text).is_file():
            raise TargetError(f"there is no file {text!r}", hint="write one with graphopt dump -f json")
        return text, ""
    target, _, stage = text.partition("@")
    stage = stage or "semantic"
    if stage not in _STAGES:
        close = nearest(stage, _STAGES)
        raise TargetError(
            f"unknown stage {stage!r} of {target!r}" + (f"; did you mean {close!r}?" if close else ""),
            hint=f"known: {', '.join(_STAGES)}",
        )
    return target, stage


def _side(label: str, target: str, stage: str, options: dict[str, Any]) -> Side:
    from graphopt.api import dry_run, optimize
    from graphopt.cli.target import load_loss, load_target, step_mode
    from graphopt.dump.rows import Side, read_programs, rows_of

    if not stage:
        return Side(label, read_programs(Path(target).read_text(encoding="utf-8"), target))
    given = {name: value for name, value in options.items() if name not in ("infer", "loss")}
    given["loss_fn"] = load_loss(options["loss"])
    if stage.startswith("captured"):
        given |= {"pipeline": (), "budget": None, "allow": ()}
    with step_mode(options["infer"]), talking(f"capturing {label}"):
        loaded = load_target(target)
        if stage in _LEVELS:
            made = dry_run(loaded.model, loaded.inputs, given, "diff")
        else:
            made = optimize(loaded.model, loaded.inputs, **given)
        level = _LEVELS.get(stage, "lowered")
        cost = made.cost_model
        programs = tuple(
            rows for program in made.programs if program.level == level for rows in rows_of(program, cost)
        )
    predicted = made.plan.predicted
    return Side(label, programs, predicted.peak_bytes, predicted.seconds, capture=target)


def _json(found: Difference) -> dict[str, Any]:
    def row(change_row: Any) -> Any:
        return None if change_row is None else f"{change_row.name} = {change_row.call} : {change_row.type}"

    return {
        "schema": "graphopt/diff@1",
        "a": found.a.label,
        "b": found.b.label,
        "peak_bytes": [found.a.peak_bytes, found.b.peak_bytes],
        "seconds": [found.a.seconds, found.b.seconds],
        "programs": [
            {
                "name": program.name,
                "calls": list(program.calls),
                "same": program.same,
                "outputs": list(program.outputs),
                "layers": [
                    {
                        "layer": layer.layer,
                        "calls": list(layer.calls),
                        "seconds": layer.seconds,
                        "flops": layer.flops,
                        "bytes": layer.bytes,
                        "changes": [
                            {
                                "kind": change.kind,
                                "before": row(change.before),
                                "after": row(change.after),
                                "detail": change.detail,
                                "replaces": list(change.replaces),
                            }
                            for change in layer.changes
                        ],
                    }
                    for layer in program.layers
                ],
            }
            for program in found.programs
        ],
    }
