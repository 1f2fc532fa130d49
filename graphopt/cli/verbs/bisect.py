"""``graphopt bisect``: the smallest set of rewrites that makes a run fail."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.options import json_option, optimize_options, target_argument
from graphopt.cli.output import talking, write_json, write_table
from graphopt.errors import InputsError

if TYPE_CHECKING:
    from graphopt.bisection import Outcome

__all__ = ["command"]

_PLACE = "{rewrites}"
_UNTESTED = 125
"""What a command exits with that cannot tell, as for `git bisect run`."""
_LONGEST = 100_000
"""Characters of names that are given as an argument; Linux takes 128 KiB."""


@click.command("bisect")
@target_argument
@optimize_options
@click.option("--rtol", type=click.FloatRange(min=0), help="Share of the largest element that may differ.")
@click.option("--state", default="", metavar="STATE", help="Go on from the state that was told before.")
@click.option("--tests", type=click.IntRange(min=1), metavar="N", help="Stop after N more tests.")
@json_option
@click.argument("run", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def command(
    target: str,
    rtol: float | None,
    state: str,
    tests: int | None,
    as_json: bool,
    run: tuple[str, ...],
    **options: Any,
) -> None:
    """Find the smallest set of rewrites of TARGET that fails.

    Without COMMAND a run fails whose outputs, buffers or gradients leave the tolerance against the model
    itself, that raises, or in which a pass is rolled back. COMMAND fails by its exit code (125: cannot tell);
    in it, {rewrites} stands for the rewrites to apply, as --rewrites of other verbs takes them.
    """
    if run and rtol is not None:
        raise click.UsageError("--rtol compares with the model itself, COMMAND by its exit code: give one")
    if run and not any(_PLACE in word for word in run):
        raise click.UsageError(f"COMMAND has to name {_PLACE}, which stands for the rewrites to apply")
    from graphopt.bisection import Bisection, Found
    from graphopt.cli.trial import Trial

    trial = Trial(target, options, rtol)
    with talking(f"planning {target}"):
        rewrites = trial.rewrites()
    layers = {rewrite.id: rewrite.layer for rewrite in rewrites}
    search = Bisection(tuple(layers), state)
    test = _command_test(run) if run else trial.outcome

    def told(some: tuple[str, ...]) -> Outcome:
        found, why = test(some)
        search_state = f"{search}{found[0]}"
        words = {"passes": "passes", "fails": "fails", "untested": "cannot be tested"}[found]
        reason = f": {why}" if why else ""
        click.echo(f"{len(some)} of {len(layers)} rewrites: {words}{reason}", err=True)
        click.echo(f"  to go on from here: --state {search_state}", err=True)
        return found

    found: Found = search.run(told, most=tests)
    if as_json:
        write_json({"target": target, "rewrites": list(found.rewrites), "complete": found.complete,
                    "tests": found.tests, "state": str(search)})  # fmt: skip
        return
    if not found.rewrites:
        click.echo("it fails without any rewrite")
        return
    click.echo(
        f"{'smallest' if found.complete else 'smallest so far'} set that fails: {len(found.rewrites)} of "
        f"{len(layers)} rewrites, {found.tests} tests",
        err=True,
    )
    write_table(("rewrite", "layer"), [(name, layers[name] or "-") for name in found.rewrites])


def _command_test(run: tuple[str, ...]) -> Callable[[tuple[str, ...]], tuple[Outcome, str]]:
    def test(some: tuple[str, ...]) -> tuple[Outcome, str]:
        with tempfile.TemporaryDirectory() as folder:
            text = ",".join(some)
            if len(text) > _LONGEST:
                listed = Path(folder) / "rewrites.txt"
                listed.write_text("\n".join(some), encoding="utf-8")
                text = f"@{listed}"
            words = [word.replace(_PLACE, text) for word in run]
            try:
                done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
            except OSError as error:
                raise InputsError(f"cannot run {run[0]!r}: {error.strerror or error}") from error
        if done.returncode == 0:
            return "passes", ""
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = "".join([f"exit code {done.returncode}", *(f": {line}" for line in last)])
        return ("untested" if done.returncode == _UNTESTED else "fails"), why

    return test
