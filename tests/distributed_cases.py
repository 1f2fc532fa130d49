"""What both ranks of ``tests.ranks.Pair`` run: models, plain and optimized, that train together."""

from __future__ import annotations

import copy
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt import PolicyQuestion, Selection
from graphopt.agreement import plan_digest
from graphopt.collectives import is_collective
from graphopt.plugins import PolicySpec, hookimpl
from graphopt.program import Level
from graphopt.stored_step import read_step, step_text

__all__ = [
    "PASSES",
    "Model",
    "adopted",
    "around_data_parallel",
    "budgets",
    "data_parallel",
    "document",
    "kept_apart",
    "kept_by_budget",
    "sharded",
    "started",
    "tensor_parallel",
    "told",
    "uneven",
]

PASSES = "insert-checkpoints"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sigmoid(torch.tanh(self.up(self.norm(x)))))


class Model(nn.Module):
    """Two blocks between two layers; the loss is the model's."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.last = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).square().mean()


def batch(rank: int, number: int, rows: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randn(rows, 32, generator=generator, dtype=torch.float64)


def settings(**more: Any) -> dict[str, Any]:
    return {"emit": "eager", "pipeline": PASSES, "on_error": "raise", **more}


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a weight."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((_whole(a) - _whole(b)).abs().max()) for a, b in pairs)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(
    plain: nn.Module,
    fast: nn.Module,
    batches: list[torch.Tensor],
    sync: Callable[[nn.Module, bool], Any] | None = None,
) -> float:
    """Both after a few steps with momentum: the largest difference. ``sync``: two batches to a step,
    gradients averaged after the second alone."""
    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
        for k, x in enumerate(batches):
            last = sync is None or k % 2 == 1
            if sync is None:
                model(x).backward()
            else:
                with sync(model, last):
                    model(x).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
    return difference(plain, fast)


def tightest(make: Callable[[], nn.Module], inputs: Any, **more: Any) -> graphopt.Optimized:
    """Optimized for the least that fits, found by asking for too little."""
    options = settings(**more)
    free = graphopt.plan(make(), inputs, **options)
    torch._dynamo.reset()
    try:
        graphopt.plan(make(), inputs, budget=free.baseline.peak_bytes // 4, **options)
    except graphopt.BudgetError as error:
        least = error.least_bytes
    least_of_all = torch.tensor(least)
    # What lies between graphs is measured, and may be a little more on one rank.
    dist.all_reduce(least_of_all, dist.ReduceOp.MAX)
    torch._dynamo.reset()
    budget = int(least_of_all) + 8192
    assert budget < free.baseline.peak_bytes
    return graphopt.optimize(make(), inputs, budget=budget, **options)


@dataclass(frozen=True)
class Said:
    """What one rank has to say of a model that was trained: the largest difference of a weight from the plain
    one's, notes of the report, the plan in numbers, what a step took."""

    difference: float
    notes: str
    peak: int
    baseline: int
    weights: int
    recomputed: tuple[str, ...]
    programs: int
    measured: int = 0


def said(fast: graphopt.Optimized, worst: float, inputs: Any = None) -> Said:
    plan = fast.plan
    again = tuple(item.op for choice in plan.choices for item in choice.recomputed)
    measured = 0 if inputs is None else fast.measure(inputs, repeats=1).peak_bytes
    return Said(
        worst,
        "\n".join(fast.report.diagnostics),
        plan.predicted.peak_bytes,
        plan.baseline.peak_bytes,
        plan.predicted.weight_bytes,
        again,
        len(plan.choices),
        measured,
    )


def data_parallel(rank: int, options: dict[str, Any]) -> Said:
    """``DistributedDataParallel`` around an optimized model, gradients averaged every other batch."""
    model, inputs = Model().double(), (batch(rank, 0),)
    group = dist.group.WORLD
    fast = tightest(lambda: copy.deepcopy(model), inputs, process_group=group)
    # Buckets smaller than a layer's gradients: several, filled in the order of the backward.
    both = [DistributedDataParallel(m, bucket_cap_mb=0.01, **options) for m in (copy.deepcopy(model), fast)]

    def sync(wrapped: nn.Module, last: bool) -> Any:
        assert isinstance(wrapped, DistributedDataParallel)
        return nullcontext() if last else wrapped.no_sync()

    # A graph that never changes takes no batches whose gradients stay.
    apart = None if options.get("static_graph") else sync
    return said(fast, trained(*both, [batch(rank, k) for k in range(6)], apart), inputs)


def around_data_parallel(rank: int) -> Said:
    """An optimized ``DistributedDataParallel``: the ranks are found, nothing is said of them."""
    model, inputs = Model().double(), (batch(rank, 0),)

    def make() -> nn.Module:
        return DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=0.01)

    fast = graphopt.optimize(make(), inputs, **settings())
    return said(fast, trained(make(), fast, [batch(rank, k) for k in range(3)]))


def sharded(rank: int, reshard: bool, mixed: bool, tight: bool) -> Said:
    """A model whose blocks are sharded, gradients reduced every other batch."""
    rows = 512 if tight else 64
    model, inputs = Model().double(), (batch(rank, 0, rows),)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)

    def make() -> nn.Module:
        made = copy.deepcopy(model)
        options: dict[str, Any] = {"reshard_after_forward": reshard}
        if mixed:
            options["mp_policy"] = policy
        for block in made.blocks:
            fully_shard(block, **options)
        # As it is by default the root stays gathered after its forward.
        return fully_shard(made, mp_policy=policy) if mixed else fully_shard(made)

    def sync(wrapped: nn.Module, last: bool) -> Any:
        sharding = wrapped if isinstance(wrapped, FSDPModule) else wrapped._model
        sharding.set_requires_gradient_sync(last)
        return nullcontext()

    fast = tightest(make, inputs) if tight else graphopt.optimize(make(), inputs, **settings())
    batches = [batch(rank, k, rows) for k in range(4)]
    return said(fast, trained(make(), fast, batches, sync), inputs)


def tensor_parallel(rank: int, emit: str) -> tuple[Said, list[str], list[str]]:
    """Blocks whose layers are split over both ranks; collectives of the plan, and of the program."""
    model, inputs = Model().double(), (batch(0, 0),)

    def make() -> nn.Module:
        made, mesh = copy.deepcopy(model), init_device_mesh("cpu", (2,))
        for block in made.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return made

    fast = tightest(make, inputs, emit=emit)
    worst = trained(make(), fast, [batch(0, k) for k in range(3)])
    (joint,) = [p for p in fast.programs if p.level is Level.JOINT and p.name == "g0"][:1]
    traced = [node.name for node in joint.nodes() if is_collective(node.target)]
    schedule = fast.plan.choices[0].schedule
    runs = [name for name in (*schedule.forward, *schedule.backward) if name in traced]
    return said(fast, worst, inputs), traced, runs


def uneven(rank: int) -> list[str]:
    """What each rank is told where ranks are asked different things."""
    model = Model().double()
    group = dist.group.WORLD
    inputs = (batch(rank, 0, 64 - 16 * rank),)
    found = [_refusal(lambda: graphopt.optimize(model, inputs, process_group=group, **settings()))]
    torch._dynamo.reset()
    other = settings(pipeline=PASSES if rank == 0 else "normalize,insert-checkpoints", process_group=group)
    found.append(_refusal(lambda: graphopt.optimize(model, (batch(rank, 0),), **other)))
    torch._dynamo.reset()
    # One rank cannot do it: nobody goes on.
    budget = "1KiB" if rank == 1 else None
    failing = settings(budget=budget, process_group=group)
    found.append(_refusal(lambda: graphopt.optimize(model, (batch(rank, 0),), **failing)))
    return found


def budgets(rank: int) -> tuple[list[str], str]:
    """Budgets that give different plans, then some that give the same."""
    model, inputs, group = Model().double(), (batch(rank, 0),), dist.group.WORLD
    free = graphopt.plan(model, inputs, **settings())
    torch._dynamo.reset()
    tight = int(free.baseline.peak_bytes * 0.9)
    budget = tight if rank else 2 * free.baseline.peak_bytes
    uneven = settings(budget=budget, process_group=group)
    refused = _refusal(lambda: graphopt.optimize(model, inputs, **uneven))
    torch._dynamo.reset()
    budget = (2 + rank) * free.baseline.peak_bytes
    fast = graphopt.optimize(model, inputs, budget=budget, process_group=group, **settings())
    return [refused], "\n".join(fast.report.diagnostics)


class Summed(Model):
    """The mean of what all ranks compute, which it asks them for itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return collectives.all_reduce(super().forward(x), "sum", dist.group.WORLD) / 2


class Wired(Model):
    """Takes one of two values from the other, on rank 1 the other from the one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = torch.sigmoid(self.first(x)), torch.tanh(x)
        return (one - other if dist.get_rank() == 0 else other - one).square().mean()


@contextmanager
def caches(folder: Path) -> Iterator[Path]:
    """What is kept for later processes is kept in ``folder``; gives where steps are."""
    before = dict(os.environ)
    os.environ.pop("GRAPHOPT_CACHE", None)
    os.environ["GRAPHOPT_CACHE_DIR"] = str(folder / "graphopt")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    try:
        yield folder / "graphopt" / "steps"
    finally:
        os.environ.clear()
        os.environ.update(before)


def _again(kind: type[Model], rank: int, **more: Any) -> graphopt.Optimized:
    """A model optimized as a process that starts does it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = settings(**{"process_group": dist.group.WORLD, "dynamic_shapes": False, **more})
    return graphopt.optimize(kind().double(), (batch(rank, 0),), **options)


def started(rank: int, folder: Path, emit: str, cold: int | None) -> tuple[list[str], str, list[float]]:
    """A start where each rank has what it kept in its part of ``folder``, ``cold`` nothing: what the report
    says, the plan, and how far results are from the plain model's. The model is called for inference, and for
    other inputs, later."""
    with caches(folder / (str(rank) if rank != cold else f"empty {emit} {rank}")):
        fast = _again(Summed, rank, emit=emit)
        torch.manual_seed(0)
        plain = Summed().double()
        worst = [trained(plain, fast, [batch(rank, k) for k in range(2)])]
        for rows in (64, 32):
            x = batch(rank, 7, rows)
            with torch.no_grad():
                worst.append(float((plain(x) - fast(x)).abs()))
        plan = fast.steps[0].plan
    return list(fast.report.diagnostics), plan_digest(plan), worst


def told(rank: int, folder: Path, emit: str, options: Sequence[dict[str, Any]]) -> list[str]:
    """The report where each rank has a program with collectives that it kept, and ``options`` of its own."""
    with caches(folder / str(rank)):
        return list(_again(Summed, rank, emit=emit, **options[rank]).report.diagnostics)


def kept_apart(rank: int, folder: Path, emit: str) -> list[str]:
    """Models that differ between ranks, each kept by a rank alone: what both are told where they start
    together, rank 1 without what it kept, and both with it."""
    found = []
    with caches(folder / str(rank)):
        _again(Wired, rank, emit=emit, process_group="off")
    for part in (str(rank) if rank == 0 else "empty", str(rank)):
        with caches(folder / part):
            found.append(_refusal(lambda: _again(Wired, rank, emit=emit)))
    return found


def kept_by_budget(rank: int, folder: Path, emit: str) -> tuple[str, list[str], str, str]:
    """Plans that ranks kept under budgets of their own: what they are told with those budgets; the report and
    the plan where rank 1 finds its own for the budget of rank 0; and the plan that it kept for that."""
    alone: dict[str, Any] = {"emit": emit, "process_group": "off"}
    with caches(folder / str(rank)) as steps:
        for budget in ("100%", "85%"):
            fast = _again(Model, rank, budget=budget, **alone)
            (file,) = [path for path in steps.iterdir() if path.stem == _key_of(fast)]
            if budget == "100%":
                first, kept = file, plan_digest(fast.plan)
        refused = _refusal(lambda: _again(Model, rank, emit=emit, budget=("100%", "85%")[rank]))
        if rank == 1:
            step, plan = read_step(file.read_text(), file.stem)
            first.write_text(step_text(replace(step, key=first.stem), plan))
        fast = _again(Model, rank, emit=emit, budget="100%")
    return refused, list(fast.report.diagnostics), plan_digest(fast.plan), kept


def _key_of(fast: graphopt.Optimized) -> str:
    kept = fast._driver.session.kept
    assert kept is not None
    return kept.key


class Deciding:
    """An inline plugin whose policy takes the plan of the least peak on rank 1, the planner's on rank 0."""

    graphopt_api = 1

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @hookimpl
    def graphopt_policies(self) -> list[PolicySpec]:
        return [PolicySpec("by-rank", self.choose, "as the test says")]

    def choose(self, question: PolicyQuestion) -> Selection:
        if self.rank == 0:
            return question.default
        return Selection(tuple(min(f.points, key=lambda p: p.peak_bytes) for f in question.frontiers))


def adopted(rank: int, whole: bool) -> tuple[Said, str]:
    """Ranks that choose differently within one budget."""
    model, inputs = Model().double(), (batch(rank, 0),)

    def make() -> nn.Module:
        made = copy.deepcopy(model)
        return made if whole else DistributedDataParallel(made)

    group = dist.group.WORLD if whole else "auto"
    more = settings(plugins=(Deciding(rank),), policy="by-rank", process_group=group)
    fast = graphopt.optimize(make(), inputs, **more)
    plain = make()
    worst = 0.0
    if whole:
        both = [DistributedDataParallel(m) for m in (plain, fast)]
        worst = trained(*both, [batch(rank, k) for k in range(3)])
    else:
        worst = trained(plain, fast, [batch(rank, k) for k in range(3)])
    return said(fast, worst), plan_digest(fast.plan)


def document(rank: int, texts: list[str]) -> None:
    """Run the blocks of a document."""
    module = types.ModuleType("document")
    sys.modules["document"] = module
    for text in texts:
        exec(compile(text, "document", "exec"), vars(module))


def _refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except graphopt.GraphoptError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
