"""The order of kernels: valid, never worse than the given one, the best where all can be tried."""

from __future__ import annotations

from itertools import permutations

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
        buffers.append(KernelBuffer(size, index, frozenset(readers[index]), returned, over))
    held = draw(st.frozensets(st.integers(0, count - 1), min_size=1, max_size=2))
    buffers.append(KernelBuffer(draw(st.integers(1, 9)), None, held))
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
    buffers = [KernelBuffer(4, index, frozenset(), True) for index in range(3)]
    assert least_memory_order(launches, buffers) == [0, 1, 2]


def test_what_is_written_over_its_input_counts_once():
    launches = [KernelLaunch(frozenset()), KernelLaunch(frozenset({0}))]
    source = KernelBuffer(100, None, frozenset({0}), overwriters=frozenset({0}))
    buffers = [source, KernelBuffer(100, 0, frozenset({1})), KernelBuffer(10, 1, frozenset(), True)]
    assert peak_of(launches, buffers, [0, 1]) == 10
    buffers[0] = source._replace(overwriters=frozenset())
    assert peak_of(launches, buffers, [0, 1]) == 100


def test_a_large_graph_takes_a_narrow_beam():
    launches = [KernelLaunch(frozenset({index - 1} if index else ())) for index in range(3_000)]
    buffers = [KernelBuffer(1, index, frozenset({index + 1}), False) for index in range(2_999)]
    assert least_memory_order(launches, buffers) == list(range(3_000))


def test_inductor_tells_its_kernels_and_takes_an_order():
    seen = []

    def order(launches, buffers):
        seen.append((launches, buffers))
        return least_memory_order(launches, buffers)

    def partition(joint, outputs):
        raise AssertionError("inference has no joint graph")

    def step(x, w):
        return (torch.softmax(x @ w, -1) @ w.t(),)

    x, w = torch.randn(8, 16), torch.randn(16, 32)
    gm = torch.fx.symbolic_trace(step)
    with torch.no_grad():
        run = _torch.compile_with_inductor(gm, [x, w], partition, _torch.inductor_inner_compile, 64, order)
        torch.testing.assert_close(run(x, w)[0], step(x, w)[0])
    launches, buffers = seen[0]
    assert [launch.waits for launch in launches] == [frozenset(), {0}, {1}]
    made = [b for b in buffers if b.made_by is not None]
    assert KernelBuffer(8 * 32 * 4, 0, frozenset({1}), False, frozenset({1})) in made
    assert KernelBuffer(8 * 32 * 4, 1, frozenset({2})) in made
    assert KernelBuffer(8 * 16 * 4, 2, frozenset(), True) in made


def test_what_two_outputs_are_computed_from_is_not_written_over():
    seen = []

    def order(launches, buffers):
        seen.append(buffers)
        return list(range(len(launches)))

    def step(x, w):
        product = x @ w
        return (product.sin() @ w, product.cos() @ w)

    x = torch.randn(16, 16)
    with torch.no_grad():
        _torch.compile_with_inductor(
            torch.fx.symbolic_trace(step), [x, x], None, _torch.inductor_inner_compile, 64, order
        )
    (product,) = (b for b in seen[0] if b.made_by == 0)
    assert product.readers == {1}
    assert product.overwriters == frozenset()


def test_an_order_of_too_few_kernels_is_refused():
    gm = torch.fx.symbolic_trace(lambda x: (torch.softmax(x @ x, -1),))
    with torch.no_grad(), pytest.raises(Exception, match="order"):
        _torch.compile_with_inductor(
            gm, [torch.randn(8, 8)], None, _torch.inductor_inner_compile, 64, lambda launches, buffers: []
        )


class Part:
    """As much of a scheduler's node as is asked for."""

    def __init__(self, name: str, device: str, *, reduces: bool = False, library: bool = False) -> None:
        self.name, self.device, self.reduces, self.library = name, torch.device(device), reduces, library
        self.ancestors: set[str] = set()
        self.parts = [self]

    def get_name(self) -> str:
        return self.name

    def get_nodes(self) -> list[Part]:
        return self.parts

    def get_device(self) -> torch.device:
        return self.device

    def is_reduction(self) -> bool:
        return self.reduces

    def is_extern(self) -> bool:
        return self.library

    def is_template(self) -> bool:
        return False

    def is_foreach(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("device", "reduces", "shared"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_outputs_of_elementwise_gpu_kernels_share_their_inputs(device, reduces, shared):
    parts = [Part("op0", device), Part("op1", device, reduces=reduces), Part("op2", device)]
    fused = Part("fused", device)
    fused.parts = parts
    _torch.share_inputs(fused)
    expected = [{"op1", "op2"}, {"op0", "op2"}, {"op0", "op1"}] if shared else [set()] * 3
    assert [part.ancestors for part in parts] == expected
