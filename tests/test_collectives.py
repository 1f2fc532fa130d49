"""Collectives are effects: none goes, none is merged, none changes places. One process suffices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt import VerificationError, _torch
from graphopt.agreement import program_digest
from graphopt.collectives import is_collective
from graphopt.order import has_effect, restore_order
from graphopt.program import Level
from tests.programs import semantic
from tests.steps import assert_same, run_step


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank."""
    place = Path(tmp_path_factory.mktemp("ranks")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduced(x: torch.Tensor) -> torch.Tensor:
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))


def traced(function: Callable[..., Any]) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(torch.ones(4))


def names(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if is_collective(node.target)]


def test_equal_collectives_stay_two_and_unread_ones_stay() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        reduced(x * 3)
        return reduced(x + 1) * reduced(x + 1)

    gm = traced(twice)
    _torch.eliminate_common_subexpressions(gm, has_effect)
    assert len(names(gm)) == 6
    # What they read is computed once.
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)) == 1
    assert torch.equal(gm(torch.ones(4)), torch.full((4,), 4.0))


def test_a_collective_that_nobody_reads_or_waits_for_has_an_effect() -> None:
    def launched(x: torch.Tensor) -> torch.Tensor:
        torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name)  # type: ignore[union-attr]
        return x * 2

    gm = traced(launched)
    (launch,) = [node for node in gm.graph.nodes if is_collective(node.target)]
    assert has_effect(launch)
    _torch.eliminate_common_subexpressions(gm, has_effect)
    assert names(gm) == ["all_reduce"]


def test_collectives_do_not_change_places() -> None:
    gm = traced(lambda x: reduced(x + 1) * reduced(x * 2))
    first, second = (node for node in gm.graph.nodes if node.name.startswith("all_reduce"))
    # The first now reads what is made after the second: to sort that would make them swap.
    last = next(node for node in gm.graph.nodes if node.name.startswith("wait_tensor_1"))
    first.replace_input_with(first.args[0], last)
    with pytest.raises(VerificationError, match=r"would have to move past '.*', whose effect it feels"):
        restore_order(gm.graph)
    assert second.name == "all_reduce_1"


class Spreading(nn.Module):
    """Two pairs of layers, of which each rank holds parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.up2, self.down2 = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return (x + self.down2(torch.tanh(self.up2(x)))).square().mean()


def parallel() -> nn.Module:
    torch.manual_seed(0)
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {"up": columns, "down": rows, "up2": columns, "down2": rows}
    return parallelize_module(Spreading().double(), init_device_mesh("cpu", (1,)), plan)


@pytest.fixture
def planned() -> graphopt.Optimized:
    torch._dynamo.reset()
    inputs = (torch.randn(32, 16, dtype=torch.float64),)
    settings: dict[str, Any] = {"emit": "eager", "pipeline": "insert-checkpoints", "on_error": "raise"}
    return graphopt.optimize(parallel(), inputs, **settings)


def test_roles_of_what_a_dtensor_wraps(planned: graphopt.Optimized) -> None:
    (joint,) = [p for p in planned.programs if p.level is Level.JOINT]
    parameters = joint.signature.by_role("parameter")
    known = [name for name, _ in parallel().named_parameters()]
    assert sorted(spec.fqn for spec in parameters) == sorted(known)
    gradients = [spec.target for spec in joint.signature.outputs if spec.role == "gradient"]
    assert sorted(gradients) == sorted(spec.fqn for spec in parameters)
    inputs = (torch.randn(32, 16, dtype=torch.float64),)
    assert_same(run_step(planned, inputs), run_step(parallel(), inputs))


def test_inference_on_dtensors(planned: graphopt.Optimized) -> None:
    x = torch.randn(32, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(planned(x), parallel()(x))
    assert planned.plan.choices[0].program == "g1"


def test_bytes_are_this_ranks() -> None:
    whole = torch.randn(8, 4)
    spread = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
    (local,) = _torch.plain_tensors(spread)
    assert type(local) is torch.Tensor and torch.equal(local, whole)
    assert _torch.storage_bytes([spread, spread, local]) == 8 * 4 * 4
    assert _torch.plain_tensors("text") == [] and _torch.plain_tensors(whole)[0] is whole
    assert isinstance(spread, DTensor)


def test_programs_that_differ_in_numbers_alone_are_one_to_ranks() -> None:
    one = semantic(lambda x: torch.relu(x + 1) * 2, torch.ones(4))
    two = semantic(lambda x: torch.relu(x + 3) * 2, torch.ones(4))
    other = semantic(lambda x: torch.relu(x * 2) + 1, torch.ones(4))
    wider = semantic(lambda x: torch.relu(x + 1) * 2, torch.ones(5))
    assert program_digest(one) == program_digest(two)
    assert len({program_digest(program) for program in (one, other, wider)}) == 3
