"""``graphopt weights``: what a checkpoint holds, and in which formats; no model is needed."""

from __future__ import annotations

import click

from graphopt.cli.options import json_option
from graphopt.cli.output import write_json, write_table

__all__ = ["command"]


@click.command("weights")
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(exists=True))
@click.option(
    "--format", "formats", multiple=True, metavar="FORMAT", help="Look for these alone; may be repeated."
)
@json_option
def command(checkpoint: str, formats: tuple[str, ...], as_json: bool) -> None:
    """List the packed weights of CHECKPOINT: a safetensors file, an index, or a folder with one of them."""
    from graphopt.budget import format_bytes
    from graphopt.packing.load import stored_weights

    packed, dense, dense_bytes = stored_weights(checkpoint, formats or None)
    if as_json:
        rows = [
            {
                "weight": w.stored.parameter,
                "format": w.format,
                "n": w.stored.n,
                "k": w.stored.k,
                "bytes": w.bytes,
            }
            for w in packed
        ]
        write_json({"packed": rows, "dense": {"tensors": dense, "bytes": dense_bytes}})
        return
    if packed:
        write_table(
            ("weight", "format", "outputs", "inputs", "bytes"),
            [
                (w.stored.parameter, w.format, str(w.stored.n), str(w.stored.k), format_bytes(w.bytes))
                for w in packed
            ],
            right=("outputs", "inputs", "bytes"),
        )
    click.echo(f"{len(packed)} packed, {dense} dense ({format_bytes(dense_bytes)})")
