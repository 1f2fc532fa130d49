"""How long 200 rules take over a joint graph: graphopt's rules, Inductor's pattern matcher and fx's.

    python benchmarks/matcher.py [--models 8 32 128]

The graph is forward and backward of a transformers Llama of so many layers as AOTAutograd hands it to
a partitioner, at 128 layers about 30,000 nodes. Five of the patterns are in it, at 10 places a layer or
more: the statistic of RMSNorm, rotary embeddings, repeated keys and values, gradients of weights and of
norms. The other 195 end in the operators that RMSNorm ends in and differ from it deep inside: such ones
cost a matcher most. Each matcher gets the same patterns, written its own way, and has to find the same
number of places; none rewrites anything. graphopt's time is that of a whole ``propose``: nodes in between
that others read, writes, gains and near misses with their reasons included. Times are processor time on
one thread, the best of three (fx: one). What is called fx's is ``torch.fx.replace_pattern``, which is what fx
offers for rewriting and writes the code of the module again after each pattern; its ``SubgraphMatcher`` alone
is timed as well. Targets: time linear in nodes, Inductor's at least 5 times and fx's at least 100 times
graphopt's.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import models
import torch
import torch.fx as fx
from harness import figure, parser
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import pattern_matcher
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from graphopt.candidate import Candidate, NearMiss
from graphopt.passes import PassContext
from graphopt.plugins import default_host
from graphopt.program import Level, Program, Signature
from graphopt.rules import RewritePass, Rule, operator

LAYERS = ("8", "32", "128")
RULES = 200
INDUCTOR_TIMES, FX_TIMES = 5.0, 100.0
GROWTH = 1.25
"""Time for a node at the largest graph, as a multiple of that at the smallest, that still is linear."""
REWRITER_NODES = 10_000
"""Graphs up to this size are timed with fx's rewriter, which takes minutes on larger ones."""
WIDTH = 64

aten = torch.ops.aten
UNARY = (
    *("sin", "cos", "tanh", "erf", "exp", "log", "sqrt", "abs", "neg", "relu", "floor", "ceil", "round"),
    *("reciprocal", "expm1", "log1p", "atan", "asin", "acos", "sinh", "cosh"),
)

Call = Callable[..., Any]
"""Makes a call of an operator overload in one matcher's words: ``call(overload, *args, **kwargs)``."""


def statistic(call: Call, x: Any, eps: Any) -> Any:
    mean = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    return call(aten.rsqrt.default, call(aten.add.Tensor, mean, eps))


def rotary(call: Call, x: Any, cos: Any, sin: Any, half: Any, end: Any) -> Any:
    turned = call(aten.neg.default, call(aten.slice.Tensor, x, 3, half, end))
    both = call(aten.cat.default, [turned, call(aten.slice.Tensor, x, 3, 0, half)], -1)
    return call(aten.add.Tensor, call(aten.mul.Tensor, x, cos), call(aten.mul.Tensor, both, sin))


def repeated(call: Call, x: Any, shape: Any, flat: Any) -> Any:
    wide = call(aten.expand.default, call(aten.unsqueeze.default, x, 2), shape)
    copied = call(aten.clone.default, wide, memory_format=torch.contiguous_format)
    return call(aten._unsafe_view.default, copied, flat)


def weight_gradient(call: Call, gradient: Any, x: Any) -> Any:
    product = call(aten.mm.default, call(aten.t.default, gradient), x)
    return call(aten.t.default, call(aten.t.default, product))


def norm_gradient(call: Call, gradient: Any, x: Any, scale: Any, shape: Any) -> Any:
    total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, gradient, x), [2], True)
    cube = call(aten.pow.Tensor_Scalar, call(aten.detach.default, scale), 3)
    spread = call(aten.mul.Tensor, call(aten.mul.Scalar, total, -0.5), cube)
    share = call(aten.div.Scalar, call(aten.expand.default, spread, shape), WIDTH)
    doubled = call(aten.mul.Scalar, call(aten.pow.Tensor_Scalar, x, 1.0), 2.0)
    return call(aten.mul.Tensor, share, doubled)


def near_miss(inner: Any, outer: Any, call: Call, x: Any, weight: Any, eps: Any) -> Any:
    mean = call(aten.mean.dim, call(outer, call(inner, x)), [-1], True)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, mean, eps))
    return call(aten.mul.Tensor, weight, call(aten.mul.Tensor, x, scale))


def patterns() -> dict[str, Callable[..., Any]]:
    """By name, functions of ``call`` and of what they capture."""
    found: dict[str, Callable[..., Any]] = {
        "statistic": statistic, "rotary": rotary, "repeated": repeated, "weight gradient": weight_gradient,
        "norm gradient": norm_gradient,
    }  # fmt: skip
    overloads = [getattr(aten, name).default for name in UNARY]
    pairs = ((inner, outer) for outer in overloads for inner in overloads)
    for inner, outer in pairs:
        if len(found) == RULES:
            break
        found[f"{outer} of {inner}"] = functools.partial(near_miss, inner, outer)
    return found


def captured(pattern: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(pattern).parameters if name != "call"]


def joint_graph(layers: int) -> fx.GraphModule:
    """Forward and backward of a Llama in one graph, as the partitioner is given it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = models.llama(layers=layers, width=WIDTH, vocabulary=512, batch=2, length=16)
    found: list[fx.GraphModule] = []

    class Enough(Exception):
        pass

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found.append(joint)
        raise Enough

    def step(**given: torch.Tensor) -> Any:
        return model(**given).loss

    backend = aot_autograd(fw_compiler=lambda gm, inputs: gm, partition_fn=partition)
    try:
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(**inputs)
    except Exception:
        # Dynamo wraps what a backend raises in an error of its own.
        if not found:
            raise
    return found[0]


def with_graphopt(gm: fx.GraphModule) -> tuple[Callable[[], int], dict[str, int]]:
    """One run, and what it tells beside the matches."""
    rules = []
    for name, pattern in patterns().items():
        names = captured(pattern)

        # Bound by name: a function whose signature names what the pattern captures.
        def form(pattern: Callable[..., Any] = pattern, **given: Any) -> Any:
            return pattern(lambda target, *args, **kwargs: operator(target)(*args, **kwargs), **given)

        form.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
        )
        rules.append(Rule(name, form, lambda: None))

    class Rules(RewritePass):
        name: ClassVar[str] = "rules"
        level: ClassVar[Level] = Level.JOINT

    Rules.rules = rules
    host = default_host()
    context = PassContext(host.cost_model("roofline").build(host.device("cpu")), "train")
    program = Program("g0", Level.JOINT, gm, Signature((), ()))
    told = {}

    def once() -> int:
        found = list(Rules().propose(program, context))
        told["near_misses"] = sum(isinstance(item, NearMiss) for item in found)
        return sum(isinstance(item, Candidate) for item in found)

    return once, told


def with_inductor(gm: fx.GraphModule) -> Callable[[], int]:
    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return pattern_matcher.CallFunction(target, *args, **kwargs)

    search = pattern_matcher.PatternMatcherPass()
    for pattern in patterns().values():
        made = pattern(call, **{name: pattern_matcher.KeywordArg(name) for name in captured(pattern)})
        pattern_matcher.register_graph_pattern(made, pass_dict=search)(lambda match, **given: None)
    return lambda: search.apply(gm.graph)


def with_fx(gm: fx.GraphModule) -> Callable[[], int]:
    matchers = []
    for pattern in patterns().values():
        graph = fx.Graph()
        values = {name: graph.placeholder(name) for name in captured(pattern)}
        graph.output(
            pattern(lambda target, *args, g=graph, **kw: g.call_function(target, args, kw), **values)
        )
        matchers.append(SubgraphMatcher(graph, ignore_literals=False))
    return lambda: sum(len(matcher.match(gm.graph)) for matcher in matchers)


def with_rewriter(gm: fx.GraphModule) -> Callable[[], int]:
    """``replace_pattern`` with a filter that lets nothing through: fx's matcher as it is used, its checks and
    its code for the module included. The module is of the class that ``torch.export`` gives."""
    plain = fx.GraphModule(torch.nn.Module(), gm.graph)
    pairs = []
    for pattern in patterns().values():
        graph = fx.Graph()
        values = {name: graph.placeholder(name) for name in captured(pattern)}
        graph.output(
            pattern(lambda target, *args, g=graph, **kw: g.call_function(target, args, kw), **values)
        )
        pairs.append(fx.GraphModule(torch.nn.Module(), graph))

    def never(*given: Any) -> bool:
        return False

    def once() -> int:
        return sum(len(replace_pattern_with_filters(plain, p, p, match_filters=[never])) for p in pairs)

    return once


def timed(once: Callable[[], int], runs: int) -> tuple[int, float]:
    """What it finds, and the least processor time of so many runs."""
    seconds, count = [], 0
    for _ in range(runs):
        start = time.process_time()
        count = once()
        seconds.append(time.process_time() - start)
    return count, round(min(seconds), 4)


def rows(name: str) -> Iterator[dict[str, Any]]:
    gm = joint_graph(int(name))
    nodes = len(gm.graph.nodes)
    ours, told = with_graphopt(gm)
    row: dict[str, Any] = {"model": f"{name} layers", "nodes": nodes, "rules": len(patterns())}
    for label, once, runs in (
        ("graphopt", ours, 3), ("inductor", with_inductor(gm), 3), ("fx", with_fx(gm), 1)
    ):  # fmt: skip
        row[f"{label}_matches"], row[f"{label}_seconds"] = timed(once, runs)
    if nodes <= REWRITER_NODES:
        row["fx_rewriter_seconds"] = timed(with_rewriter(gm), 1)[1]
    row |= told
    row["us_per_node"] = round(1e6 * row["graphopt_seconds"] / nodes, 2)
    for label in ("inductor", "fx", "fx_rewriter"):
        if f"{label}_seconds" in row:
            row[f"times_{label}"] = round(row[f"{label}_seconds"] / row["graphopt_seconds"], 1)
    yield row


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = sorted((row for row in found if "error" not in row), key=lambda row: row["nodes"])
    if not good:
        return {"met": False}
    small, large = good[0], good[-1]
    growth = large["us_per_node"] / small["us_per_node"]
    # Of the largest graph that it was run on.
    rewriter = next((r["times_fx_rewriter"] for r in reversed(good) if "times_fx_rewriter" in r), None)
    agree = all(row["graphopt_matches"] == row["inductor_matches"] == row["fx_matches"] for row in good)
    return {
        "failed": [row["model"] for row in found if "error" in row],
        "nodes": large["nodes"],
        "matches_agree": agree,
        "growth": round(growth, 2),
        "linear": growth <= GROWTH,
        "times_inductor": large["times_inductor"],
        "times_fx": large["times_fx"],
        "times_fx_rewriter": rewriter,
        "targets": {"growth": GROWTH, "times_inductor": INDUCTOR_TIMES, "times_fx": FX_TIMES},
        "met": agree
        and growth <= GROWTH
        and large["times_inductor"] >= INDUCTOR_TIMES
        and rewriter is not None
        and rewriter >= FX_TIMES,
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    # Dynamo walks a deep model by recursion.
    sys.setrecursionlimit(20_000)
    figure("matcher", options, rows, summary, options.models or (LAYERS[:1] if options.quick else LAYERS))
