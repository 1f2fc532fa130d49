"""``graphopt emit``: a target, rewritten for a budget, as Python and Triton that run without graphopt."""

from __future__ import annotations

import os
from pathlib import Path

import click

from graphopt.cli.options import json_option, target_argument, write_options
from graphopt.cli.output import talking, write_json

__all__ = ["command"]


@click.command("emit")
@target_argument
@write_options
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write; one that this verb wrote is replaced.",
)
@json_option
def command(
    target: str,
    budget: str | None,
    pipeline: str | None,
    allow: tuple[str, ...],
    device: str | None,
    loss: str | None,
    infer: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Write TARGET, rewritten, as Python and Triton that run without graphopt.

    The folder holds program.py, its kernels, the weights and one recorded example. `python program.py
    --check` runs
    the example and compares; `from program import load` gives a module.
    """
    from graphopt.api import optimize
    from graphopt.cli.target import load_loss, load_target, step_mode
    from graphopt_kernels.emit.write import write_program

    folder = Path(os.path.normpath(output))
    if not folder.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder '{folder.parent}' to write {folder.name} into")
    with step_mode(infer), talking(f"rewriting {target}"):
        loaded = load_target(target)
        optimized = optimize(
            loaded.model,
            loaded.inputs,
            budget=budget,
            allow=allow,
            pipeline=pipeline,
            emit="eager",
            dynamic_shapes=False,
            device=device,
            loss_fn=load_loss(loss),
        )
        emitted = write_program(optimized, loaded.inputs, folder.absolute(), target)
    if as_json:
        write_json(
            {
                "target": target,
                "directory": str(folder),
                "kernels": emitted.kernels,
                "files": emitted.files,
                "calls": emitted.calls,
            }
        )
    else:
        click.echo(
            f"wrote {folder}: a step is {emitted.kernels} launches of {emitted.files} kernels and "
            f"{emitted.calls} calls of ATen"
        )
