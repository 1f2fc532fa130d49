"""``graphopt repro``: a folder that reproduces a failure with one command."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click

from graphopt.cli.options import json_option, optimize_options, rewrites_option, target_argument
from graphopt.cli.output import talking, write_json

__all__ = ["command"]


@click.command("repro")
@target_argument
@optimize_options
@rewrites_option
@click.option("--rtol", type=click.FloatRange(min=0), help="Share of the largest element that may differ.")
@click.option("--weights", is_flag=True, help="Keep the values of weights and inputs.")
@click.option("--output", "-o", type=click.Path(path_type=Path, file_okay=False), help="The folder to write.")
@json_option
def command(
    target: str,
    rewrites: str | None,
    rtol: float | None,
    weights: bool,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a folder that reproduces a failure of TARGET, or applies the rewrites that --rewrites names.

    Without --rewrites the smallest set that fails is looked for, as `graphopt bisect` does. The folder is run
    before it is kept.
    """
    from graphopt.bisection import Bisection
    from graphopt.cli.repro_folder import ReproError, write_folder
    from graphopt.cli.rewrites import named_rewrites
    from graphopt.cli.trial import Trial

    # Before any work is done for it.
    if output is not None and output.exists():
        raise ReproError(f"{output} is there already", hint="name another folder with -o, or remove it")
    trial = Trial(target, options, rtol)
    named = named_rewrites(rewrites)
    if named is None:
        with talking(f"looking for what makes {target} fail"):
            whole = Bisection(tuple(rewrite.id for rewrite in trial.rewrites()))
            named = whole.run(lambda some: trial.outcome(some)[0]).rewrites
    with talking(f"running {target}"):
        ran = trial.run(named)
    gone = sorted(set(named) - (ran.chosen if ran.chosen is not None else set(named)))
    if gone:
        raise ReproError(
            f"rewrites that are not applied to {target}: {', '.join(gone)}",
            hint="report.rewrites has those that are; some are there only together with others",
        )
    if output is None:
        digest = hashlib.sha256("\n".join((target, *named, ran.why)).encode()).hexdigest()[:8]
        output = Path(f"graphopt-repro-{digest}")
    with talking(f"writing {output}"):
        made = write_folder(
            output.absolute(), trial, named, fails=ran.outcome == "fails", why=ran.why, weights=weights
        )
    if made.note:
        click.echo(f"graphopt: the model is not in the folder: {made.note}", err=True)
    run = f"cd {output} && python repro.py"
    if as_json:
        write_json({"folder": str(output), "run": run, "rewrites": list(named), "passes": list(made.passes),
                    "alone": made.alone, "said": made.said})  # fmt: skip
        return
    click.echo(f"wrote {output}: {made.said}", err=True)
    click.echo(run)
