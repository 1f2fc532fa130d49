"""FLOPs against torch's own counter on real graphs, and by hand where torch has no formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphopt_cost_model.call import call_of
from graphopt_cost_model.flops import flops, work
from tests.cost_graphs import call_node, call_nodes, only, traced

aten = torch.ops.aten


def counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def step(model):
    """Forward and backward of a functionalised model, as one traceable function."""
    parameters = dict(model.named_parameters())

    def run(values, *inputs):
        loss = torch.func.functional_call(model, values, inputs).square().sum()
        return torch.autograd.grad(loss, list(values.values()))

    return run, parameters


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), (5, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)), (2, 3, 9, 9)),
        (nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.Conv2d(6, 2, 3)), (2, 3, 5, 5)),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.GroupNorm(2, 8)), (2, 4, 11)),
    ],
    ids=["mlp", "convolutions", "transposed", "conv1d"],
)
def test_training_steps_count_as_torch_counts_them(model, shape):
    run, parameters = step(model)
    data = torch.randn(shape)
    graph = traced(run, parameters, data)
    expected = counted(run, parameters, data)
    assert expected > 0
    assert sum(flops(node) for node in graph.nodes) == expected


def test_attention_by_hand_in_both_directions_on_the_cpu():
    query, key, value = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (8, 12, 12))

    def run(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out.sum(), (q, k, v))

    graph = traced(run, query, key, value)
    pair = 2 * 2 * 4 * 8 * 12 * 16
    assert flops(only(graph, aten._scaled_dot_product_flash_attention_for_cpu)) == 2 * pair
    assert flops(only(graph, aten._scaled_dot_product_flash_attention_for_cpu_backward)) == 5 * pair


@pytest.mark.parametrize(
    "op",
    [
        aten.scaled_dot_product_attention,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_cudnn_attention,
    ],
    ids=str,
)
def test_grouped_heads_count_every_query_head(op):
    query, key = torch.empty(1, 8, 6, 4), torch.empty(1, 2, 6, 4)
    assert flops(call_node(op.default, (query, key, key), torch.empty(1, 8, 6, 4))) == 4 * 8 * 6 * 6 * 4


def test_a_depthwise_backward_costs_twice_its_forward():
    weight, data = torch.randn(8, 1, 3, 3), torch.randn(2, 8, 6, 6)
    grad = torch.randn(2, 8, 6, 6)

    def run(g, x, w):
        return aten.convolution_backward(
            g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 8, [True, True, False]
        )

    forward = 2 * grad.numel() * 9
    assert flops(only(traced(run, grad, data, weight), aten.convolution_backward)) == 2 * forward


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (aten.mv, [(3, 5), (5,)], 2 * 15),
        (aten.dot, [(7,), (7,)], 14),
        (aten.addmv, [(3,), (3, 5), (5,)], 30),
        (aten.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        (aten._grouped_mm, [(3, 4, 8), (3, 8, 16)], 2 * 3 * 4 * 8 * 16),
        (aten.add, [(9,), (9,)], 0),
    ],
    ids=str,
)
def test_products_by_hand(function, shapes, expected):
    dtype = torch.bfloat16 if function is aten._grouped_mm else torch.float32
    tensors = [torch.ones(shape, dtype=dtype) for shape in shapes]
    assert flops(only(traced(function, *tensors), function)) == expected


def test_integer_products_count_as_products():
    left = torch.ones(32, 16, dtype=torch.int8)
    graph = traced(torch._int_mm, left, left.t().contiguous())
    assert flops(only(graph, aten._int_mm)) == 2 * 32 * 16 * 32


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], 2 * 24),
        ("...ij,...jk->...ik", [(5, 2, 3), (3, 4)], 2 * 5 * 24),
        ("bi,ij,j->b", [(2, 3), (3, 4), (4,)], 2 * (2 * 3 * 4 + 2 * 4)),
        ("ij,jk", [(2, 3), (3, 4)], 2 * 24),
    ],
)
def test_einsum_is_contracted_from_the_left(equation, shapes, expected):
    operands = [torch.empty(shape) for shape in shapes]
    assert flops(call_node(aten.einsum.default, (equation, operands), torch.empty(1))) == expected


def test_recurrent_layers_meet_each_weight_once_a_step():
    layer = nn.LSTM(6, 5)
    weights = dict(layer.named_parameters())
    graph = traced(lambda w, x: torch.func.functional_call(layer, w, x)[0], weights, torch.randn(7, 3, 6))
    total = sum(flops(node) for node in graph.nodes)
    assert total == 2 * 7 * 3 * (4 * 5 * 6 + 4 * 5 * 5)


def test_transforms_count_five_n_log_n_at_the_vector_rate():
    node = only(traced(torch.fft.fft, torch.ones(3, 8, dtype=torch.complex64)), aten._fft_c2c)
    found = work(call_of(node))
    assert (found.flops, found.on_vectors) == (5 * 24 * 3, True)


def test_symbolic_sizes_count_as_they_were_traced():
    graph = traced(torch.mm, torch.ones(6, 4), torch.ones(4, 5), symbolic=True)
    assert flops(only(graph, aten.mm)) == 2 * 6 * 4 * 5


def test_views_and_size_arithmetic_do_nothing():
    graph = traced(lambda x: x.t().unsqueeze(0).expand(3, -1, -1).chunk(2, 1)[0], torch.ones(4, 6))
    assert call_nodes(graph)
    assert all(work(call_of(node)).elements == 0 for node in call_nodes(graph))
