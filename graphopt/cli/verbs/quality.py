"""``graphopt quality``: what packed weights or a pipeline do to a model's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli.options import OLD_FILE, inference_options, json_option, target_argument
from graphopt.cli.output import talking, write_json

__all__ = ["command"]


@click.command("quality")
@target_argument
@inference_options
@click.option("--weights", metavar="BYTES", help="Pack weights: bound on all tensors, 8GiB or 40%.")
@click.option(
    "--scheme", "schemes", multiple=True, metavar="SCHEME", help="Choose among these; may be repeated."
)
@click.option("--score", metavar="NAME", help="What the error of a weight is.")
@click.option("--calibration", type=OLD_FILE, help="Statistics that Calibration.save wrote.")
@click.option("--quantization", type=OLD_FILE, help="Pack weights as this stored plan says.")
@click.option(
    "--batches",
    metavar="MODULE:FUNCTION",
    help="Function that gives the batches to compare on (default: the target's inputs).",
)
@json_option
def command(
    target: str,
    budget: str | None,
    pipeline: str | None,
    allow: tuple[str, ...],
    device: str | None,
    emit: str,
    weights: str | None,
    schemes: tuple[str, ...],
    score: str | None,
    calibration: Path | None,
    quantization: Path | None,
    batches: str | None,
    as_json: bool,
) -> None:
    """Compare the predictions of TARGET before and after its weights are packed, or a pipeline is run."""
    import torch

    from graphopt.api import optimize
    from graphopt.cli.target import import_object, load_target
    from graphopt.errors import TargetError
    from graphopt.packing.api import quantize
    from graphopt.packing.calibration import Calibration
    from graphopt.packing.fit import sharing
    from graphopt.packing.plan import QuantizationPlan
    from graphopt.quality import measure_quality

    loaded = load_target(target)
    given: Any = [loaded.inputs]
    if batches is not None:
        function = import_object(batches, "batches")
        if not callable(function):
            raise TargetError(f"batches {batches!r} is {type(function).__name__}, not a function")
        given = list(function())
    model = loaded.model.eval()
    changed: Any = sharing(model)
    plan = None
    with torch.no_grad():
        if weights is not None or schemes or quantization is not None:
            with talking("packing weights"):
                plan = quantize(
                    changed,
                    loaded.inputs,
                    weights=weights,
                    schemes=schemes or None,
                    score=score,
                    calibration=Calibration.load(calibration) if calibration is not None else None,
                    plan=QuantizationPlan.load(quantization) if quantization is not None else None,
                )
        if budget is not None or pipeline is not None or allow or plan is None:
            with talking(f"optimizing {target}"):
                changed = optimize(
                    changed,
                    loaded.inputs,
                    budget=budget,
                    allow=allow,
                    pipeline=pipeline,
                    emit=emit,
                    device=device,
                )
        with talking("comparing"):
            found = measure_quality(model, changed, given)
    if plan is None and budget is not None:
        plan = changed.report.quantization
    if as_json:
        write_json({**found.to_json(), "quantization": plan.to_json() if plan is not None else None})
        return
    click.echo(str(found))
    if plan is not None:
        click.echo(plan.summary)
