"""``graphopt tune``: find the fastest launches on the present GPU and keep them for later runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils import _pytree as pytree

from graphopt.cli.options import NEW_FILE, json_option, step_options
from graphopt.cli.output import talking, write_json, write_table
from graphopt.plugins import TunableSpec
from graphopt_kernels.tuning.lookup import fields_text, forget_choices
from graphopt_kernels.tuning.store import cached_file, write_entries
from graphopt_kernels.tuning.table import forget_table
from graphopt_kernels.tuning.tuner import GraphMeter, Outcome, Trial, TuningError, present_gpu, tune
from graphopt_kernels.tuning.work import Work, launched_by, shipped_work

__all__ = ["command", "tuning_device"]


@click.command("tune")
@click.argument("target", metavar="[TARGET]", required=False)
@click.option("--kernels", multiple=True, metavar="NAME", help="Tune this kernel only; may be repeated.")
@click.option(
    "--shapes",
    multiple=True,
    metavar="FIELD=VALUE,...",
    help="Without TARGET: the usual problems with these fields in place (width=4096,rows=8192).",
)
@click.option("--device", metavar="NAME", default="cuda", show_default=True, help="torch device to tune on.")
@click.option("--out", type=NEW_FILE, help="Keep the results in this file, not in the user's cache folder.")
@step_options
@json_option
def command(
    target: str | None,
    kernels: tuple[str, ...],
    shapes: tuple[str, ...],
    device: str,
    out: Path | None,
    budget: str | None,
    pipeline: str | None,
    allow: tuple[str, ...],
    loss: str | None,
    infer: bool,
    emit: str,
    as_json: bool,
) -> int:
    """Find the fastest launches of kernels on this GPU and keep them.

    With TARGET those that its optimized step makes, at their shapes; without, the shapes that most models
    have.
    """
    if target is not None and shapes:
        raise click.UsageError(
            "--shapes are for tuning without TARGET: a target's are those that it launches"
        )
    chosen = tuning_device(device)
    # Said before minutes of work, not after.
    path = out or _writable(cached_file(present_gpu(chosen).name))
    if target is None:
        work = shipped_work(kernels, shapes)
    else:
        options = {"budget": budget, "pipeline": pipeline, "allow": allow, "emit": emit}
        work = _work_of(target, kernels, chosen, infer, loss, options)
        # The model is done with: what is tuned needs memory of its own.
        gc.collect()
        torch.cuda.empty_cache()
    outcomes = _tuned(work, chosen, path)
    (write_json if as_json else _write_text)(_described(outcomes))
    return 0 if all(outcome.chosen is not None for outcome in outcomes) else 1


def _work_of(
    target: str,
    kernels: Sequence[str],
    device: torch.device,
    infer: bool,
    loss: str | None,
    options: Mapping[str, Any],
) -> Work:
    """What one step of a target, optimized, launches on ``device``."""
    from graphopt.api import optimize
    from graphopt.cli.target import load_loss, load_target, step_mode

    with step_mode(infer), talking(f"optimizing {target} and running one step"):
        loaded = load_target(target)
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), loaded.inputs)
        model = loaded.model.to(device)

        def step() -> None:
            # Compiling asks, too: for groups of operators that a kernel may be written for.
            optimized = optimize(model, inputs, loss_fn=load_loss(loss), cache=False, **options)
            optimized.measure(inputs, repeats=1)

        return launched_by(step, kernels, target)


def tuning_device(name: str) -> torch.device:
    """A CUDA device that is here, with triton; raises ``TuningError`` that says what is missing."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TuningError(f"cannot tune on {name!r}: no such torch device") from error
    count = torch.cuda.device_count()
    if device.type != "cuda" or not count:
        what = f"{name!r} is not one" if device.type != "cuda" else "torch sees none here"
        raise TuningError(
            f"tuning needs a CUDA device: {what}", hint="kernels start with their defaults until tuned"
        )
    if (device.index or 0) >= count:
        raise TuningError(f"cannot tune on {device}: this machine has {count} CUDA devices")
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        raise TuningError("tuning needs triton, which is not installed") from error
    return torch.device("cuda", device.index or 0)


def _writable(path: Path) -> Path:
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder)
    return path


def _unwritable(folder: Path) -> TuningError:
    return TuningError(
        f"results cannot be kept: folder '{folder}' cannot be written to",
        hint="name a file with --out, or another cache folder with GRAPHOPT_CACHE_DIR",
    )


def _tuned(work: Sequence[tuple[TunableSpec, Any]], device: torch.device, path: Path) -> list[Outcome]:
    """Tune with a progress bar on stderr, and keep each result as soon as it is there."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    gpu, talk, outcomes = present_gpu(device), Console(stderr=True), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    specs = {spec.name: spec for spec, _ in work}
    with Progress(*columns, console=talk, transient=True) as bar:
        task = bar.add_task("compiling", total=None)

        def progress(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        for outcome in tune(work, GraphMeter(device), gpu, threads=os.cpu_count() or 1, progress=progress):
            outcomes.append(outcome)
            entry = outcome.entry(specs[outcome.kernel], gpu.name)
            if entry is not None:
                write_entries(path, [entry])
    forget_table()
    forget_choices()
    talk.print(f"kept in {path}", soft_wrap=True, highlight=False)
    return outcomes


def _described(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": outcome.kernel,
            "problem": fields_text(outcome.problem),
            "default": fields_text(outcome.default.configuration),
            "default_us": _microseconds(outcome.default),
            "best": None if outcome.best is None else fields_text(outcome.best.configuration),
            "best_us": None if outcome.best is None else _microseconds(outcome.best),
            "chosen": None if outcome.chosen is None else fields_text(outcome.chosen.configuration),
            "measured": sum(trial.seconds is not None for trial in outcome.trials),
            "refused": [
                {"configuration": fields_text(trial.configuration), "reason": trial.refused.text}
                for trial in outcome.trials
                if trial.refused is not None
            ],
        }
        for outcome in outcomes
    ]


def _microseconds(trial: Trial) -> float | None:
    return None if trial.seconds is None else round(trial.seconds * 1e6, 2)


def _write_text(found: Sequence[dict[str, Any]]) -> None:
    rows = []
    for item in found:
        if item["chosen"] is None:
            chosen = f"none: {item['refused'][0]['reason']}"
        else:
            chosen = "default" if item["chosen"] == item["default"] else item["chosen"]
        rows.append(
            (
                item["kernel"],
                item["problem"],
                "" if item["default_us"] is None else f"{item['default_us']:.1f}",
                "" if item["best_us"] is None else f"{item['best_us']:.1f}",
                chosen,
            )
        )
    write_table(
        ("kernel", "problem", "default us", "best us", "chosen"), rows, right=("default us", "best us")
    )
    for item in found:
        for refused in item["refused"]:
            if not refused["reason"].startswith("it spills"):
                click.echo(f"{item['kernel']} {refused['configuration']}: {refused['reason']}", err=True)
