"""offload: what may wait in the host's memory, how much of it, and what is said where nothing may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.candidate import Declined, Frontier, FrontierPoint
from graphopt.cost import CostModel
from graphopt.device import DeviceSpec
from graphopt.errors import PassError
from graphopt.passes import PassContext
from graphopt.program import Level, Program
from graphopt.schedule import Schedule
from graphopt_passes.offload import Offload

X = (torch.randn(512, 1024),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1024, 1024), nn.Linear(1024, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(x))
        return self.down(torch.sigmoid(h)).square().mean()


@pytest.fixture(scope="module")
def program() -> Program:
    fast = graphopt.optimize(Net(), inputs=X, emit="eager", pipeline=["insert-checkpoints"])
    return next(p for p in fast.programs if p.level is Level.JOINT)


@pytest.fixture(scope="module")
def cost() -> CostModel:
    class Device:
        """What the pass asks of a cost model: the device alone."""

        device = DeviceSpec("fast", "cuda", 2**36, 1e12, 1e12, {}, {}, 1e-6, host_link_bytes_per_second=1e9)

    return Device()  # type: ignore[return-value]


def curve(program: Program, seconds: float) -> Frontier:
    names = {node.name for node in program.nodes()}
    forward = tuple(n for n in names if n.startswith(("t", "addmm", "tanh", "sigmoid", "mm")))
    order = tuple(node.name for node in program.nodes())
    saved = tuple(n for n in order if n in ("tanh", "sigmoid"))
    assert len(saved) == 2
    schedule = Schedule(tuple(n for n in order if n in forward), saved, order)
    at = FrontierPoint(
        schedule, 9, 9, 6 * 2**20, 0, 0.5, forward_seconds=seconds, backward_seconds=2 * seconds
    )
    return Frontier("some-pass", (at,))


def context(cost: CostModel, found: Frontier | None, emit: str = "inductor") -> PassContext:
    return PassContext(cost, "train", emit, curve=found)


def test_what_the_link_carries_and_everything_are_offered(program: Program, cost: CostModel) -> None:
    size = 512 * 1024 * 4
    # The link carries one of the two values while the neighbours compute.
    found = curve(program, 1.2 * size / 1e9)
    (offered,) = Offload().propose(program, context(cost, found))
    assert isinstance(offered, Frontier) and offered.extends
    assert offered.points[0] == found.points[0]
    few, many = offered.points[1:]
    assert (few.moved_bytes, many.moved_bytes) == (size, 2 * size)
    assert len(few.offloaded) == 1 and set(many.offloaded) == {"tanh", "sigmoid"}
    # Beside compute a copy costs a tenth of its time; what compute does not cover, all of it.
    assert few.seconds == pytest.approx(0.5 + 2 * 0.1 * size / 1e9)
    alone = 2 * size / 1e9 - 0.9 * 1.2 * size / 1e9
    assert many.seconds == pytest.approx(0.5 + alone + max(0.2 * size, 2 * size - 0.9 * 2.4 * size) / 1e9)


def test_host_memory_bounds_what_is_offered(program: Program, cost: CostModel) -> None:
    found = curve(program, 1.0)
    (offered,) = Offload(host="3MiB").propose(program, context(cost, found))
    assert isinstance(offered, Frontier)
    assert offered.host_bytes == 3 * 2**20
    assert max(point.moved_bytes for point in offered.points) <= 3 * 2**20
    assert not list(Offload(host="1MiB").propose(program, context(cost, found)))


def test_it_says_why_nothing_is_moved(program: Program, cost: CostModel) -> None:
    found = curve(program, 1.0)
    (declined,) = Offload().propose(program, context(cost, found, emit="eager"))
    assert isinstance(declined, Declined)
    assert declined.why == (
        'programs that run op by op are not overlapped with copies: compile them (emit="inductor")'
    )
    assert not list(Offload().propose(program, context(cost, None)))
    fast = graphopt.optimize(Net(), inputs=X, emit="eager")
    assert ("offload", "the device's memory is the host's") in [
        (d.candidate, d.why) for d in fast.report.declined
    ]


def test_an_unreadable_size_is_named() -> None:
    with pytest.raises(PassError, match=r"offload: host='much': cannot read 'much' as bytes"):
        Offload(host="much")
