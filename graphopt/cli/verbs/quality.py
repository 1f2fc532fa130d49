"""``graphopt quality``: what packed weights or a pipeline do to a model's predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.options import NEW_FILE, OLD_FILE, inference_options, json_option, target_argument
from graphopt.cli.output import talking, write_json

if TYPE_CHECKING:
    from graphopt.packing.calibration import Calibration
    from graphopt.packing.plan import QuantizationPlan

__all__ = ["command"]

_READ_PACKED = "read-packed"
"""The pass without which schemes that round inputs would be compared by their weights alone."""

_LOSSES = frozenset({"gradients", "relevance", "curvature"})
"""Observers that differentiate a loss."""


@click.command("quality")
@target_argument
@inference_options
@click.option("--weights", metavar="BYTES", help="Pack weights: bound on all tensors, 8GiB or 40%.")
@click.option("--bits", type=float, metavar="NUMBER", help="Pack weights: bound on bits of one, on average.")
@click.option(
    "--scheme", "schemes", multiple=True, metavar="SCHEME", help="Choose among these; may be repeated."
)
@click.option("--score", metavar="NAME", help="What the error of a weight is.")
@click.option("--calibration", type=OLD_FILE, help="Statistics that Calibration.save wrote.")
@click.option("--calibration-text", type=OLD_FILE, metavar="FILE", help="Calibrate on this text.")
@click.option("--quantization", type=OLD_FILE, help="Pack weights as this stored plan says.")
@click.option("--save-quantization", type=NEW_FILE, metavar="FILE", help="Store the plan of weights.")
@click.option("--text", type=OLD_FILE, metavar="FILE", help="Text to compare on, in place of --batches.")
@click.option("--tokenizer", metavar="MODULE:FUNCTION", help="Function that returns the tokenizer of texts.")
@click.option(
    "--tokens", type=click.IntRange(1), default=8192, show_default=True, help="At most so many of each text."
)
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
    bits: float | None,
    schemes: tuple[str, ...],
    score: str | None,
    calibration: Path | None,
    calibration_text: Path | None,
    quantization: Path | None,
    save_quantization: Path | None,
    text: Path | None,
    tokenizer: str | None,
    tokens: int,
    batches: str | None,
    as_json: bool,
) -> None:
    """Compare the predictions of TARGET before and after its weights are packed, or a pipeline is run."""
    packs = weights is not None or bits is not None or bool(schemes) or quantization is not None
    _check_usage(text, tokenizer, calibration, calibration_text, batches, packs, save_quantization)
    import torch

    from graphopt.api import optimize
    from graphopt.cli.target import load_target
    from graphopt.packing.api import quantize
    from graphopt.packing.calibration import Calibration
    from graphopt.packing.fit import sharing
    from graphopt.packing.plan import QuantizationPlan
    from graphopt.quality import measure_quality

    loaded = load_target(target)
    stored = QuantizationPlan.load(quantization) if quantization is not None else None
    texts = _Texts(loaded.inputs, tokenizer, tokens)
    given: Any = [loaded.inputs]
    if batches is not None:
        given = _from_function(batches)
    elif text is not None:
        given = texts.batches(text)
    model = loaded.model.eval()
    statistics = None
    if calibration is not None:
        statistics = Calibration.load(calibration)
    elif calibration_text is not None:
        statistics = _calibrated(model, texts.batches(calibration_text), schemes, score, stored)
    changed: Any = sharing(model)
    plan = None
    with torch.no_grad():
        if packs:
            with talking("packing weights"):
                plan = quantize(
                    changed,
                    loaded.inputs,
                    weights=weights,
                    bits=bits,
                    schemes=schemes or None,
                    score=score,
                    calibration=statistics,
                    plan=stored,
                )
        asked = budget is not None or pipeline is not None or bool(allow)
        with talking(f"optimizing {target}"):
            changed = optimize(
                changed,
                loaded.inputs,
                budget=budget,
                allow=allow,
                pipeline=pipeline if asked or plan is None else _READ_PACKED,
                emit=emit if asked or plan is None or emit != "auto" else "eager",
                device=device,
            )
        found = measure_quality(model, changed, given)
    if plan is None:
        plan = changed.report.quantization
    if save_quantization is not None and plan is not None:
        plan.save(save_quantization)
    if as_json:
        write_json({**found.to_json(), "quantization": plan.to_json() if plan is not None else None})
        return
    click.echo(str(found))
    if plan is not None:
        click.echo(plan.summary)


def _check_usage(
    text: Path | None,
    tokenizer: str | None,
    calibration: Path | None,
    calibration_text: Path | None,
    batches: str | None,
    packs: bool,
    save_quantization: Path | None,
) -> None:
    """Say before any work is done what does not go together."""
    if text is not None and batches is not None:
        raise click.UsageError("--text and --batches both say what to compare on: give one of them")
    if calibration is not None and calibration_text is not None:
        raise click.UsageError("--calibration and --calibration-text are one too many: give one of them")
    if (text or calibration_text) and tokenizer is None:
        raise click.UsageError("a text needs --tokenizer MODULE:FUNCTION, which returns a tokenizer")
    if tokenizer is not None and not (text or calibration_text):
        raise click.UsageError("--tokenizer is of no use without --text or --calibration-text")
    if text and calibration_text and text.resolve() == calibration_text.resolve():
        raise click.UsageError(
            "--text and --calibration-text are one file: compare on a text that is held out"
        )
    if calibration_text is not None and not packs:
        raise click.UsageError("--calibration-text is for packing weights: add --scheme, --bits or --weights")
    if save_quantization is not None and not packs:
        raise click.UsageError("there is no plan to save: add --scheme, --bits or --weights")


class _Texts:
    """Batches like the target's inputs from texts; the tokenizer is loaded when the first is asked for."""

    def __init__(self, inputs: Any, tokenizer: str | None, tokens: int) -> None:
        self.inputs, self.tokenizer, self.tokens = inputs, tokenizer, tokens
        self.encode: Callable[[str], list[int]] | None = None

    def batches(self, path: Path) -> list[Any]:
        from graphopt.cli.target import import_object
        from graphopt.errors import InputsError, TargetError
        from graphopt.text_batches import encoder_of, text_batches

        if self.encode is None:
            assert self.tokenizer is not None
            factory = import_object(self.tokenizer, "tokenizer")
            if not callable(factory):
                raise TargetError(f"tokenizer {self.tokenizer!r} is {type(factory).__name__}, not a function")
            self.encode = encoder_of(factory())
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputsError(f"{path} is no text in UTF-8: {error}") from error
        try:
            return text_batches(self.inputs, content, self.encode, self.tokens)
        except InputsError as error:
            raise InputsError(f"{path}: {error.message}", hint=error.hint) from None


def _from_function(name: str) -> list[Any]:
    from graphopt.cli.target import import_object
    from graphopt.errors import TargetError

    function = import_object(name, "batches")
    if not callable(function):
        raise TargetError(f"batches {name!r} is {type(function).__name__}, not a function")
    return list(function())


def _calibrated(
    model: Any,
    batches: list[Any],
    schemes: tuple[str, ...],
    score: str | None,
    stored: QuantizationPlan | None,
) -> Calibration:
    """What the schemes and the score need to know of these batches."""
    from graphopt.errors import InputsError
    from graphopt.packing.allocate import chosen_schemes, observers_for
    from graphopt.packing.calibration import calibrate
    from graphopt.plugins.host import default_host

    host = default_host()
    if stored is not None:
        names: tuple[str, ...] | None = tuple(dict.fromkeys(c.scheme for c in stored.packed))
        scorer = None
    else:
        names, scorer = schemes or None, host.scorer(score or "outputs")
        if _LOSSES & set(scorer.needs) and not (isinstance(batches[0], dict) and "labels" in batches[0]):
            raise InputsError(
                f"score {scorer.name!r} needs a loss, and the target's inputs hold no labels",
                hint="add labels=..., with which the model returns a loss, or use --calibration",
            )
    return calibrate(model, batches, observers=observers_for(chosen_schemes(names, host), scorer))
