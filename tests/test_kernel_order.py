"""The order of kernels: valid, never worse than the given one, the best where all can be tried."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import _torch
from graphopt._torch import KernelBuffer, KernelLaunch
from graphopt.emit.kernel_order import least_memory_order, peak_of


@st.composite
def kernel_graphs(draw: st.DrawFn) -> tuple[list[KernelLaunch], list[KernelBuffer]]:
    count = draw(st.integers(1, 7))
    launches, buffers = [], []
    readers: list[set[int]] = [set() for _ in range(count)]
    for index in range(count):
        waits = draw(st.frozensets(st.integers(0, index - 1), max_size=3)) if index else frozenset()
        launches.append(KernelLaunch(waits))
        for source in waits:
            readers[source].add(index)
    for index in range(count):
        returned = draw(st.booleans()) or not readers[index]
        over = frozenset(reader for reader in sorted(readers[index]) if draw(st.booleans()))
        size = draw(st.integers(1, 9))
        buffers.append(KernelBuffer(size, frozenset({index}), frozenset(readers[index]), returned, over))
    held = draw(st.frozensets(st.integers(0, count - 1), min_size=1, max_size=2))
    buffers.append(KernelBuffer(draw(st.integers(1, 9)), frozenset(), held))
    return launches, buffers


def valid(launches: list[KernelLaunch], order: list[int]) -> bool:
    place = {index: at for at, index in enumerate(order)}
    return sorted(order) == list(range(len(launches))) and all(
        place[before] < place[index] for index, launch in enumerate(launches) for before in launch.waits
    )


@given(kernel_graphs())
@settings(max_examples=150, deadline=None)
def test_the_order_is_the_best_of_all(graph):
    launches, buffers = graph
    order = least_memory_order(launches, buffers)
    assert valid(launches, order)
    best = min(
        peak_of(launches, buffers, list(p))
        for p in permutations(range(len(launches)))
        if valid(launches, list(p))
    )
    assert peak_of(launches, buffers, order) == best


def test_the_given_order_stays_where_none_is_better():
    launches = [KernelLaunch(frozenset()) for _ in range(3)]
    buffers = [KernelBuffer(4, frozenset({index}), frozenset(), True) for index in range(3)]
    assert least_memory_order(launches, buffers) == [0, 1, 2]


def test_what_is_written_over_its_input_counts_once():
    launches = [KernelLaunch(frozenset()), KernelLaunch(frozenset({0}))]
    source = KernelBuffer(100, frozenset(), frozenset({0}), overwriters=frozenset({0}))
    result = KernelBuffer(10, frozenset({1}), frozenset(), True)
    buffers = [source, KernelBuffer(100, frozenset({0}), frozenset({1})), result]
    assert peak_of(launches, buffers, [0, 1]) == 10
    buffers[0] = source._replace(overwriters=frozenset())
    assert peak_of(launches, buffers, [0, 1]) == 100


def test_a_large_graph_takes_a_narrow_beam():
    launches = [KernelLaunch(frozenset({index - 1} if index else ())) for index in range(3_000)]
    buffers = [KernelBuffer(1, frozenset({index}), frozenset({index + 1}), False) for index in range(2_999)]
    assert least_memory_order(launches, buffers) == list(range(3_000))


def test_the_order_of_the_program_is_one_of_those_to_choose_from():
    # Slices: each a large value that the next step adds to a chain of sums. Fusing put all first steps in
    # front. A beam drops the slice that the chain begins with: there are too many that look the same.
    count = 60
    launches, buffers = [], []
    for k in range(count):
        launches.append(KernelLaunch(frozenset(), 2 * (count - k)))
        buffers.append(KernelBuffer(100, frozenset({k}), frozenset({count + k})))
    for k in range(count):
        waits = {k, count + k + 1} if k + 1 < count else {k}
        launches.append(KernelLaunch(frozenset(waits), 2 * (count - k) + 1))
        readers = frozenset({count + k - 1}) if k else frozenset()
        buffers.append(KernelBuffer(1, frozenset({count + k}), readers, not readers))
    order = least_memory_order(launches, buffers)
    assert valid(launches, order)
    assert peak_of(launches, buffers, order) == 102


def test_a_whole_is_there_from_its_first_part_on():
    launches = [KernelLaunch(frozenset()), KernelLaunch(frozenset({0})), KernelLaunch(frozenset({0, 1}))]
    whole = KernelBuffer(10, frozenset({0, 1}), frozenset({2}))
    buffers = [whole, KernelBuffer(7, frozenset({1}), frozenset())]
    assert peak_of(launches, buffers, [0, 1, 2]) == 17
    assert peak_of(launches, [whole._replace(readers=frozenset(), returned=True)], [0, 1, 2]) == 10


def kernels_of(step, inputs):
    """What Inductor says of the kernels of an inference program, which gives the right numbers."""
    seen = []

    def order(launches, buffers):
        seen.append((launches, buffers))
        return least_memory_order(launches, buffers)

    def partition(joint, outputs):
        raise AssertionError("inference has no joint graph")

    gm = torch.fx.symbolic_trace(step)
    with torch.no_grad():
        run = _torch.compile_with_inductor(gm, inputs, partition, _torch.inductor_inner_compile, 64, order)
        torch.testing.assert_close(run(*inputs), step(*inputs))
    (found,) = seen
    return found


@pytest.mark.parametrize(("rows", "kernels"), [(2**16, 2), (2**4, 1)], ids=["large", "small"])
def test_large_kernels_that_share_a_weight_alone_stay_two(rows, kernels):
    def step(x, y, w):
        return torch.relu(x * w), torch.relu(y * w)

    launches, _ = kernels_of(step, [torch.randn(rows, 32), torch.randn(rows, 32), torch.randn(32)])
    assert len(launches) == kernels


@pytest.mark.parametrize(
    ("reads", "rows", "apart"),
    [
        ([{"a"}, {"b"}], 2**20, True),
        ([{"a", "w"}, {"b", "w"}], 2**20, True),
        ([{"a"}, {"a"}], 2**20, False),
        ([{"a"}, {"a", "b"}], 2**20, False),
        ([{"w"}, {"b"}], 2**20, False),
        ([{"a"}, {"b"}], 2**8, False),
        ([{"a"}], 2**20, False),
    ],
)
def test_pieces_of_other_buffers_are_joined_one_by_one(reads, rows, apart):
    from torch._inductor.virtualized import V

    def piece(names):
        return SimpleNamespace(
            get_dtype=lambda: torch.float32,
            get_device=lambda: torch.device("cpu"),
            get_size=lambda: [rows, 4],
            get_read_names=lambda: names,
        )

    sizes = {"a": rows, "b": rows, "w": 4}
    sized = SimpleNamespace(get_buffer=lambda name: SimpleNamespace(get_numel=lambda: 16 * sizes[name]))
    with V.set_graph_handler(sized):
        assert _torch.joins_apart([piece(names) for names in reads]) is apart


def test_parts_of_a_concatenation_are_its_memory():
    def step(x, w):
        return (torch.cat([torch.softmax(x[k : k + 4] @ w, -1) for k in (0, 4)]) @ w.t(),)

    launches, buffers = kernels_of(step, [torch.randn(8, 16), torch.randn(16, 32)])
    (whole,) = (b for b in buffers if len(b.makers) == 2)
    assert whole.bytes == 8 * 32 * 4
    others = [b for b in buffers if b is not whole and b.makers and not b.returned]
    assert others and all(b.bytes <= 4 * 32 * 4 for b in others)
    assert len({launch.place for launch in launches}) == len(launches)


def test_inductor_tells_its_kernels_and_takes_an_order():
    def step(x, w):
        return (torch.softmax(x @ w, -1) @ w.t(),)

    launches, buffers = kernels_of(step, [torch.randn(8, 16), torch.randn(16, 32)])
    assert [launch.waits for launch in launches] == [frozenset(), {0}, {1}]
    made = [b for b in buffers if b.makers]
    assert KernelBuffer(8 * 32 * 4, frozenset({0}), frozenset({1}), False, frozenset({1})) in made
    assert KernelBuffer(8 * 32 * 4, frozenset({1}), frozenset({2})) in made
    assert KernelBuffer(8 * 16 * 4, frozenset({2}), frozenset(), True) in made


def test_what_two_outputs_are_computed_from_is_not_written_over():
    def step(x, w):
        product = x @ w
        return (product.sin() @ w, product.cos() @ w)

    _, buffers = kernels_of(step, [torch.randn(16, 16), torch.randn(16, 16)])
    (product,) = (b for b in buffers if b.makers == {0})
    assert product.readers == {1}
    assert product.overwriters == frozenset()


def test_an_order_of_too_few_kernels_is_refused():
    gm = torch.fx.symbolic_trace(lambda x: (torch.softmax(x @ x, -1),))
    with torch.no_grad(), pytest.raises(Exception, match="order"):
        _torch.compile_with_inductor(
            gm, [torch.randn(8, 8)], None, _torch.inductor_inner_compile, 64, lambda launches, buffers: []
        )


class Buffer:
    """As much of a scheduler's buffer as is asked for; also stands for what it is the buffer of."""

    def __init__(self, name: str, numel: int = 8) -> None:
        self.name, self.numel, self.node = name, numel, self
        self.users: list[SimpleNamespace] = []

    def get_name(self) -> str:
        return self.name

    def get_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def get_numel(self) -> int:
        return self.numel


class Part:
    """As much of a scheduler's node as is asked for: reads whole buffers, makes one."""

    def __init__(self, name: str, device: str, reads: list[Buffer], *, reduces: bool = False) -> None:
        self.name, self.device, self.reduces, self.parts = name, torch.device(device), reduces, [self]
        self.ancestors: set[str] = set()
        self.output = Buffer(f"out_{name}")
        deps = [KernelDep(buffer.name, "c0") for buffer in reads]
        self.read_writes = SimpleNamespace(reads=deps, reads_and_writes=lambda: deps)
        for buffer in reads:
            buffer.users.append(SimpleNamespace(node=self, can_inplace=True))

    def get_name(self) -> str:
        return self.name

    def get_nodes(self) -> list[Part]:
        return self.parts

    def get_outputs(self) -> list[Buffer]:
        return [self.output]

    def get_device(self) -> torch.device:
        return self.device

    def is_reduction(self) -> bool:
        return self.reduces

    def is_extern(self) -> bool:
        return False

    is_template = is_foreach = is_extern


class KernelDep(NamedTuple):
    """A read of a buffer at an index."""

    name: str
    index: str


def users_after(device: str, *, reduces: bool = False, small: bool = False) -> list[list[str]]:
    """Who counts as a reader of three inputs that three outputs are computed from, once they are shared."""
    sources = [Buffer("gate"), Buffer("up", 4 if small else 8), Buffer("grad")]
    parts = [Part("op0", device, sources[:2]), Part("op1", device, sources), Part("op2", device, sources)]
    parts[1].reduces = reduces
    other = Part("op9", device, sources[:1])
    fused = Part("fused", device, [])
    fused.parts = parts
    fused.scheduler = SimpleNamespace(name_to_donated_buffer={}, name_to_buf={b.name: b for b in sources})
    _torch.share_inputs(fused)
    assert other.name == "op9"
    return [[user.node.name for user in buffer.users] for buffer in sources]


def test_outputs_of_an_elementwise_gpu_kernel_are_each_given_an_input():
    assert users_after("cuda") == [["op9", "op0"], ["op1"], ["op2"]]


def test_an_input_of_another_size_is_left_alone():
    assert users_after("cuda", small=True) == [["op9", "op0"], ["op0", "op1", "op2"], ["op1"]]


@pytest.mark.parametrize(("device", "reduces"), [("cuda", True), ("cpu", False)])
def test_reductions_and_cpu_kernels_stay_as_inductor_has_them(device, reduces):
    every = ["op0", "op1", "op2"]
    assert users_after(device, reduces=reduces) == [[*every, "op9"], every, every[1:]]
