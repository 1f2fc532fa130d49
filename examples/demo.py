"""Train a small Llama in about half of the memory that it takes, and show that nothing else changed.

Three runs start from the same weights and see the same batches: plain PyTorch; graphopt without a
budget; graphopt within one. The budget is half of the peak that was measured of the plain run, or
``--budget``. The printed peaks are measured: every allocation and release that torch records
during one step, forward and backward, from weights and inputs on.

    python examples/demo.py --out demo-out --steps 20 --budget 60%

The optimizer's own state lies outside the step and outside the budget; ``Budget(reserve=...)``
is how to hold bytes back for it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import graphopt
from graphopt.budget import format_bytes
from graphopt.dump.memory_picture import memory_svg
from graphopt.measure import Measurement, measure
from graphopt.program import layer_of

TEXT = Path(__file__).with_name("harbour.txt")
ROWS, LENGTH = 8, 256
SEED = 0

Batch = dict[str, torch.Tensor]
out = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
talk = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Run:
    """One training run: what a step of it took, its losses, the weights that it ended with."""

    name: str
    took: Measurement
    losses: tuple[float, ...]
    weights: dict[str, torch.Tensor]


def make_model() -> torch.nn.Module:
    """A Llama of six layers and 4.9 million parameters over bytes, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_batches(count: int) -> list[Batch]:
    """Random windows of the text as bytes: ``input_ids`` and ``labels``, i64[8, 256] each."""
    text = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(SEED)
    starts = torch.randint(0, len(text) - LENGTH, (count, ROWS), generator=generator)
    windows = [torch.stack([text[i : i + LENGTH] for i in row.tolist()]) for row in starts]
    return [{"input_ids": tokens, "labels": tokens.clone()} for tokens in windows]


def train(name: str, model: torch.nn.Module, batches: Sequence[Batch]) -> tuple[float, ...]:
    """One step a batch; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=talk) as progress:
        task = progress.add_task(name, total=len(batches), state="")
        for step, batch in enumerate(batches, 1):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(task, advance=1, state=f"step {step}/{len(batches)}  loss {losses[-1]:.4f}")
    return tuple(losses)


def measure_plain(model: torch.nn.Module, batch: Batch) -> Measurement:
    """Peak and time of a step without graphopt, counted as ``Optimized.measure`` counts."""
    held = [*model.parameters(), *model.buffers(), *batch.values()]

    def step() -> Any:
        output = model(**batch)
        output.loss.backward()
        return output

    return measure(
        step,
        device=torch.device("cpu"),
        static_bytes=sum(tensor.untyped_storage().nbytes() for tensor in held),
        before=model.zero_grad,
    )


def run_plain(batches: Sequence[Batch]) -> Run:
    """The model as it is."""
    model = make_model()
    took = measure_plain(model, batches[0])
    return Run("plain PyTorch", took, train("plain PyTorch", model, batches), model.state_dict())


def run_optimized(
    name: str, batches: Sequence[Batch], budget: str | int | None
) -> tuple[Run, graphopt.Optimized]:
    """The model through graphopt, op by op, so that results can be compared bit by bit."""
    with talk.status(f"{name}: capturing and planning"):
        fast = graphopt.optimize(make_model(), batches[0], budget=budget, emit="eager")
        took = fast.measure(batches[0])
    return Run(name, took, train(name, fast, batches), fast.state_dict()), fast


def same_bits(one: Run, other: Run) -> bool:
    """Whether all losses and all weights after the last step are equal to the last bit."""
    weights = all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    return one.losses == other.losses and weights


def comparison(one: Run, other: Run) -> str:
    """What differs between ``one`` and the run that it is held against, in a sentence."""
    if same_bits(one, other):
        count = len(one.losses)
        return f"against {other.name}: all losses ({count}) and the last weights are bitwise equal"
    losses = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    weights = max(float((value - other.weights[name]).abs().max()) for name, value in one.weights.items())
    return f"against {other.name}: losses differ by at most {losses:.3g}, last weights by {weights:.3g}"


def runs_table(runs: Sequence[Run]) -> Table:
    """Measured peak and time, first and last loss of each run."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("run", no_wrap=True)
    for heading in ("measured peak", "of plain", "step", "first loss", "last loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.name,
            format_bytes(run.took.peak_bytes),
            f"{100 * run.took.peak_bytes / runs[0].took.peak_bytes:.1f} %",
            f"{1e3 * run.took.seconds:.0f} ms",
            f"{run.losses[0]:.6f}",
            f"{run.losses[-1]:.6f}",
        )
    return table


def write_files(
    folder: Path, runs: Sequence[Run], fast: graphopt.Optimized, batch: Batch
) -> list[tuple[str, str]]:
    """Everything that the demo leaves behind; returns each file's name and what it holds."""
    before, after = fast.memory()
    joint = [program for program in fast.programs if program.level is graphopt.Level.JOINT]
    picture = memory_svg(
        {"baseline": before, "optimized": after},
        budget_bytes=fast.plan.budget,
        title="Memory over one training step",
        layers={node.name: layer_of(node) for program in joint for node in program.nodes()},
    )
    (folder / "report.txt").write_text(f"{fast.report}\n", encoding="utf-8")
    (folder / "joint.txt").write_text(fast.dump(stage="joint"), encoding="utf-8")
    (folder / "final.txt").write_text(fast.dump(stage="final"), encoding="utf-8")
    (folder / "memory.svg").write_text(picture, encoding="utf-8")
    fast.plan.save(folder / "plan.json")
    with talk.status("drawing what every budget gives"):
        graphopt.pareto(make_model(), batch, emit="eager").picture(folder / "pareto.svg")
    with open(folder / "losses.csv", "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["step", *(run.name for run in runs)])
        losses = zip(*(run.losses for run in runs), strict=True)
        rows.writerows([step, *map(repr, values)] for step, values in enumerate(losses, 1))
    return [
        ("report.txt", "the report above"),
        ("joint.txt", "forward and backward in one graph, marked: what is saved, what runs again"),
        ("final.txt", "the forward and the backward that ran"),
        ("memory.svg", "predicted bytes over the step, baseline beside optimized"),
        ("pareto.svg", "peak against predicted time for every budget"),
        ("plan.json", "the plan, to replay with optimize(plan=Plan.load(...))"),
        ("losses.csv", "every loss of every run"),
    ]


def demo(folder: Path, steps: int, budget: str | None) -> bool:
    """Run it all; whether the budget held and the losses agreed."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = make_batches(steps)
    plain = run_plain(batches)
    asked = plain.took.peak_bytes // 2 if budget is None else budget
    free, _ = run_optimized("graphopt, no budget", batches, None)
    bound, fast = run_optimized("graphopt, budget", batches, asked)
    runs = (plain, free, bound)
    files = write_files(folder, runs, fast, batches[0])

    out.print(f"[bold]report of the run within {format_bytes(fast.plan.budget or 0)}[/bold]")
    out.print(str(fast.report), markup=False)
    out.print(f"\n[bold]{steps} training steps, measured[/bold]")
    out.print(runs_table(runs))
    out.print("\n[bold]is the run within the budget the same?[/bold]")
    for other in (free, plain):
        out.print(f"  {comparison(bound, other)}", markup=False)
    holds = bound.took.peak_bytes <= (fast.plan.budget or 0)
    verdict = "within" if holds else "ABOVE"
    measured, limit = format_bytes(bound.took.peak_bytes), format_bytes(fast.plan.budget or 0)
    out.print(f"  the measured peak, {measured}, is {verdict} the budget, {limit}")
    out.print(f"\n[bold]written to {folder}/[/bold]")
    width = max(len(name) for name, _ in files)
    for name, what in files:
        out.print(f"  {name:<{width}}  {what}", markup=False)
    return holds and same_bits(bound, free)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if the budget held and the losses agreed, else 1."""
    parser = argparse.ArgumentParser(description="Train a small Llama in about half of its memory.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for what is written")
    parser.add_argument("--steps", type=int, default=20, help="training steps of each run")
    parser.add_argument("--budget", help="8GiB, 200MiB, 60%%; default: half of the plain run's measured peak")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    try:
        graphopt.Budget.of(options.budget)  # before any work: a typing mistake should cost nothing
        return 0 if demo(options.out, options.steps, options.budget) else 1
    except graphopt.GraphoptError as error:
        talk.print(f"demo: error[{error.code}]: {error}", markup=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
