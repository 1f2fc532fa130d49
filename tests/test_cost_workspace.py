"""Transients inside CPU kernels, measured by probing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from graphopt_cost_model.call import call_of
from graphopt_cost_model.resize import resized
from graphopt_cost_model.workspace import WorkspaceProbe
from tests.cost_graphs import call_node, call_nodes, only, traced

aten = torch.ops.aten


def workspace(function, *inputs, op):
    return WorkspaceProbe().bytes(only(traced(function, *inputs), op))


def test_softmax_of_a_transposed_tensor_copies_it():
    data = torch.ones(32, 16, 8)
    assert workspace(lambda x: x.softmax(-1), data, op=aten._softmax) == 0
    assert workspace(lambda x: x.transpose(0, 2).softmax(-1), data, op=aten._softmax) == data.nbytes


def test_promotion_converts_one_side():
    low, high = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000)
    found = workspace(lambda x, y: aten.atan2(x, y), low, high, op=aten.atan2)
    assert found == 4000


def test_a_product_of_plain_matrices_has_none():
    assert workspace(torch.mm, torch.ones(64, 64), torch.ones(64, 64), op=aten.mm) == 0


def test_views_and_other_devices_have_none():
    probe = WorkspaceProbe()
    view = call_nodes(traced(lambda x: x.t(), torch.ones(4, 4)))[0]
    elsewhere = torch.empty(4, 4, device="meta")
    assert probe.bytes(view) == 0
    assert probe.bytes(call_node(aten._softmax.default, (elsewhere.t(), -1, False), elsewhere)) == 0
    assert not probe.unprobed


def test_mutating_operators_are_probed_on_inputs_of_their_own():
    data = torch.ones(100)
    node = call_node(aten.add_.Tensor, (data, torch.ones(100)), data)
    assert WorkspaceProbe().bytes(node) == 0
    assert torch.equal(data, torch.ones(100))


def test_indices_of_made_up_inputs_are_valid():
    table, rows = torch.ones(10, 8), torch.full((5,), 7)
    probe = WorkspaceProbe()
    node = call_node(aten.embedding.default, (table, rows), torch.empty(5, 8))
    scores = call_node(
        aten.nll_loss_forward.default, (table, rows[:1].expand(10), None, 1, -100), torch.empty(())
    )
    probe.bytes(node), probe.bytes(scores)
    assert not probe.unprobed


def test_the_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    WorkspaceProbe().bytes(
        call_node(aten.native_dropout.default, (torch.ones(77), 0.5, True), torch.empty(77))
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_probing_runs_on_real_tensors_under_a_fake_mode():
    node = only(traced(lambda x: x.t().softmax(-1), torch.ones(24, 40)), aten._softmax)
    with FakeTensorMode():
        probe = WorkspaceProbe()
        assert probe.bytes(node) == 24 * 40 * 4
    assert not probe.unprobed


def test_an_operator_that_refuses_is_listed_and_counts_as_none():
    matrix = torch.ones(3, 4)
    probe = WorkspaceProbe()
    assert probe.bytes(call_node(aten.cholesky.default, (matrix,), torch.empty(3, 4))) == 0
    assert list(probe.unprobed) == ["aten.cholesky.default"]
    assert "square" in probe.unprobed["aten.cholesky.default"]


def test_a_running_profiler_is_a_reason_and_not_remembered():
    node = only(traced(lambda x: x.t().softmax(-1), torch.ones(23, 41)), aten._softmax)
    with torch.autograd.profiler.profile():
        probe = WorkspaceProbe()
        assert probe.bytes(node) == 0
    assert probe.unprobed == {"aten._softmax.default": "another profiler runs on this thread"}
    assert WorkspaceProbe().bytes(node) == 23 * 41 * 4


@pytest.mark.parametrize("shape", [(2048, 16, 8), (16, 8, 4096)])
def test_large_calls_are_extrapolated_exactly_where_the_workspace_is_linear(shape):
    data = torch.ones(shape)
    node = only(traced(lambda x: x.transpose(0, 2).softmax(-1), data), aten._softmax)
    assert WorkspaceProbe(limit_bytes=100_000).bytes(node) == data.nbytes


def test_large_calls_are_extrapolated_exactly_where_it_is_quadratic():
    data = torch.ones(512, 512)
    node = only(traced(lambda x: x.t().softmax(-1), data), aten._softmax)
    whole, scaled = WorkspaceProbe(), WorkspaceProbe(limit_bytes=600_000)
    assert scaled.bytes(node) == whole.bytes(node) >= data.nbytes
    assert scaled.estimated == {"aten._softmax.default": whole.bytes(node)}
    assert whole.estimated == {}


def test_all_dimensions_shrink_where_one_is_not_enough():
    data = torch.ones(512, 1024)
    node = only(traced(lambda x: x.t().log_softmax(-1), data), aten._log_softmax)
    whole, scaled = WorkspaceProbe(), WorkspaceProbe(limit_bytes=40_000)
    # The small sizes run on one thread with smaller chunks: an estimate, within a factor of two.
    assert whole.bytes(node) / 2 <= scaled.bytes(node) <= whole.bytes(node) * 2
    assert not scaled.unprobed


def test_what_cannot_be_made_small_is_listed():
    data = torch.ones(31, 31, 31)
    node = only(traced(lambda x: x.transpose(0, 2).softmax(-1), data), aten._softmax)
    probe = WorkspaceProbe(limit_bytes=1000)
    assert probe.bytes(node) == 0
    assert probe.unprobed["aten._softmax.default"] == "no smaller size of its dimensions is small enough"


def test_resizing_keeps_the_order_of_strides_and_what_is_expanded():
    data = torch.ones(64, 8).t()
    node = call_node(aten.mul.Tensor, (data, torch.ones(8, 1).expand(8, 64)), torch.empty(8, 64))
    left, right = resized(call_of(node), {64: 16}).inputs
    assert (left.shape, left.stride) == ((8, 16), (1, 8))
    assert (right.shape, right.stride) == ((8, 16), (1, 0))
