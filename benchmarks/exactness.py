"""Figure 4: loss, gradients and buffers of a budgeted step against the step without a budget.

    python benchmarks/exactness.py [--models NAME ...] [--quick]

Both run op by op with deterministic algorithms from the same random state, dropout on where the model
has it. Budgets: the least feasible one, and a third and two thirds of the way up to the baseline.
Target: bitwise equal. Shown beside it: whether the step without a budget equals plain eager PyTorch,
and the graphs that dynamo makes of the model, run as they are (``torch.compile(backend="eager")``):
models look at whether they are being captured and may compute in another way then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import budgets_between, figure, parser, prepare

LOSSLESS = "normalize,causal-attention,compress-saved,insert-checkpoints"
"""The passes that round nothing in another order: in chunks, gradients are summed slice by slice."""

State = dict[str, torch.Tensor]


def step(
    call: torch.nn.Module, model: torch.nn.Module, inputs: dict[str, torch.Tensor], buffers: State
) -> State:
    """Everything that one training step leaves: loss, gradients, buffers."""
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    output = call(**inputs)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    left = {"loss": loss.detach().clone()}
    left |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    left |= {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}
    return left


def differing(left: State, right: State) -> list[str]:
    """Names that only one of them has, or whose values differ in any bit."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or not _same_bits(left[name], right[name])
    ]


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))


def rows(name: str) -> Iterator[dict[str, Any]]:
    torch.use_deterministic_algorithms(True)
    prepared = prepare(name, pipeline=LOSSLESS)
    model, inputs = prepared.model, prepared.inputs
    buffers = {key: buffer.detach().clone() for key, buffer in model.named_buffers()}
    least, baseline = prepared.least, prepared.baseline
    prepared.under(None)
    reference = step(prepared.optimized, model, inputs, buffers)
    eager = differing(step(model, model, inputs, buffers), reference)
    captured = torch.compile(model, backend="eager")
    as_captured = differing(step(captured, model, inputs, buffers), reference)
    wrong: dict[str, None] = {}
    again = []
    budgets = budgets_between(least, baseline, 4)[:-1]
    for budget in budgets:
        prepared.under(budget)
        wrong |= dict.fromkeys(differing(step(prepared.optimized, model, inputs, buffers), reference))
        again.append(sum(len(choice.recomputed) for choice in prepared.optimized.plan.choices))
    yield {
        "model": name,
        "tensors": len(reference),
        "budgets": len(budgets),
        "recomputed_operators": again,
        "differing": list(wrong),
        "differing_from_eager": len(eager),
        "differing_from_captured": len(as_captured),
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    return {
        "models": len(good),
        "failed": [row["model"] for row in found if "error" in row],
        "tensors": sum(row["tensors"] for row in good),
        "bitwise_equal": sum(not row["differing"] for row in good),
        "equal_to_eager": sum(not row["differing_from_eager"] for row in good),
        "equal_to_captured": sum(not row["differing_from_captured"] for row in good),
        "met": bool(good) and len(good) == len(found) and not any(row["differing"] for row in good),
    }


if __name__ == "__main__":
    figure("exactness", parser(__doc__).parse_args(), rows, summary)
