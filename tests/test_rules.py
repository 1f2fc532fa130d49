"""Rules: what patterns match, what they say where they do not, and what a rewrite refuses."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from graphopt.candidate import Candidate, NearMiss, Reason
from graphopt.errors import PassError, RuleError
from graphopt.program import Level, Program
from graphopt.rules import Match, RewritePass, Rule, either, matching, operator
from tests.programs import context, semantic

aten = torch.ops.aten
X, Y = torch.randn(4, 8), torch.randn(4, 8)

plus = operator(aten.add.Tensor, commutes=True)
times = operator(aten.mul.Tensor, commutes=True)
tanh = operator(aten.tanh.default)
exp = operator(aten.exp.default)
minus = operator(aten.sub.Tensor)


def rewriting(*rules: Rule) -> RewritePass:
    class Rewriting(RewritePass):
        name: ClassVar[str] = "rewriting"
        level: ClassVar[Level] = Level.SEMANTIC

    Rewriting.rules = rules
    return Rewriting()


def proposals(program: Program, *rules: Rule) -> list[Any]:
    return list(rewriting(*rules).propose(program, context()))


def rewritten(program: Program, *rules: Rule) -> list[str]:
    """Targets of the program's calls after every candidate was applied."""
    found = proposals(program, *rules)
    with program.edit("rewriting") as edit:
        for item in found:
            if isinstance(item, Candidate):
                item.apply(edit)
    return [str(node.target).removeprefix("aten.") for node in program.nodes()]


def sigmoid_of_product() -> Rule:
    return Rule("r", lambda x, y: tanh(times(x, y)), lambda x, y: aten.sigmoid.default(aten.mul.Tensor(x, y)))


def test_a_pattern_is_replaced_and_the_replacement_computes() -> None:
    program = semantic(lambda x, y: torch.tanh(x * y) + 1, X, Y)
    assert rewritten(program, sigmoid_of_product()) == ["mul.Tensor", "sigmoid.default", "add.Tensor"]
    torch.testing.assert_close(program.gm(X, Y)[0], torch.sigmoid(X * Y) + 1)
    new = next(node for node in program.nodes(aten.sigmoid.default))
    assert new.meta["graphopt"].rule == "r"


@pytest.mark.parametrize("swapped", [False, True])
def test_operators_that_commute_match_both_ways(swapped: bool) -> None:
    rule = Rule("r", lambda x, y: times(tanh(x), y), lambda x, y: aten.sub.Tensor(x, y))
    body = (lambda x, y: y * torch.tanh(x)) if swapped else (lambda x, y: torch.tanh(x) * y)
    program = semantic(body, X, Y)
    assert rewritten(program, rule) == ["sub.Tensor"]
    torch.testing.assert_close(program.gm(X, Y)[0], X - Y)


def test_a_step_may_be_missing_and_binds_none_then() -> None:
    def pattern(x: Any, scale: Any) -> Any:
        return tanh(either(times(x, scale), x))

    def replacement(x: Any, scale: Any) -> Any:
        return aten.sigmoid.default(x if scale is None else aten.mul.Tensor(x, scale))

    rule = Rule("r", pattern, replacement)
    assert rewritten(semantic(lambda x: torch.tanh(x), X), rule) == ["sigmoid.default"]
    assert rewritten(semantic(lambda x: torch.tanh(x * 3), X), rule) == ["mul.Tensor", "sigmoid.default"]


def test_an_output_may_be_read_by_another() -> None:
    def pattern(x: Any) -> Any:
        inner = exp(x)
        return tanh(inner), inner

    rule = Rule("r", pattern, lambda x: (aten.sin.default(x), aten.cos.default(x)))
    program = semantic(lambda x: (torch.tanh(e := torch.exp(x)), e * 2), X)
    assert sorted(rewritten(program, rule)) == ["cos.default", "mul.Tensor", "sin.default"]
    for found, right in zip(program.gm(X), (X.sin(), X.cos() * 2), strict=True):
        torch.testing.assert_close(found, right)


def test_one_capture_is_one_value() -> None:
    rule = Rule("r", lambda x: times(tanh(x), exp(x)), lambda x: aten.neg.default(x), near=1)
    assert rewritten(semantic(lambda x: torch.tanh(x) * torch.exp(x), X), rule) == ["neg.default"]
    (missed,) = proposals(semantic(lambda x, y: torch.tanh(x) * torch.exp(y), X, Y), rule)
    assert isinstance(missed, NearMiss) and missed.matched == 3 and missed.total == 3
    assert missed.reason.text.startswith("x is placeholder ")


def test_what_went_furthest_is_told() -> None:
    rule = Rule("r", lambda x, y: tanh(times(exp(x), y)), lambda x, y: aten.mul.Tensor(x, y), near=2)
    (missed,) = proposals(semantic(lambda x, y: torch.tanh(x.sin() * y), X, Y), rule)
    assert isinstance(missed, NearMiss) and (missed.matched, missed.total) == (2, 3)
    assert missed.reason.text == "expected aten.exp.default, found placeholder " + missed.reason.nodes[0]


def test_arguments_left_out_have_their_defaults() -> None:
    rule = Rule("r", lambda x, y: tanh(plus(x, y)), lambda x, y: aten.mul.Tensor(x, y), near=1)
    (missed,) = proposals(semantic(lambda x, y: torch.tanh(torch.add(x, y, alpha=2)), X, Y), rule)
    assert missed.reason.text == "its alpha is 2"
    wide = Rule("r", lambda x, y: tanh(plus(x, y, alpha=...)), lambda x, y: aten.mul.Tensor(x, y))
    program = semantic(lambda x, y: torch.tanh(torch.add(x, y, alpha=2)), X, Y)
    assert rewritten(program, wide) == ["mul.Tensor"]


def test_literals_are_captured_and_compared() -> None:
    softmax = operator(aten.softmax.int)
    rule = Rule(
        "r", lambda x, dim: softmax(tanh(x), dim), lambda x, dim: aten.cumsum.default(x, dim),
        lambda dim: None if dim == 1 else Reason(f"it is over dimension {dim}"),
    )  # fmt: skip
    program = semantic(lambda x: torch.softmax(torch.tanh(x), 1), X)
    assert rewritten(program, rule) == ["cumsum.default"]
    (missed,) = proposals(semantic(lambda x: torch.softmax(torch.tanh(x), 0), X), rule)
    assert missed.reason.text == "it is over dimension 0" and missed.matched == missed.total == 2


def test_patterns_of_several_outputs_replace_all_of_them() -> None:
    def pattern(x: Any, y: Any) -> Any:
        total = plus(x, y)
        return tanh(total), exp(total)

    def replacement(x: Any, y: Any) -> Any:
        less = aten.sub.Tensor(x, y)
        return aten.sin.default(less), aten.cos.default(less)

    rule = Rule("r", pattern, replacement)
    program = semantic(lambda x, y: (torch.tanh(x + y), torch.exp(x + y) * 2), X, Y)
    one = semantic(lambda x, y: (lambda s: (torch.tanh(s), torch.exp(s) * 2))(x + y), X, Y)
    assert proposals(program, rule) == [] or not isinstance(proposals(program, rule)[0], Candidate)
    assert rewritten(one, rule) == ["sub.Tensor", "sin.default", "cos.default", "mul.Tensor"]
    first, second = one.gm(X, Y)
    torch.testing.assert_close(first, torch.sin(X - Y))
    torch.testing.assert_close(second, torch.cos(X - Y) * 2)


def test_larger_patterns_go_first() -> None:
    small = Rule("small", lambda x: tanh(x), lambda x: aten.sin.default(x))
    large = Rule("large", lambda x: tanh(exp(x)), lambda x: aten.cos.default(x))
    program = semantic(lambda x: torch.tanh(torch.exp(x)) + torch.tanh(x), X)
    assert [item.id.split("@")[0] for item in proposals(program, small, large)] == ["large", "small"]


def test_symbolic_sizes_match() -> None:
    program = semantic(lambda x, y: torch.tanh(x * y) + 1, X, Y, dynamic=True)
    assert "sigmoid.default" in rewritten(program, sigmoid_of_product())
    torch.testing.assert_close(program.gm(*_arguments(program, X, Y))[0], torch.sigmoid(X * Y) + 1)


def _arguments(program: Program, *tensors: torch.Tensor) -> list[Any]:
    """Sizes come before the tensors that have them."""
    given = iter(tensors)
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    tensor_like = [isinstance(node.meta["val"], torch.Tensor) for node in places]
    sizes = iter(tensors[0].shape)
    return [next(given) if is_tensor else next(sizes) for is_tensor in tensor_like]


# --- what is refused ----------------------------------------------------------------------------


def refused(function: Any, *args: torch.Tensor) -> str:
    (missed,) = proposals(semantic(function, *args), sigmoid_of_product())
    assert isinstance(missed, NearMiss)
    return missed.reason.text


def test_values_in_between_that_others_read() -> None:
    def read(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = x * y
        return torch.tanh(product) + product

    def returned(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = x * y
        return torch.tanh(product), product

    assert refused(read, X, Y) == "the value of aten.mul.Tensor is read by another call as well"
    assert refused(returned, X, Y) == "the value of aten.mul.Tensor is an output of the program as well"


def test_writes_to_what_is_read() -> None:
    def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        copy = y.clone()
        product = x * copy
        copy.add_(1)
        return torch.tanh(product) + copy

    assert refused(written, X, Y) == "what it reads is written within it"


def test_writes_to_the_result_are_refused_in_training_alone() -> None:
    def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = torch.tanh(x * y)
        result.add_(1)
        return result.t() + 1

    assert refused(written, X, Y) == "its result is written in place, which autograd may forbid"
    found = list(rewriting(sigmoid_of_product()).propose(semantic(written, X, Y), context("infer")))
    assert [type(item) for item in found] == [Candidate]


def test_changes_of_the_gradient_mode() -> None:
    def switched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            product = x * y
        return torch.tanh(product)

    trained = X.clone().requires_grad_()
    assert refused(switched, trained, Y) == "autocast or the gradient mode changes within it"


def test_a_candidate_of_a_program_that_changed_says_so() -> None:
    program = semantic(lambda x, y: torch.tanh(x * y), X, Y)
    (candidate,) = proposals(program, sigmoid_of_product())
    tanh_node = next(program.nodes(aten.tanh.default))
    with program.edit("other") as edit:
        tanh_node.args = (edit.call_before(tanh_node, aten.exp.default, (tanh_node.args[0],)),)
    message = r"no longer matches r: expected aten\.mul\.Tensor, found aten\.exp"
    with pytest.raises(PassError, match=message), program.edit("rewriting") as edit:
        candidate.apply(edit)


def test_a_replacement_of_nothing_is_an_error_and_undone() -> None:
    rule = Rule("r", lambda x: tanh(x), lambda x: 3)
    program = semantic(lambda x: torch.tanh(x), X)
    before = program.fingerprint
    (candidate,) = proposals(program, rule)
    message = "the replacement returned 3: expected 1 values"
    with pytest.raises(RuleError, match=message), program.edit("rewriting") as edit:
        candidate.apply(edit)
    assert program.fingerprint == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: operator(), "needs one operator overload or more"),
        (lambda: operator(aten.add), r"aten.add is not an operator overload: aten.add.\w+, for one"),
        (lambda: operator(torch.tanh), "is not an operator overload"),
        (lambda: either(1), "needs two options or more"),
        (lambda: Rule("r", lambda x, y: tanh(x), lambda x: x), "never uses its parameter 'y'"),
        (lambda: Rule("r", lambda *x: tanh(x), lambda: 0), "parameter 'x' cannot be bound by its name"),
        (lambda: Rule("r", lambda x: x, lambda x: x), "expected a call, or a tuple of calls"),
        (lambda: Rule("r", lambda x: tanh(x), lambda y: y), "the replacement takes 'y'"),
        (lambda: Rule("r", lambda x: tanh(x), lambda x: x, lambda z: None), "the guard takes 'z'"),
    ],
)
def test_rules_that_make_no_sense_are_errors(make: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        make()


def test_a_guard_that_returns_something_else_is_an_error() -> None:
    rule = Rule("r", lambda x: tanh(x), lambda x: x, lambda match: "no")
    with pytest.raises(RuleError, match="the guard returned 'no': expected a Reason or None"):
        proposals(semantic(lambda x: torch.tanh(x), X), rule)


def test_guards_know_the_pass_the_program_and_the_match() -> None:
    seen: list[Any] = []

    def guard(x: Any, match: Match, options: Any, program: Program, ctx: Any) -> None:
        seen.extend((x, match, options, program, ctx))

    program = semantic(lambda x: torch.tanh(x), X)
    proposals(program, Rule("r", lambda x: tanh(x), lambda x: aten.sin.default(x), guard))
    x, match, options, given, ctx = seen
    assert match.captures["x"] is x and options.name == "rewriting" and given is program
    assert ctx.mode == "train" and match.rule.where.rpartition(":")[0] == __file__


def test_the_work_grows_with_the_graph_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: comparisons of a part of the pattern with a value."""
    rule = Rule("r", lambda x, y: tanh(times(exp(x), y)), lambda x, y: aten.mul.Tensor(x, y))
    compared = 0
    original = matching._Search.part

    def part(self: Any, *args: Any) -> Any:
        nonlocal compared
        compared += 1
        return original(self, *args)

    monkeypatch.setattr(matching._Search, "part", part)
    counts = []
    for length in (20, 40, 80):
        compared = 0
        proposals(semantic(lambda x, n=length: _tower(x, n), X), rule)
        counts.append(compared)
    assert counts[0] > 0 and counts == [counts[0], 2 * counts[0], 4 * counts[0]]


def _tower(x: torch.Tensor, length: int) -> torch.Tensor:
    for _ in range(length):
        x = torch.tanh(x * 2)
    return x
