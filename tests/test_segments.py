"""A program cut into segments computes, forward and backward, bit for bit what the program does."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import _torch
from graphopt.capture.ambient import ambient_map
from graphopt.capture.blocks import Blocks, Run, find_blocks
from graphopt.capture.chain import Segmented
from graphopt.capture.cuts import cut_map
from graphopt.capture.segments import split
from graphopt.capture.structure import fingerprint_graph, line_of
from graphopt.chain_run import ChainRunner
from graphopt.errors import CaptureError, InputsError
from tests.semantic import Captured, capture
from tests.steps import assert_close, run_step

IDS = torch.arange(24).reshape(2, 12) % 64


class Layer(nn.Module):
    """Attention-free transformer layer with what makes cutting hard: dropout, statistics, writes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.up(self.norm(x)), inplace=True)
        return x + F.dropout(self.down(h), 0.3, self.training)


class Stack(nn.Module):
    def __init__(self, layers: int = 4, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def one(function: Callable[..., Any], *inputs: Any) -> Captured:
    (captured,) = capture(function, *inputs)
    return captured


def cut(captured: Captured) -> Segmented:
    return split(captured.gm, find_blocks(captured.gm.graph))


def outcome(run: Callable[[list[Any]], Any], inputs: list[Any]) -> list[torch.Tensor]:
    """Outputs, gradients and inputs after one step from fixed seeds on copies of ``inputs``."""
    copies: dict[int, Any] = {}
    for x in inputs:
        if isinstance(x, torch.Tensor):
            copies[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    mine = [copies.get(id(x), x) for x in inputs]
    torch.manual_seed(0)
    outputs = [o for o in torch.utils._pytree.tree_leaves(run(list(mine))) if isinstance(o, torch.Tensor)]
    losses = [o.float().sum() for o in outputs if o.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    tensors = [x for x in mine if isinstance(x, torch.Tensor)]
    missing = torch.tensor(float("inf"))
    return [*outputs, *tensors, *[missing if x.grad is None else x.grad for x in tensors]]


def runner(segmented: Segmented, functions: list[Callable[..., Any]] | None = None) -> ChainRunner:
    """A driver over one function per segment, by default the segments' own modules."""
    chosen = functions or [segment.gm for segment in segmented.segments]
    return ChainRunner(segmented, [chosen[call.segment] for call in segmented.calls])


def assert_same(captured: Captured, segmented: Segmented) -> None:
    whole = outcome(lambda xs: captured.gm(*xs), captured.inputs)
    chain = outcome(runner(segmented), captured.inputs)
    assert len(whole) == len(chain)
    for expected, got in zip(whole, chain, strict=True):
        assert expected.dtype == got.dtype
        assert torch.equal(expected, got)


def test_dropout_statistics_and_writes_inside_blocks() -> None:
    captured = one(Stack(), torch.randn(6, 8))
    segmented = cut(captured)
    assert [call.segment for call in segmented.calls] == [0, 0, 0, 0, 1]
    assert_same(captured, segmented)
    counters = [x for x in captured.inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64]
    assert len(counters) == 4


def transformers_models() -> dict[str, Callable[[], tuple[Callable[..., Any], Any]]]:
    transformers = pytest.importorskip("transformers")
    decoder = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }

    def language(model: nn.Module) -> tuple[Callable[..., Any], Any]:
        return (lambda ids: model(input_ids=ids, labels=ids).loss), IDS

    def llama() -> tuple[Callable[..., Any], Any]:
        config = transformers.LlamaConfig(num_hidden_layers=2, **decoder)
        return language(transformers.LlamaForCausalLM(config))

    def gpt2() -> tuple[Callable[..., Any], Any]:
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
        )
        model = transformers.GPT2LMHeadModel(config)
        targets = IDS.flatten()
        return (lambda ids: F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets)), IDS

    def bert() -> tuple[Callable[..., Any], Any]:
        config = transformers.BertConfig(vocab_size=64, max_position_embeddings=64, **sizes)
        return language(transformers.BertForMaskedLM(config))

    def t5() -> tuple[Callable[..., Any], Any]:
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
        return language(transformers.T5ForConditionalGeneration(config))

    def vit() -> tuple[Callable[..., Any], Any]:
        config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
        model = transformers.ViTForImageClassification(config)
        return (lambda x: model(x).logits), torch.randn(2, 3, 32, 32)

    return {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit}


@pytest.mark.parametrize(
    ("name", "segments", "calls"),
    [("llama", 3, 4), ("gpt2", 3, 5), ("bert", 3, 5), ("t5", 5, 7), ("vit", 3, 5)],
)
def test_transformers_models(name: str, segments: int, calls: int) -> None:
    function, inputs = transformers_models()[name]()
    captured = one(function, inputs)
    segmented = cut(captured)
    assert (len(segmented.segments), len(segmented.calls)) == (segments, calls)
    assert segmented.declined == ()
    assert_same(captured, segmented)


def test_autocast_regions_are_established_again_in_each_segment() -> None:
    model = Stack()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    captured = one(step, torch.randn(6, 8))
    segmented = cut(captured)
    assert len(segmented.calls) == 5
    for segment in segmented.segments:
        targets = [node.target for node in segment.gm.graph.nodes]
        assert targets.count(_torch.enter_autocast()) == targets.count(_torch.exit_autocast()) == 1
    assert_same(captured, segmented)
    assert outcome(runner(segmented), captured.inputs)[0].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_no_grad_regions_are_established_again_in_each_segment() -> None:
    teacher, student = Stack(), Stack()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            aim = teacher(x)
        return F.mse_loss(student(x), aim)

    captured = one(step, torch.randn(6, 8))
    segmented = cut(captured)
    assert [len(run) for run in find_blocks(captured.gm.graph).runs] == [4, 4]
    assert_same(captured, segmented)
    assert torch.is_grad_enabled()
    assert len({segment.fingerprint for segment in segmented.segments}) == len(segmented.segments) == 4


def test_trained_says_which_inputs_gradients_flow_to() -> None:
    model = Stack(layers=3)
    model.head.bias.requires_grad_(False)
    captured = one(model, torch.randn(6, 8))
    block, head = cut(captured).segments
    flows = dict(zip((tuple(x.shape) for x in block.example_inputs()), block.trained, strict=True))
    # The stream counts: the first block's needs no gradient, the others' do. Statistics never do.
    assert flows[(6, 8)] and flows[(16, 8)] and not flows[()]
    assert head.trained == (True, True, False)
    assert [x.requires_grad for x in head.example_inputs()] == [True, True, False]


@pytest.mark.parametrize("training", [False, True])
def test_compiled_segments_give_the_same_gradients(training: bool) -> None:
    captured = one(Stack(layers=3).train(training), torch.randn(6, 8))
    segmented = cut(captured)
    compiled = [torch.compile(segment.gm, backend="aot_eager") for segment in segmented.segments]
    whole = outcome(lambda xs: captured.gm(*xs), captured.inputs)
    for expected, got in zip(whole, outcome(runner(segmented, compiled), captured.inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_views_across_a_cut_keep_their_gradients() -> None:
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(4)]

    def stack(x: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = F.gelu(F.layer_norm(x.view(4, 8) @ w, [8])).sigmoid().mul(2).sub(1).t().t()
        return x.sum()

    captured = one(stack, torch.randn(4, 8))
    segmented = cut(captured)
    assert len(segmented.calls) >= 5
    assert_same(captured, segmented)


def test_a_write_that_a_cut_would_part_from_its_view_is_refused() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        base = x.sin()
        part = base.view(-1)
        other = base + 1
        base.mul_(2)
        return (part * other.view(-1)).sum()

    captured = one(step, torch.randn(4, 8, requires_grad=True))
    line = line_of(captured.gm.graph)
    cuts = cut_map(line)
    names = [node.name for node in line.nodes]
    write = names.index("mul_")
    assert not any(cuts.free[1 : write + 1]) and all(cuts.free[write + 1 :])
    assert str(cuts.why_not(write)) == "memory is written in place after it was used (sin, mul_)"
    assert cuts.why_not(write + 1) is None
    halves = Blocks((Run((tuple(names[:2]), tuple(names[2:4])), 1),), ())
    segmented = split(captured.gm, halves)
    assert len(segmented.calls) == 1
    assert "memory is written in place after it was used" in str(segmented.declined[0])
    assert_same(captured, segmented)


def test_a_buffer_that_every_block_writes_keeps_the_blocks_together() -> None:
    model = Stack(layers=3)
    for layer in model.layers[1:]:
        layer.norm = model.layers[0].norm
    captured = one(model, torch.randn(6, 8))
    blocks = find_blocks(captured.gm.graph)
    assert blocks.runs == ()
    assert "written in place" in str(blocks.declined[0])
    assert_same(captured, split(captured.gm, blocks))


def test_tuples_are_not_passed_between_segments() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        first, second = x.sin().split(2, dim=1)
        return (first * second).sum()

    line = line_of(one(step, torch.randn(4, 4)).gm.graph)
    cuts = cut_map(line)
    split_at = [node.name for node in line.nodes].index("split")
    assert str(cuts.why_not(split_at + 1)) == "a list cannot be passed between parts (split)"


def test_a_gradient_mode_that_is_not_restored_forbids_cuts_after_it() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    sin = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.call_function(_torch.set_grad_enabled(), (False,))
    cos = graph.call_function(torch.ops.aten.cos.default, (sin,))
    graph.output((graph.call_function(torch.ops.aten.neg.default, (cos,)),))
    for node in graph.nodes:
        node.meta["val"] = torch.ones(2) if node.target is not _torch.set_grad_enabled() else None
    cuts = cut_map(line_of(graph))
    assert cuts.free == (True, True, False, False, True)
    assert "switches the gradient mode and does not restore it" in str(cuts.why_not(2))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert ambient_map(calls).entry_grad is False


def test_random_order_and_large_constants() -> None:
    table = torch.randn(10, 10)

    def step(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            noise = torch.rand_like(x)
            x = F.dropout((x @ table).sin().cos().tanh() + noise, 0.2, True).sigmoid().mul(2)
        return x.sum()

    captured = one(step, torch.randn(10, 10, requires_grad=True))
    assert len(cut(captured).calls) >= 4
    assert_same(captured, cut(captured))


def test_metadata_and_names_survive() -> None:
    captured = one(Stack(), torch.randn(6, 8))
    originals = {node.name: node for node in captured.gm.graph.nodes}
    for segment in cut(captured).segments:
        copies = [node for node in segment.gm.graph.nodes if node.op == "call_function"]
        assert [node.name for node in copies] == list(segment.nodes)
        for node in copies:
            original = originals[node.name]
            assert node.meta["val"] is original.meta["val"]
            for key in ("nn_module_stack", "stack_trace"):
                assert node.meta.get(key) == original.meta.get(key)


def test_fingerprints_tell_structure_not_names() -> None:
    first, second = (cut(one(Stack(), torch.randn(6, 8))).segments for _ in range(2))
    assert [s.fingerprint for s in first] == [s.fingerprint for s in second]
    wider = cut(one(Stack(width=4), torch.randn(6, 4))).segments
    assert first[0].fingerprint != wider[0].fingerprint
    assert fingerprint_graph(first[0].gm.graph) == first[0].fingerprint


def test_values_are_let_go_after_their_last_use() -> None:
    weights = [torch.randn(8, 8) for _ in range(4)]

    def stack(x: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = F.layer_norm(x @ w, [8]).sin().cos().exp().tanh()
        return x.sum()

    captured = one(stack, torch.randn(4, 8))
    segmented = cut(captured)
    streams: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(gm: torch.fx.GraphModule) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            outputs = gm(*arguments)
            gc.collect()
            alive.append(sum(ref() is not None for ref in streams))
            streams.extend(weakref.ref(value) for value in outputs)
            return outputs

        return call

    run = runner(segmented, [watch(segment.gm) for segment in segmented.segments])
    given = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in captured.inputs]
    run(given)
    assert given == []
    # What a call is given by the one before it, and nothing else.
    assert alive == [0] + [1] * (len(segmented.calls) - 1)


def test_wrong_numbers_and_foreign_blocks_are_named() -> None:
    captured = one(Stack(), torch.randn(6, 8))
    segmented = cut(captured)
    with pytest.raises(InputsError, match=f"{len(segmented.calls)} calls need as many functions, not 1"):
        ChainRunner(segmented, [segmented.segments[0].gm])
    with pytest.raises(InputsError, match=f"takes {len(captured.inputs)} inputs, not 1"):
        runner(segmented)([torch.zeros(6, 8)])
    foreign = Blocks((Run((("linearr",), ("linear_1",)), 1),), ())
    with pytest.raises(CaptureError, match=r"no call 'linearr' that its blocks name\n.*mean 'linear"):
        split(captured.gm, foreign)
    names = [node.name for node in line_of(captured.gm.graph).nodes]
    apart = Blocks((Run(((names[0],), (names[5],)), 1),), ())
    with pytest.raises(CaptureError, match="is not one stretch of the graph"):
        split(captured.gm, apart)
    plain = torch.fx.symbolic_trace(Stack())
    with pytest.raises(CaptureError, match="calls a module, and only functions can be cut apart"):
        split(plain, Blocks((), ()))
    unlike = Blocks((Run(((names[0],), (names[1],)), 1),), ())
    declined = split(captured.gm, unlike).declined
    assert [reason.text for reason in declined] == ["the blocks are not one program"]


def test_private_functions_that_segments_need() -> None:
    add = torch.ops.aten.add_.Tensor
    assert [a.alias_info is not None and a.alias_info.is_write for a in _torch.schema_of(add).arguments] == [
        True,
        False,
        False,
    ]
    assert _torch.schema_of(len) is None
    assert _torch.is_operator(add) and _torch.is_operator(torch.ops.aten.add)
    assert _torch.is_operator(torch.ops.higher_order.cond) and not _torch.is_operator(len)
    handle = _torch.enter_autocast()("cpu", torch.bfloat16, True, None)
    inside = torch.is_autocast_enabled("cpu")
    _torch.exit_autocast()(handle)
    assert inside and not torch.is_autocast_enabled("cpu")
    _torch.set_grad_enabled()(False)
    off = not torch.is_grad_enabled()
    _torch.set_grad_enabled()(True)
    assert off and torch.is_grad_enabled()


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_stacks_of_any_depth_need_two_segments(layers: int) -> None:
    captured = one(Stack(layers), torch.randn(6, 8))
    segmented = cut(captured)
    assert (len(segmented.segments), len(segmented.calls)) == (2, layers + 1)
    assert_same(captured, segmented)


def test_gradients_do_not_flow_to_statistics() -> None:
    segmented, found = cut(one(Stack(), torch.randn(6, 8))), 0
    for segment in segmented.segments:
        places = [node for node in segment.gm.graph.nodes if node.op == "placeholder"]
        read = {
            node.args[index]
            for node in segment.gm.graph.nodes
            if node.target is torch.ops.aten.batch_norm.default
            for index in (3, 4)
        }
        statistics = [place in read for place in places]
        found += sum(statistics)
        assert not any(s and t for s, t in zip(statistics, segment.trained, strict=True))
    assert found == 2


class Norms(nn.Module):
    """A chain of convolutions whose norms keep running statistics."""

    def __init__(self) -> None:
        super().__init__()
        parts = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)]
        self.body = nn.Sequential(*[layer for part in parts for layer in part])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


@pytest.mark.slow
def test_norms_with_statistics_compile_by_segments() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, inputs = Norms(), (torch.randn(4, 4, 16, 16),)
    fast = graphopt.optimize(copy.deepcopy(plain), inputs, emit="inductor", on_error="raise")
    assert_close(run_step(fast, inputs), run_step(plain, inputs))
    assert fast.report.diagnostics == ()
