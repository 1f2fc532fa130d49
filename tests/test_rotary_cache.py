"""Rotary embeddings into a cache: the operator, its kernel, which writes the pass finds, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
import graphopt_kernels.rotary_cache as module
from graphopt.candidate import Candidate, NearMiss
from graphopt.program import Level
from graphopt_passes.cache_rotary import CacheRotary
from graphopt_passes.normalize import Normalize
from graphopt_passes.pack_rotary import PackRotary
from graphopt_passes.rotary import Rotary
from tests.programs import context, proposing

ops = torch.ops.graphopt
HEADS, FEW, SIZE, LENGTH, PLACES = 4, 2, 8, 3, 7
COUNTS = [HEADS * SIZE, FEW * SIZE, FEW * SIZE]


def given(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "input": torch.randn(2, LENGTH, HEADS + 2 * FEW, SIZE, dtype=dtype),
        "key_cache": torch.randn(2, FEW, PLACES, SIZE, dtype=dtype),
        "value_cache": torch.randn(2, FEW, PLACES, SIZE, dtype=dtype),
        "positions": torch.tensor([5, 0, 2]),
        "cos": torch.randn(LENGTH, SIZE), "sin": torch.randn(LENGTH, SIZE),
        "query_weight": torch.randn(SIZE), "key_weight": None, "heads": [1, HEADS, FEW, FEW], "width": SIZE,
        "interleaved": False, "eps": 1e-5, "weight_offset": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_go_where_they_belong_and_nowhere_else(dtype: torch.dtype) -> None:
    arguments = given(dtype)
    caches = [arguments[name].clone() for name in ("key_cache", "value_cache")]
    query = ops.rotary_to_cache(*arguments.values())
    settings = [arguments[name] for name in list(arguments)[4:]]
    right = ops.rotary(arguments["input"], *settings, True, dtype)
    assert torch.equal(query, right[0])
    for name, cache, part in zip(("key_cache", "value_cache"), caches, right[1:], strict=True):
        assert torch.equal(arguments[name], cache.index_copy(2, arguments["positions"], part.transpose(1, 2)))


def test_the_operator_passes_opcheck() -> None:
    check: Any = torch.library.opcheck
    check(ops.rotary_to_cache.default, tuple(given().values()))


def test_a_place_outside_of_the_cache_raises_on_the_cpu() -> None:
    arguments = given() | {"positions": torch.tensor([5, 0, PLACES])}
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        ops.rotary_to_cache(*arguments.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": torch.ones(2, 64)}, "takes heads [B, S, N, D], got 2 dimensions"),
        (
            {"key_cache": torch.ones(2, 3, PLACES, SIZE)},
            "the cache of keys has shape [2, 3, 7, 8]: expected [2, 2, positions, 8]",
        ),
        ({"value_cache": torch.ones(2, FEW, 6, SIZE)}, "caches hold 7 and 6 positions: expected as many"),
        (
            {"key_cache": torch.ones(2, FEW, PLACES, SIZE, dtype=torch.int64)},
            "takes a floating-point cache of keys, got torch.int64",
        ),
        (
            {"value_cache": torch.ones(2, FEW, PLACES, SIZE).half()},
            "the cache of values is torch.float16: expected torch.float32",
        ),
        (
            {"positions": torch.arange(2)},
            "positions are torch.int64 [2]: expected integers of shape [3]",
        ),
    ],
)
def test_what_it_does_not_take_it_says(change: dict[str, Any], reason: str) -> None:
    assert str(module.rotary_to_cache_supports(*(given() | change).values())) == reason


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_writes_what_the_reference_does() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import torch
        from graphopt_kernels import rotary_cache as module, rotary_launch as launches

        torch.manual_seed(0)
        kernels = launches._kernels()
        for heads, size, width, norm in (((1, 4, 2, 2), 16, 16, True), ((2, 1, 1, 1), 24, 12, False)):
            x = torch.randn(2, 3, heads[0] * sum(heads[1:]), size)
            cos, sin = torch.randn(3, width), torch.randn(2, 3, width)
            weights = [torch.randn(size) if norm else None for _ in range(2)]
            caches = [torch.randn(2, 7, heads[0] * n, size).transpose(1, 2) for n in heads[2:]]
            settings = (heads, width, False, 1e-5 if norm else None, 0.0)
            launch = launches.launch_for(heads, size, width)._replace(positions=2, heads=2, warps=1)
            # Places outside of the cache are not written, and their queries are no numbers.
            for places, inside in (([4, 0, 6], [0, 1, 2]), ([4, 7, -1], [0])):
                at = torch.tensor(places)
                ours, theirs = [[cache.clone() for cache in caches] for _ in range(2)]
                query = launches.cached_rows(
                    kernels, x, *ours, at, cos, sin, *weights, *settings, launch=launch
                )
                right = module.rotary_to_cache_reference(
                    x[:, inside], *theirs, at[inside], cos[inside], sin[:, inside], *weights, *settings
                )
                torch.testing.assert_close(query[:, inside], right)
                for a, b in zip(ours, theirs):
                    torch.testing.assert_close(a, b)
                beyond = [n for n in range(3) if n not in inside]
                assert query[:, beyond][..., :width].isnan().all()
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


# --- the pass -----------------------------------------------------------------------------------

Step = Callable[["Decoder", Tensor, Tensor, Tensor, Tensor], Tensor]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def parts(m: Decoder, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    rows = m.project(x).split(COUNTS, -1)
    query, key, value = (t.view(*x.shape[:2], -1, SIZE).transpose(1, 2) for t in rows)
    return [turned(query, cos, sin), turned(key, cos, sin), value]


def attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


class Decoder(nn.Module):
    """A step of a decoder with static caches."""

    def __init__(self, step: Step, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(SIZE, sum(COUNTS))
        self.step = step
        self.register_buffer("keys", torch.zeros(2, FEW, PLACES, SIZE, dtype=dtype))
        self.register_buffer("values", torch.zeros(2, FEW, PLACES, SIZE, dtype=dtype))

    def forward(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.step(self, x, at, cos, sin)


def static(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    m.keys.index_copy_(2, at, key)
    m.values.index_copy_(2, at, value)
    return attended(query, m.keys, m.values)


def returned(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    values = m.values.index_copy_(2, at, value)
    return attended(query, m.keys.index_copy_(-2, at, key), values)


def keys_read(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    m.keys.index_copy_(2, at, key)
    m.values.index_copy_(2, at, value)
    return attended(query, m.keys, m.values).sum() + key.sum()


def cache_read(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    m.keys.index_copy_(2, at, key)
    before = m.values.sum()
    m.values.index_copy_(2, at, value)
    return attended(query, m.keys, m.values) + before


def queries_read(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    m.keys.index_copy_(2, at, key)
    old = attended(query, m.keys, value.repeat(1, 1, 3, 1)[:, :, :PLACES])
    m.values.index_copy_(2, at, value)
    return attended(query, m.keys, m.values) + old


def other_places(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    m.keys.index_copy_(2, at, key)
    m.values.index_copy_(2, at + 1, value)
    return attended(query, m.keys, m.values)


def one_memory(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    m.keys.index_copy_(2, at, key)
    m.keys.flip(0)
    m.keys.index_copy_(2, at, value)
    return attended(query, m.keys, m.values)


def by_hand(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables that the writes change."""
    packed = m.project(x).unflatten(-1, (HEADS + 2 * FEW, SIZE))
    query, key, _ = ops.rotary(
        packed, m.values[0, 0, :LENGTH], sin, None, None, [1, HEADS, FEW, FEW], SIZE, False, None, 0.0, False,
        x.dtype,
    )  # fmt: skip
    m.keys.index_copy_(2, at, key.transpose(1, 2))
    m.values.index_copy_(2, at, packed[:, :, HEADS + FEW :].transpose(1, 2))
    return attended(query.transpose(1, 2), m.keys, m.values)


def effect_between(m: Decoder, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = parts(m, x, cos, sin)
    places = at * 1
    again = places.view(-1)
    m.keys.index_copy_(2, places, key)
    again.add_(1)
    m.values.index_copy_(2, places, value)
    return attended(query, m.keys, m.values)


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return (
        torch.randn(2, LENGTH, SIZE),
        torch.tensor([4, 0, 2]),
        torch.randn(LENGTH, SIZE),
        torch.randn(LENGTH, SIZE),
    )


PIPELINE = [Normalize(), Rotary(everywhere=True), PackRotary()]


def optimized(model: nn.Module, *more: Any, emit: str = "eager") -> graphopt.optimized.Optimized:
    torch._dynamo.reset()
    return graphopt.optimize(model, inputs(), pipeline=[*PIPELINE, *more], emit=emit, on_error="raise")


@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [static, returned], ids=lambda f: f.__name__)
def test_writes_of_turned_keys_are_one_call(step: Step, emit: str) -> None:
    model = Decoder(step).eval()
    with torch.no_grad():
        fast = optimized(model, CacheRotary(), emit=emit)
        for places in ([4, 0, 2], [1, 3, 6]):
            given = (inputs()[0], torch.tensor(places), *inputs()[2:])
            model.keys.zero_(), model.values.zero_()
            expected = model(*given)
            caches = [model.keys.clone(), model.values.clone()]
            model.keys.zero_(), model.values.zero_()
            torch.testing.assert_close(fast(*given), expected)
            torch.testing.assert_close([model.keys, model.values], caches)
    (program,) = (program for program in fast.programs if program.level is Level.SEMANTIC)
    (node,) = program.nodes(ops.rotary_to_cache.default)
    assert node.args[8] == [1, HEADS, FEW, FEW]
    assert not list(program.nodes(torch.ops.aten.index_copy_.default))


class Layers(nn.Module):
    """Two steps of a decoder, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Decoder(static), Decoder(static)

    def forward(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.first(x, at, cos, sin).mean(1)
        return self.second(x + y, at, cos, sin)


def test_every_layer_writes_its_own_cache() -> None:
    model = Layers().eval()
    with torch.no_grad():
        expected = model(*inputs())
        caches = [buffer.clone() for buffer in model.buffers()]
        for buffer in model.buffers():
            buffer.zero_()
        fast = optimized(model, CacheRotary())
        torch.testing.assert_close(fast(*inputs()), expected)
        torch.testing.assert_close(list(model.buffers()), caches)
    (program,) = (program for program in fast.programs if program.level is Level.SEMANTIC)
    assert len(list(program.nodes(ops.rotary_to_cache.default))) == 2


def proposals(step: Step, *, mode: str = "infer", dtype: torch.dtype = torch.float32) -> list[Any]:
    found: list[Any] = []

    def look(program: Any, ctx: Any) -> Any:
        # Passes are asked more than once.
        found[:] = CacheRotary().propose(program, context(mode))
        return ()

    with torch.no_grad():
        optimized(Decoder(step, dtype).eval(), proposing(look))
    return found


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (keys_read, "keys are read before they are in the cache"),
        (cache_read, "the cache is read before it is written"),
        (queries_read, "the cache is read before it is written"),
        (other_places, "values do not go to a cache at the same positions"),
        (one_memory, "the caches may share memory"),
        (by_hand, "what is read may lie in a cache"),
        (effect_between, "a call between them has an effect"),
    ],
)
def test_where_somebody_could_tell_the_writes_stay(step: Step, reason: str) -> None:
    found = proposals(step)
    assert [item.reason.text for item in found if isinstance(item, NearMiss)] == [reason]
    assert not [item for item in found if isinstance(item, Candidate)]


def test_with_gradients_the_writes_stay() -> None:
    assert [type(item) for item in proposals(static)] == [Candidate]
    assert not proposals(static, mode="train")
