"""``graphopt bench``: a target as it is, optimized, and as others make it, side by side."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.options import json_option, optimize_options, rewrites_option, target_argument
from graphopt.cli.output import talking, write_json, write_table

if TYPE_CHECKING:
    from graphopt.bench import BenchRow, Contender

__all__ = ["command"]


@click.command("bench")
@target_argument
@optimize_options
@rewrites_option
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="PEER",
    help="Compare with this too: torch.compile (the default), torch.compile:MODE, or NAME=MODULE:FUNCTION, a "
    "function from the model to what is called in its place; `none` for none. May be repeated.",
)
@click.option("--warmup", type=click.IntRange(min=1), default=3, show_default=True, help="Steps before.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Steps timed.")
@json_option
def command(
    target: str,
    loss: str | None,
    infer: bool,
    rewrites: str | None,
    peers: tuple[str, ...],
    warmup: int,
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a step of TARGET as it is, optimized, and as peers make it."""
    import torch

    import graphopt
    from graphopt.bench import Contender, bench
    from graphopt.cli.rewrites import named_rewrites
    from graphopt.cli.target import load_loss, load_target, step_mode

    others = [_peer(name) for name in peers or ("torch.compile",) if name != "none"]
    loss_fn, named = load_loss(loss), named_rewrites(rewrites)

    def load() -> tuple[Any, Any]:
        loaded = load_target(target)
        return loaded.model, loaded.inputs

    def optimized(model: Any, inputs: Any) -> Any:
        return graphopt.optimize(model, inputs, loss_fn=loss_fn, rewrites=named, **options)

    contenders = [
        Contender("eager", lambda model, inputs: model),
        Contender("graphopt", optimized, lambda made: made.launching()),
        *others,
    ]
    rows = []
    with step_mode(infer), talking(f"measuring {target}"):
        for row in bench(contenders, load, loss_fn=loss_fn, warmup=warmup, repeats=repeats):
            rows.append(row)
            if row.failed:
                click.echo(f"graphopt: {row.name} failed: {row.failed}", err=True)
    if as_json:
        on = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        write_json({
            "schema": "graphopt/bench@1",
            "command": ["graphopt", *sys.argv[1:]],
            "target": target,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": on,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "graphopt": graphopt.__version__,
            "warmup": warmup,
            "repeats": repeats,
            "rows": [asdict(row) for row in rows],
        })  # fmt: skip
    else:
        heads = ("version", "time", "spread", "of eager", "peak", "of eager", "first step", "difference")
        write_table(heads, _cells(rows), right=heads[1:])
    if any(row.failed for row in rows if row.name == "graphopt"):
        click.get_current_context().exit(1)


def _peer(text: str) -> Contender:
    from graphopt.bench import Contender, peer
    from graphopt.cli.target import import_object
    from graphopt.errors import TargetError

    name, equals, place = text.partition("=")
    if not equals:
        return peer(name)
    function = import_object(place, "peer")
    if not callable(function):
        raise TargetError(f"peer {place!r} is {type(function).__name__}, not a function of the model")
    return Contender(name, lambda model, inputs: function(model))


def _cells(rows: list[BenchRow]) -> list[tuple[str, ...]]:
    from graphopt.budget import format_bytes
    from graphopt.duration import format_seconds

    base = rows[0]
    found: list[tuple[str, ...]] = []
    for row in rows:
        if row.seconds is None or row.peak_bytes is None or base.seconds is None or base.peak_bytes is None:
            found.append((row.name, "failed", *("",) * 6))
            continue
        found.append((
            row.name,
            format_seconds(row.seconds),
            "-" if row.spread is None else f"{100 * row.spread:.0f} %",
            f"{row.seconds / base.seconds:.2f} x",
            format_bytes(row.peak_bytes),
            f"{100 * row.peak_bytes / base.peak_bytes:.1f} %",
            format_seconds(row.first_seconds),
            "-" if row.difference is None else f"{row.difference:.1e}",
        ))  # fmt: skip
    return found
