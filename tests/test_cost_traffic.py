"""Bytes moved, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from graphopt_cost_model.traffic import Traffic, traffic
from graphopt_kernels.optimizer_update import adam_update
from tests.cost_graphs import call_nodes, only, traced

aten = torch.ops.aten


def moved(function, *inputs, op=None):
    nodes = call_nodes(traced(function, *inputs))
    node = only(nodes[0].graph, op) if op is not None else nodes[-1]
    return traffic(node)


def test_pointwise_reads_each_input_once_and_writes_the_output():
    assert moved(torch.add, torch.ones(8, 4), torch.ones(8, 4)) == Traffic(2 * 128, 128)
    assert moved(lambda x: x * x, torch.ones(8, 4)) == Traffic(128, 128)


def test_dtypes_count():
    assert moved(lambda x: x.to(torch.bfloat16), torch.ones(100)) == Traffic(400, 200)


def test_an_expanded_input_is_read_once():
    assert moved(lambda x, y: x.expand(16, 8) + y, torch.ones(8), torch.ones(16, 8)).read == 32 + 512


def test_a_strided_view_reads_its_own_elements_only():
    assert moved(lambda x: x[:, ::2] * 2, torch.ones(8, 8)).read == 8 * 4 * 4


def test_overlapping_windows_are_read_once():
    assert moved(lambda x: x.unfold(0, 4, 1) * 2, torch.ones(10)).read == 40


def test_views_move_nothing():
    for node in call_nodes(traced(lambda x: x.view(4, 8).t().split(2, 1)[1][0], torch.ones(32))):
        assert traffic(node) == Traffic(), node


def test_in_place_writes_its_target():
    assert moved(lambda x, y: x.clone().add_(y), torch.ones(10), torch.ones(10), op=aten.add_) == Traffic(
        80, 40
    )


def test_copy_does_not_read_what_it_overwrites():
    assert moved(lambda x, y: aten.copy(x, y), torch.ones(10), torch.ones(10)) == Traffic(40, 40)


@pytest.mark.parametrize("fill", [torch.zeros_like, torch.rand_like])
def test_filling_reads_nothing(fill):
    assert moved(fill, torch.ones(10)) == Traffic(0, 40)


def test_empty_moves_nothing():
    assert moved(torch.empty_like, torch.ones(10)) == Traffic()


def test_embedding_reads_the_rows_that_it_uses():
    table, rows = torch.ones(1000, 4), torch.zeros(3, dtype=torch.long)
    assert moved(lambda w, i: aten.embedding(w, i), table, rows) == Traffic(3 * 16 + 24, 48)


def test_embedding_backward_writes_the_table_and_its_rows():
    grad, rows = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    found = moved(lambda g, i: aten.embedding_dense_backward(g, i, 1000, -1, False), grad, rows)
    assert found == Traffic(48 + 24 + 48, 16000 + 48)


def test_gather_reads_what_it_picks():
    index = torch.zeros(10, 1, dtype=torch.long)
    assert moved(lambda x, i: x.gather(1, i), torch.ones(10, 100), index) == Traffic(40 + 80, 40)


def test_scatter_copies_unless_in_place():
    base, index, source = torch.ones(10, 100), torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1)
    plain = moved(lambda b, i, s: b.scatter(1, i, s), base, index, source)
    assert plain == Traffic(4000 + 80 + 40, 4000 + 40)
    added = moved(lambda b, i, s: b.clone().scatter_add_(1, i, s), base, index, source, op=aten.scatter_add_)
    assert added == Traffic(80 + 40 + 40, 40)


def test_index_put_reads_rows_again_only_to_accumulate():
    base, index, values = torch.ones(100, 4), torch.zeros(3, dtype=torch.long), torch.ones(3, 4)
    put = moved(lambda b, i, v: b.index_put((i,), v), base, index, values)
    added = moved(lambda b, i, v: b.index_put((i,), v, accumulate=True), base, index, values)
    assert put == Traffic(1600 + 24 + 48, 1600 + 48)
    assert added == Traffic(put.read + 48, put.written)


def test_nll_reads_one_score_a_row():
    scores, target = torch.ones(10, 500), torch.zeros(10, dtype=torch.long)
    graph = traced(lambda s, t: torch.nn.functional.nll_loss(s, t), scores, target)
    found = traffic(only(graph, aten.nll_loss_forward))
    assert found.read == 10 * 4 + 10 * 8


def test_attention_reads_query_key_value():
    q = torch.ones(1, 2, 8, 4)
    graph = traced(lambda x: aten._scaled_dot_product_flash_attention_for_cpu(x, x + 1, x + 2), q)
    found = traffic(only(graph, aten._scaled_dot_product_flash_attention_for_cpu))
    assert found.read == 3 * q.nbytes
    assert found.written == q.nbytes + 2 * 8 * 4


def test_a_product_moves_its_matrices():
    assert moved(torch.mm, torch.ones(3, 4), torch.ones(4, 5)) == Traffic(48 + 80, 60)


def test_an_update_reads_all_and_writes_parameters_and_states():
    lists = [[torch.ones(8, 4), torch.ones(16)] for _ in range(4)]

    def update(*tensors):
        given = [list(tensors[k : k + 2]) for k in range(0, 8, 2)]
        numbers = [1.0, 0.99, 0.0, 0.1, 0.99, 0.01, 0.02, 0.3, 1e-8]
        adam_update(*given, numbers, [tensors[8]], [6])
        return tensors[0] + 0

    tensors = [tensor for each in lists for tensor in each]
    found = moved(update, *tensors, torch.ones(()), op=adam_update.overloadpacket)
    once = 4 * (32 + 16)
    assert found == Traffic(4 * once + 4, 3 * once)
