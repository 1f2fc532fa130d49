"""``graphopt calibrate``: measure the present device and keep its figures for later runs."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from graphopt.budget import format_bytes
from graphopt.device import DeviceSpec
from graphopt.duration import format_seconds
from graphopt.record_json import encode
from graphopt_cost_model.calibrate import calibrate
from graphopt_cost_model.calibration_store import store_calibration

__all__ = ["command"]


@click.command("calibrate")
@click.option("--device", default=None, help="torch device to measure; default: cuda if present, else cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--dry-run", is_flag=True, help="Measure and print, but keep nothing.")
def command(device: str | None, as_json: bool, dry_run: bool) -> None:
    """Measure the present device and keep its figures for later runs."""
    talk = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk, transient=True) as bar:
        task = bar.add_task("calibrating", total=None)
        spec = calibrate(
            device,
            progress=lambda step, done, total: bar.update(
                task, description=step, completed=done, total=total
            ),
        )
    if as_json:
        click.echo(json.dumps(encode(spec), indent=2))
    else:
        Console().print(_table(spec))
    if not dry_run:
        talk.print(f"kept in {store_calibration(spec)}", soft_wrap=True, highlight=False)


def _table(spec: DeviceSpec) -> Table:
    table = Table("figure", "measured", title=f"{spec.name} ({spec.kind})", title_justify="left")
    table.add_row("memory", format_bytes(spec.memory_bytes))
    table.add_row("copy", f"{spec.copy_bytes_per_second / 1e9:.1f} GB/s, read and write counted")
    table.add_row("read", f"{spec.read_bytes_per_second / 1e9:.1f} GB/s")
    for dtype, rate in sorted(spec.matmul_flops.items()):
        table.add_row(f"matmul {dtype}", f"{rate / 1e12:.3g} TFLOP/s")
    table.add_row("launch gap", format_seconds(spec.launch_seconds))
    table.add_row("host link", f"{spec.host_link_bytes_per_second / 1e9:.1f} GB/s")
    return table
