"""Repeated blocks are found by structure, on real models and on nets made to mislead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.capture.blocks import find_blocks
from graphopt.capture.repeats import find_repeats
from tests.semantic import capture

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(24).reshape(2, 12) % 64


def trace(function: Callable[..., Any], *inputs: torch.Tensor) -> GraphModule:
    """``function`` as semantic ATen over fake inputs."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        gm = make_fx(function, pre_dispatch=True, tracing_mode="real")(*fakes)
    for node, fake in zip(gm.graph.nodes, fakes, strict=False):
        node.meta["example_value"] = fake
    return gm


def shapes(gm: GraphModule, **options: int) -> list[tuple[int, int]]:
    """(blocks, values crossing) of every run."""
    return [(len(run), run.crossing) for run in find_blocks(gm.graph, **options).runs]


def graph_of(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    (captured,) = capture(function, *inputs)
    return captured.gm


@pytest.mark.parametrize("layers", [2, 8])
def test_llama_layers_are_one_run(layers: int) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=layers, **DECODER)
    model = transformers.LlamaForCausalLM(config)
    gm = graph_of(lambda ids: model(input_ids=ids, labels=ids).loss, IDS)
    blocks = find_blocks(gm.graph)
    assert [(len(run), run.crossing) for run in blocks.runs] == [(layers, 1)]
    nodes = {node.name: node for node in gm.graph.nodes}
    for block in blocks.runs[0].blocks:
        targets = [str(nodes[name].target) for name in block]
        assert targets.count("aten.scaled_dot_product_attention.default") == 1
        assert targets.count("aten.linear.default") == 7


def test_cached_keys_as_outputs_do_not_move_the_cut() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    gm = graph_of(lambda ids: model(input_ids=ids, use_cache=True).to_tuple(), IDS)
    assert shapes(gm) == [(3, 1)]


def test_encoder_and_decoder_are_two_runs() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    gm = graph_of(lambda ids: model(input_ids=ids, labels=ids).loss, IDS)
    # The first layer of each computes the position bias that the others read.
    assert shapes(gm) == [(3, 1), (3, 1)]


def test_vit_layers_are_one_run() -> None:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config)
    assert shapes(graph_of(lambda x: model(x).logits, torch.randn(2, 3, 32, 32))) == [(4, 1)]


def test_mixtral_layers_are_one_run() -> None:
    config = transformers.MixtralConfig(num_hidden_layers=2, num_local_experts=4, **DECODER)
    model = transformers.MixtralForCausalLM(config)
    assert shapes(graph_of(lambda ids: model(input_ids=ids, labels=ids).loss, IDS)) == [(2, 1)]


class Basic(nn.Module):
    def __init__(self, width: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


def resnet(depths: tuple[int, ...], *, inplace: bool = False) -> nn.Module:
    stages: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1)]
    for i, depth in enumerate(depths):
        width = 4 << i
        stages += [Basic(width, inplace) for _ in range(depth)]
        stages.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
    return nn.Sequential(*stages)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_each_stage_of_a_resnet_is_a_run(inplace: bool, training: bool) -> None:
    model = resnet((3, 4, 2), inplace=inplace).train(training)
    gm = graph_of(lambda x: model(x).sum(), torch.randn(2, 3, 16, 16))
    assert shapes(gm) == [(3, 1), (4, 1), (2, 1)]


def test_layers_that_differ_in_size_are_no_blocks() -> None:
    sizes = [16, 24, 20, 28, 12, 36, 18, 22]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
    blocks = find_blocks(graph_of(lambda x: nn.Sequential(*layers)(x).sum(), torch.randn(4, 16)).graph)
    assert not blocks
    assert blocks.runs == () and blocks.declined == ()


def test_shared_weights_and_frozen_weights() -> None:
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.layer_norm(x @ w, [8])).sigmoid().mul(2).sub(1) + x

    def shared(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = block(x, w)
        return x.sum()

    assert shapes(trace(shared, torch.randn(4, 8), torch.randn(8, 8))) == [(5, 1)]

    def stack(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = block(x, w)
        return x.sum()

    weights = [torch.randn(8, 8, requires_grad=i >= 3) for i in range(6)]
    assert shapes(trace(stack, torch.randn(4, 8), *weights)) == [(3, 1), (3, 1)]


def test_equal_labels_with_other_wiring_are_no_blocks() -> None:
    def even(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = F.gelu(x @ w)
        return (h.sin() + x).cos().exp() * h

    def odd(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = F.gelu(x @ w)
        return (h.sin() + h).cos().exp() * h

    def alternating(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for i, w in enumerate(weights):
            x = (odd if i % 2 else even)(x, w)
        return x.sum()

    gm = trace(alternating, torch.randn(8, 8), *[torch.randn(8, 8) for _ in range(6)])
    (run,) = find_blocks(gm.graph).runs
    assert len(run) == 3 and len(run.blocks[0]) == 14


def test_dead_code_and_a_different_first_block_do_not_hide_the_rest() -> None:
    def stack(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for i, w in enumerate(weights):
            if i == 2:
                torch.ones_like(x).cumsum(0)
            scale = x.abs().mean() if i == 0 else 1.0
            x = F.gelu(F.layer_norm(x @ w, [8])).sigmoid().mul(scale).sub(1) + x
        return x.sum()

    gm = trace(stack, torch.randn(4, 8), *[torch.randn(8, 8) for _ in range(6)])
    assert "cumsum" in gm.code
    assert shapes(gm) == [(5, 1)]


def test_a_residual_stream_written_in_place_is_declined_with_the_reason() -> None:
    def stack(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for w in weights:
            x += F.gelu(F.layer_norm(x @ w, [8])).sigmoid().mul(2).sub(1)
        return x.sum()

    blocks = find_blocks(trace(stack, torch.randn(4, 8), *[torch.randn(8, 8) for _ in range(4)]).graph)
    assert blocks.runs == ()
    assert "memory is written in place after it was used (clone, add_" in str(blocks.declined[0])


def test_too_many_crossing_values_are_declined_with_their_number() -> None:
    def stack(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        parts = [x + i for i in range(4)]
        for w in weights:
            parts = [(p @ w).sin().cos().exp().tanh().sigmoid() for p in parts]
        return sum(parts, start=torch.zeros(())).sum()

    gm = trace(stack, torch.randn(4, 4), *[torch.randn(4, 4) for _ in range(5)])
    assert shapes(gm, least_nodes=24) == [(5, 4)]
    blocks = find_blocks(gm.graph, least_nodes=24, most_crossing=3)
    assert blocks.runs == ()
    assert str(blocks.declined[0]).startswith("4 values cross from one repetition to the next (")


def test_repeats_are_maximal_and_short_periods_are_grouped() -> None:
    labels = [9, 8, *([1, 2, 3, 4, 5] * 4), 1, 2, 7, 6]
    best = find_repeats(labels, least=4)[0]
    assert (best.period, best.start, best.stop, best.count, best.saved) == (5, 2, 24, 4, 15)
    grouped = find_repeats([1, 2] * 12, least=5)[0]
    assert (grouped.period, grouped.count) == (6, 4)
    assert find_repeats(list(range(50)), least=4) == []


def test_four_times_the_blocks_take_four_times_the_work() -> None:
    def stack(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for w in weights:
            h = F.gelu(F.layer_norm(x @ w, [8]))
            for _ in range(5):
                h = h.sin().cos()
            x = x + h
        return x.sum()

    few = trace(stack, torch.randn(4, 8), *[torch.randn(8, 8) for _ in range(4)])
    assert shapes(few) == [(4, 1)]
    found: list[int] = []

    def find(graph: torch.fx.Graph) -> None:
        found.extend(len(run) for run in find_blocks(graph).runs)

    graphs = [repeated(few, count) for count in (250, 1000)]
    once, more = (calls_of(partial(find, graph)) for graph in graphs)
    assert found == [250, 1000] and len(graphs[1].nodes) > 15_000
    assert more <= 4.1 * once


def calls_of(work: Callable[[], object]) -> int:
    """How many functions of Python ``work`` calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def repeated(gm: GraphModule, count: int) -> torch.fx.Graph:
    """The first block of a stack ``count`` times over, each with a weight of its own.

    Tracing a thousand blocks would take longer than all other tests together.
    """
    (run,) = find_blocks(gm.graph).runs
    nodes = {node.name: node for node in gm.graph.nodes}
    block = [nodes[name] for name in run.blocks[0]]
    outside = dict.fromkeys(ref for node in block for ref in node.all_input_nodes if ref not in block)
    stream, weight = outside
    graph = torch.fx.Graph()
    value = graph.node_copy(stream)
    for _ in range(count):
        copies = {stream: value, weight: graph.node_copy(weight)}
        for node in block:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        value = copies[block[-1]]
    graph.output(value)
    return graph
