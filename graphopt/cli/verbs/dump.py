"""``graphopt dump``: the graphs of a target, rewritten for a budget, in one of the dump formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.options import (
    NEW_FOLDER,
    json_option,
    optimize_options,
    output_option,
    policy_option,
    rewrites_option,
    target_argument,
)
from graphopt.cli.output import talking, write_json
from graphopt.errors import UnknownNameError
from graphopt.plugins import default_host

if TYPE_CHECKING:
    from graphopt.cli.target import Target
    from graphopt.dump.between import BetweenPasses
    from graphopt.plugins.records import DumpFormat
    from graphopt.program import Program

__all__ = ["command"]


@click.command("dump")
@target_argument
@optimize_options
@rewrites_option
@policy_option
@click.option(
    "--stage",
    type=click.Choice(["semantic", "joint", "final"]),
    default="final",
    show_default=True,
    help="How far down the way to code.",
)
@click.option(
    "--format",
    "-f",
    "form",
    default="text",
    show_default=True,
    help="text, json, py, html, dot, svg, mlir, mlir-linalg; a plugin's.",
)
@click.option("--print-before", multiple=True, metavar="PASS", help="Print programs before a pass; or all.")
@click.option("--print-after", multiple=True, metavar="PASS", help="Print programs after a pass; or all.")
@click.option("--print-after-change", is_flag=True, help="Print programs after each pass that changed them.")
@click.option(
    "--tree-dir",
    type=NEW_FOLDER,
    metavar="DIR",
    help="Write these programs into a new folder instead; alone: after each change.",
)
@output_option
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
    stage: str,
    form: str,
    print_before: tuple[str, ...],
    print_after: tuple[str, ...],
    print_after_change: bool,
    tree_dir: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write the graphs of TARGET, rewritten, as text, JSON, Python, HTML, DOT, SVG or MLIR.

    What is printed on the way goes to stderr, as text, so that stdout is the dump.
    """
    from graphopt.api import optimize
    from graphopt.cli.artefact import artefact_only, dump_artefact
    from graphopt.cli.rewrites import named_rewrites
    from graphopt.cli.target import load_loss, load_target, step_mode

    known = default_host().formats()
    if form not in known:
        raise UnknownNameError("dump format", form, known)
    if artefact_only(target):
        with talking(f"reading {target}"):
            text = dump_artefact(target, form, stage)
        _write(text, target, stage, form, output, as_json)
        return
    changes = print_after_change or (tree_dir is not None and not print_before and not print_after)
    tree = None if tree_dir is None else (tree_dir, known[form])
    watcher = _watcher(print_before, print_after, changes, tree)
    with step_mode(infer), talking(f"rewriting {target}"):
        loaded = load_target(target)
        options: dict[str, Any] = {"emit": emit, "device": device, "loss_fn": load_loss(loss)}
        beside = _as_captured(loaded, options) if known[form].write_all is not None else ()
        if watcher is not None:
            options["plugins"] = (watcher,)
        optimized = optimize(
            loaded.model,
            loaded.inputs,
            budget=budget,
            allow=allow,
            pipeline=pipeline,
            rewrites=named_rewrites(rewrites),
            policy=policy,
            **options,
        )
        text = optimized.dump(format=form, stage=stage, beside=beside)
    if watcher is not None and watcher.failure is not None:
        raise watcher.failure
    if tree_dir is not None:
        click.echo(f"wrote {len(list(tree_dir.iterdir()))} programs into {tree_dir}", err=True)
    _write(text, target, stage, form, output, as_json)


def _watcher(
    before: Sequence[str], after: Sequence[str], changes: bool, tree: tuple[Path, DumpFormat] | None
) -> BetweenPasses | None:
    """What writes programs between passes, if any are asked for. Raises ``UnknownNameError`` for a pass."""
    from graphopt.dump.between import EVERY, BetweenPasses, Tree

    passes = default_host().passes()
    for name in (*before, *after):
        if name != EVERY and name not in passes:
            raise UnknownNameError("pass", name, (*passes, EVERY))
    if not (before or after or changes):
        return None
    write = _print if tree is None else Tree(*tree).write
    return BetweenPasses(write, before=before, after=after, changes=changes)


def _print(when: str, name: str, program: Program) -> None:
    from graphopt.dump.text import program_text

    click.echo(f"# {when} {name}\n{program_text(program)}", err=True)


def _as_captured(target: Target, options: Mapping[str, Any]) -> Sequence[Program]:
    """The programs of a target without passes, for formats that show several."""
    from graphopt.api import dry_run

    return dry_run(target.model, target.inputs, {"pipeline": (), **options}, "dump").programs


def _write(text: str, target: str, stage: str, form: str, output: Path | None, as_json: bool) -> None:
    from graphopt.atomic import write_atomically

    if output is not None:
        write_atomically(output, text)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        write_json({"target": target, "stage": stage, "format": form, "text": text})
    elif output is None:
        click.echo(text, nl=not text.endswith("\n"))
