"""fuse-optimizer: which updates it sees, that numbers stay, what it leaves alone and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.candidate import Candidate, NearMiss
from graphopt.dump.text import program_text
from graphopt.errors import VerificationError
from graphopt.passes import Proposal
from graphopt.pipeline import Pipeline
from graphopt.program import InputSpec, Level, OutputSpec, Program, Signature
from graphopt.rewriting import run_passes
from graphopt_kernels.optimizer_update import adam_update, sgd_update
from graphopt_passes.fuse_optimizer import FuseOptimizer
from graphopt_passes.fuse_optimizer.scalars import known
from graphopt_passes.fuse_optimizer.updates import updates_in
from tests.programs import context, host
from tests.update_programs import UPDATES, Trained, Updates, adamw, momentum, on_lists, sgd

EVERYWHERE = FuseOptimizer(everywhere=True)
OPS = (adam_update, sgd_update)


def gradients(model: Updates, count: int = 3) -> list[list[Tensor]]:
    return [[torch.randn_like(p) for p in model.p] for _ in range(count)]


def optimized(model: nn.Module, inputs: Any, *passes: Any, **options: Any) -> graphopt.Optimized:
    torch._dynamo.reset()
    pipeline = passes or (EVERYWHERE,)
    return graphopt.optimize(model, inputs, pipeline=pipeline, on_error="raise", **options)


def calls(fast: graphopt.Optimized) -> list[torch.fx.Node]:
    programs = [p for p in fast.programs if p.level is Level.JOINT]
    return [node for p in programs for node in p.nodes() if node.target in OPS]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=lambda text, n=name: f"{n}: {text}")


# --- what it finds ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_one_call_of_the_same_numbers(name: str) -> None:
    ours = Updates(UPDATES[name])
    theirs, given = copy.deepcopy(ours), gradients(ours)
    fast = optimized(ours, (given[0],), emit="eager")
    (call,) = calls(fast)
    assert len(call.args[0]) == 3 and call.target is OPS[name in ("sgd", "momentum", "nesterov")]
    for each in given:
        fast(each)
        theirs(each)
    assert_same(ours, theirs)
    # Nothing that the update alone needed is computed any more: numbers at most.
    rest = [node for p in fast.programs[1:2] for node in p.nodes() if node is not call]
    values = [node.meta["val"] for node in rest if isinstance(node.meta["val"], Tensor)]
    assert name in ("summed", "clipped") or all(value.numel() == 1 for value in values)


@pytest.mark.parametrize("name", ["adamw", "nesterov", "on_lists"])
def test_compiled_programs_are_rewritten_too(name: str) -> None:
    ours = Updates(UPDATES[name])
    theirs, given = copy.deepcopy(ours), gradients(ours)
    fast = optimized(ours, (given[0],), emit="inductor")
    assert len(calls(fast)) == 1
    for each in given:
        fast(each)
        theirs(each)
    assert_same(ours, theirs)


def test_numbers_are_those_that_are_written() -> None:
    model = Updates(momentum)
    (call,) = calls(optimized(model, (gradients(model)[0],), emit="eager"))
    scale, keep, decay, moving, share, rate = call.args[3]
    assert (scale, keep, moving, share, rate) == (1.0, 1.0, 0.9, 0.8, 0.1) and decay == pytest.approx(0.1)
    model = Updates(adamw)
    (call,) = calls(optimized(model, (gradients(model)[0],), emit="eager"))
    numbers, scalars, places = call.args[4:]
    assert numbers[:6] == [1.0, 0.999, 0.0, 0.1, 0.99, 0.01] and numbers[8] == 1e-8
    # The rate and the root's correction are made on the device from the count, once for all parameters.
    assert places == [6, 7] and all(scalar.meta["val"].shape == () for scalar in scalars)


def written_out(p: Tensor, q: Tensor, g: Tensor, h: Tensor, m: Tensor, n: Tensor, v: Tensor, w: Tensor,
                count: Tensor) -> Any:  # fmt: skip
    """Adam of two parameters."""
    rate, root = 0.01 / (1 - 0.9**count), (1 - 0.99**count).sqrt()
    averages = [0.9 * x + 0.1 * d for x, d in ((m, g), (n, h))]
    squares = [0.99 * x + 0.01 * (d * d) for x, d in ((v, g), (w, h))]
    below = [x.sqrt() / root + 1e-8 for x in squares]
    new = [x - rate * a / b for x, a, b in zip((p, q), averages, below, strict=True)]
    return *new, *averages, *squares


def test_what_it_makes_of_a_program(golden: Callable[[str, str], None]) -> None:
    with torch._subclasses.FakeTensorMode():
        given = [torch.empty(2, 3) for _ in range(8)]
        before = program(written_out, *given, torch.empty(()), written=(0, 1, 4, 5, 6, 7))
    text = program_text(before)
    done = run_passes(before, [EVERYWHERE], context("infer"), host(), on_error="raise")
    assert [record.status for record in done.records] == ["applied"]
    golden("fuse_optimizer.txt", f"# before\n{text}\n# after\n{program_text(before)}")
    made = [node for node in before.nodes() if "fuse-optimizer" in str(node.meta.get("graphopt"))]
    assert [node.target for node in made] == [adam_update]
    # A second run finds nothing more to do.
    assert list(EVERYWHERE.propose(before, context("infer"))) == []


def test_groups_have_one_dtype_and_the_same_numbers() -> None:
    def update(step: nn.Module, p: Any, g: Any, m: Any, v: Any) -> None:
        sgd(step, p[:2], g[:2], m, v)
        p[2].sub_(0.2 * g[2])

    model = Updates(update)
    fast = optimized(model, (gradients(model)[0],), emit="eager")
    assert sorted(len(call.args[0]) for call in calls(fast)) == [1, 2]


def test_parameters_of_bfloat16_are_updated_beside_wide_states() -> None:
    def update(step: nn.Module, p: Any, g: Any, m: Any, v: Any) -> None:
        for p_, g_, m_, v_ in zip(p, g, m, v, strict=True):
            wide = g_.float()
            m_.lerp_(wide, 0.1)
            v_.mul_(0.99).addcmul_(wide, wide, value=0.01)
            p_.copy_(p_.float() - 0.01 * m_ / (v_.sqrt() + 1e-8))

    ours = Updates(update)
    ours.p = nn.ParameterList(p.detach().bfloat16() for p in ours.p)
    theirs, given = copy.deepcopy(ours), gradients(ours)
    fast = optimized(ours, (given[0],), emit="eager")
    (call,) = calls(fast)
    assert [node.meta["val"].dtype for node in call.args[1]] == [torch.bfloat16] * 3
    for each in given:
        fast(each)
        theirs(each)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype is torch.bfloat16 else 1e-5, atol=1e-5)


# --- whole steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("emit", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_whole_steps_are_those_of_the_module(whole: bool, emit: str) -> None:
    ours = Trained(whole=whole)
    theirs = copy.deepcopy(ours)
    data = [(torch.randn(6, 16), torch.randint(0, 4, (6,))) for _ in range(3)]
    with torch.set_grad_enabled(not whole):
        fast = optimized(ours, data[0], emit=emit)
        # Looking at a step takes none.
        assert_same(ours, theirs)
        assert len(calls(fast)) == 1
        for x, y in data:
            torch.testing.assert_close(fast(x, y), theirs(x, y))
    assert_same(ours, theirs)


@pytest.mark.parametrize("passes", [(), (EVERYWHERE,)], ids=["plain", "fused"])
@pytest.mark.parametrize("whole", [True, False])
def test_whole_steps_take_what_is_predicted(whole: bool, passes: tuple[Any, ...]) -> None:
    """The program that runs is the one that passes made, where it is traced again too."""
    model, data = Trained(whole=whole, width=64), (torch.randn(6, 64), torch.randint(0, 4, (6,)))
    before = copy.deepcopy(model)
    with torch.set_grad_enabled(not whole):
        fast = optimized(model, data, *(passes or ("normalize",)), emit="eager", verify="numeric")
        assert fast.measure(repeats=1).peak_bytes == fast.plan.predicted.peak_bytes
        lowered = [node.target for p in fast.programs if p.level is Level.LOWERED for node in p.nodes()]
    assert (adam_update in lowered) == bool(passes)
    # Neither did measuring and verifying.
    assert_same(model, before)


def test_verification_compares_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt_passes.fuse_optimizer as module

    def wrong(updates: Any) -> Any:
        found, missed = updates_in(updates)
        return [replace(u, numbers=(*u.numbers[:6], known(0.5), *u.numbers[7:])) for u in found], missed

    monkeypatch.setattr(module, "updates_in", wrong)
    data = torch.randn(6, 16), torch.randint(0, 4, (6,))
    with pytest.raises(VerificationError, match=r"parameter model\.0\.weight: the largest difference"):
        optimized(Trained(whole=False), data, emit="eager", verify="numeric")


def test_a_whole_step_keeps_to_a_budget_with_its_update_in_it() -> None:
    x, y = torch.randn(512, 32), torch.randint(0, 4, (512,))
    ours = Trained(whole=False, width=32, depth=3)
    theirs = copy.deepcopy(ours)
    passes = (EVERYWHERE, "insert-checkpoints")
    free = optimized(ours, (x, y), *passes, emit="eager").plan.baseline.peak_bytes
    fast = optimized(ours, (x, y), *passes, emit="eager", budget=int(0.7 * free))
    assert fast.plan.predicted.peak_bytes <= 0.7 * free and len(calls(fast)) == 1
    assert fast.measure(repeats=1).peak_bytes == fast.plan.predicted.peak_bytes
    for _ in range(2):
        torch.testing.assert_close(fast(x, y), theirs(x, y))
    assert_same(ours, theirs)


def test_parameters_that_plain_code_writes_are_noted() -> None:
    class Outside(Trained):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss = super().forward(x, y)
            moved(self.m[0])
            return loss

    @torch._dynamo.disable
    def moved(state: Tensor) -> None:
        with torch.no_grad():
            state.add_(1)

    fast = optimized(Outside(whole=False), (torch.randn(6, 16), torch.randint(0, 4, (6,))), emit="eager")
    assert not any("plain code" in text for text in fast.report.diagnostics), "m.0 is put back all the same"

    class Apart(Trained):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss = self.model(x).sum()
            moved(self.m[0])
            return loss

    fast = optimized(Apart(whole=False), (torch.randn(6, 16), torch.randint(0, 4, (6,))), emit="eager")
    assert any("plain code of the model writes m.0" in text for text in fast.report.diagnostics)


def test_updates_in_place_hold_less_than_new_values() -> None:
    model = Updates(adamw)
    given = (gradients(model)[0],)
    before = optimized(model, given, "normalize", emit="eager").plan.predicted
    after = optimized(model, given, emit="eager").plan.predicted
    states = sum(x.nbytes for x in (*model.p, *model.m, *model.v))
    assert before.peak_bytes - after.peak_bytes >= states
    assert after.seconds < before.seconds / 5


def test_the_report_says_what_was_done_and_what_was_not() -> None:
    model = Updates(adamw)
    given = (gradients(model)[0],)
    report = optimized(model, given, emit="eager").report
    assert report.steps[-1].status == "applied" and "1 of 1 candidates" in report.steps[-1].reason
    plain = optimized(model, given, "default", emit="eager").report
    why = {str(miss.reason) for miss in plain.near_misses if miss.rule == "fuse-optimizer"}
    assert len(why) == 3 and all("no kernel runs on cpu" in text for text in why)


# --- what it leaves alone -----------------------------------------------------------------------


def refused(update: Callable[..., object], **options: Any) -> list[str]:
    """Reasons for leaving the updates of a module alone."""
    model = Updates(update)
    fast = optimized(model, (gradients(model)[0],), emit="eager", **options)
    assert not calls(fast)
    return [miss.reason.text for miss in fast.report.near_misses]


def _amsgrad(step: Any, p: Any, g: Any, m: Any, v: Any) -> None:
    for p_, g_, m_, v_, most in zip(p, g, m, v, step.more, strict=True):
        m_.lerp_(g_, 0.1)
        v_.mul_(0.99).addcmul_(g_, g_, value=0.01)
        most.copy_(torch.maximum(most, v_))
        p_.addcdiv_(m_, most.sqrt() + 1e-8, value=-0.01)


def _rmsprop(step: Any, p: Any, g: Any, m: Any, v: Any) -> None:
    for p_, g_, v_ in zip(p, g, v, strict=True):
        v_.mul_(0.99).addcmul_(g_, g_, value=0.01)
        p_.addcdiv_(g_, v_.sqrt() + 1e-8, value=-0.01)


def _changed(**change: Any) -> Callable[..., None]:
    """Adam, but for one thing."""

    def update(step: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        for p_, g_, m_, v_ in zip(p, g, m, v, strict=True):
            m_.lerp_(g_, change.get("weight", 0.1))
            squared = change.get("squared", lambda x, m: x * x)(g_, m_)
            v_.mul_(0.99).add_(squared, alpha=0.01)
            below = change.get("below", lambda v, g: v.sqrt() + 1e-8)(v_, g_)
            p_.sub_(0.01 * m_ / below + change.get("beside", lambda g: 0)(g_))

    return update


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (_amsgrad, "it keeps the largest squares (amsgrad)"),
        (_rmsprop, "what is divided is no moving average that is written"),
        (_changed(beside=lambda g: 0.01 * g), "more is added to it than an average over a root"),
        (_changed(below=lambda v, g: v + 1e-8), "what it is divided by is not a root and a number"),
        (_changed(below=lambda v, g: (v + 1e-8).sqrt()), "what a root is taken of is no mean of squares"),
        (_changed(squared=lambda g, m: (g - m) ** 2), "squares are not those of the gradient"),
        (_changed(squared=lambda g, m: g.abs()), "squares are not those of the gradient"),
    ],
    ids=["amsgrad", "rmsprop", "more", "root", "inside", "belief", "absolute"],
)
def test_other_optimizers_stay(update: Callable[..., object], reason: str) -> None:
    assert any(reason in text for text in refused(update))


def test_a_decay_on_the_device_stays() -> None:
    def update(step: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        _changed(weight=1 / step.count)(step, p, g, m, v)

    assert "how an average decays is known at run time alone" in refused(update)


def test_values_that_others_read_stay() -> None:
    def returned(step: Any, p: Any, g: Any, m: Any, v: Any) -> Any:
        adamw(step, p, g, m, v)
        return [x * 2 for x in p]

    reasons = refused(returned)
    assert reasons == ["its new value is read by another call"] * 3

    def averaged(step: Any, p: Any, g: Any, m: Any, v: Any) -> None:
        adamw(step, p, g, m, v)
        for p_, mean in zip(p, step.more, strict=True):
            mean.lerp_(p_, 0.01)

    model = Updates(averaged)
    ours, given = copy.deepcopy(model), gradients(model)
    fast = optimized(ours, (given[0],), emit="eager")
    # The average of the weights is an update of its own kind, of which new weights are the gradient.
    (call,) = calls(fast)
    assert call.target is OPS[1]
    assert "its new value is read by another call" in [m.reason.text for m in fast.report.near_misses]
    for each in given:
        fast(each)
        model(each)
    assert_same(ours, model)


def test_numbers_and_weights_that_change_are_read_before() -> None:
    """A rate that falls at each step, and an average of the weights before the update."""

    class Falling(Updates):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.rate = nn.Parameter(torch.tensor(0.1), requires_grad=False)

        def forward(self, gradients: list[Tensor]) -> None:
            with torch.no_grad():
                for p_, g_, mean in zip(self.p, gradients, self.more, strict=True):
                    mean.lerp_(p_, 0.01)
                    p_.sub_(self.rate * g_)
                self.rate.mul_(0.9)

    for emit in ("eager", "inductor"):
        ours = Falling()
        theirs, given = copy.deepcopy(ours), gradients(ours)
        fast = optimized(ours, (given[0],), emit=emit)
        (call,) = calls(fast)
        assert [node.meta["val"].shape for node in call.args[4]] == [()]
        missed = [miss.reason.text for miss in fast.report.near_misses]
        assert missed == ["its gradient is memory that an update writes"] * 3
        for each in given:
            fast(each)
            theirs(each)
        assert_same(ours, theirs)


# Programs that are not captured: what cannot be had, or would need a GPU.


def program(function: Callable[..., Any], *tensors: Tensor, written: Sequence[int] = (0, 1)) -> Program:
    """An inference program as a code generator gets it: what ``function`` returns is written to the inputs
    at the places ``written``, in that order."""
    gm = make_fx(function)(*tensors)
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    with gm.graph.inserting_before(output):
        for place, value in zip(written, torch.utils._pytree.tree_leaves(output.args[0]), strict=True):
            copy_ = gm.graph.call_function(torch.ops.aten.copy_.default, (places[place], value))
            copy_.meta["val"] = places[place].meta["val"]
    output.args = ((),)
    inputs = tuple(InputSpec(place.name, "parameter", place.name) for place in places)
    return Program("g0", Level.JOINT, gm, Signature(inputs, ()))


def plain_sgd(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Any:
    return p - 0.1 * g, q - 0.1 * h


def proposals(
    function: Callable[..., Any], *tensors: Tensor, step: Any = EVERYWHERE, written: Sequence[int] = (0, 1)
) -> list[Proposal]:
    return list(step.propose(program(function, *tensors, written=written), context("infer")))


def reasons(*args: Any, **options: Any) -> set[str]:
    found = proposals(*args, **options)
    assert all(isinstance(item, NearMiss) for item in found)
    return {item.reason.text for item in found if isinstance(item, NearMiss)}


def on_gpu(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]


def test_tensors_that_the_kernel_cannot_take_stay() -> None:
    assert isinstance(proposals(plain_sgd, *torch.randn(4, 2, 3))[0], Candidate)
    p, q, g, h = torch.randn(4, 2, 3)
    turned = reasons(plain_sgd, p, q, torch.randn(3, 2).t(), torch.randn(3, 2).t())
    assert len(turned) == 1 and "laid out as [2, 3], [1, 2]" in turned.pop()
    gaps = reasons(plain_sgd, *(torch.randn(2, 6)[:, ::2] for _ in range(4)))
    assert gaps == {"a parameter has gaps in memory: [2, 3], [6, 2]"}
    default = reasons(plain_sgd, p, q, g, h, step=FuseOptimizer())
    assert default == {"no kernel runs on cpu, where the operator gains nothing"}
    with torch._subclasses.FakeTensorMode():
        assert isinstance(proposals(plain_sgd, *on_gpu(*[(2, 3)] * 4), step=FuseOptimizer())[0], Candidate)
        double = reasons(plain_sgd, *on_gpu(*[(2, 3)] * 4, dtype=torch.float64))
    assert double == {"float64 is not computed on the GPU"}


def test_memory_that_is_not_an_updates_own_stays() -> None:
    p, q, g, h = torch.randn(4, 2, 3)
    with torch._subclasses.FakeTensorMode():
        memory = torch.empty(4, 2, 3)
        assert reasons(plain_sgd, *memory) == {"another input shares its memory"}

    def own_view(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Any:
        return plain_sgd(p, q, p.view(9).view(3, 3), q.view(9).view(3, 3))

    assert reasons(own_view, torch.randn(3, 3), torch.randn(3, 3), g, h) == {
        "its gradient is memory that an update writes"
    }

    def overwritten(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Any:
        return torch.zeros_like(g), p.clone(), p - 0.1 * g

    def passed_on(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Any:
        return torch.zeros_like(g), p, p - 0.1 * g

    def cleared(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Any:
        return *plain_sgd(p, q, g, h), torch.zeros_like(g)

    made = [proposals(f, p, q, g, h, written=w) for f, w in ((overwritten, (2, 1, 0)), (cleared, (0, 1, 2)))]
    assert [[type(item) for item in each] for each in made] == [[Candidate], [Candidate]]
    assert reasons(passed_on, p, q, g, h, written=(2, 1, 0)) == {
        "its old value is read after what it reads is overwritten"
    }


def test_numbers_of_another_device_stay() -> None:
    def update(p: Tensor, g: Tensor, rate: Tensor) -> Any:
        return (p - rate * g,)

    with torch._subclasses.FakeTensorMode():
        p, g = on_gpu((2, 3), (2, 3))
        found = reasons(update, p, g, torch.empty(()), written=(0,))
    assert found == {"a number is on cpu, the parameter on cuda:0"}


def test_sizes_that_are_known_at_run_time_alone_stay() -> None:
    class Rows(nn.Module):
        def forward(self, p: Tensor, g: Tensor) -> None:
            p.copy_(p - 0.1 * g)

    fast = optimized(Rows(), tuple(torch.randn(2, 6, 3)), emit="eager", dynamic_shapes=True)
    assert not calls(fast) and not fast.report.near_misses


def test_programs_with_a_backward_stay() -> None:
    made = program(plain_sgd, *torch.randn(4, 2, 3))
    names = [spec.node for spec in made.signature.inputs]
    made.signature = replace(made.signature, outputs=(OutputSpec(names[0], "gradient", names[0]),))
    (found,) = EVERYWHERE.propose(made, context())
    assert isinstance(found, NearMiss) and found.reason.text == "the program has a backward"


def test_code_generators_are_left_what_they_do_in_one_kernel() -> None:
    """On a GPU that is not there: nothing is run."""

    def single(p: Tensor, g: Tensor) -> Any:
        return (p - 0.1 * g,)

    def lists(p: Tensor, q: Tensor, g: Tensor, h: Tensor) -> Any:
        return torch._foreach_add([p, q], [g, h], alpha=-0.1)

    ctx = replace(context("infer"), emit="inductor")
    with torch._subclasses.FakeTensorMode():
        given = on_gpu(*[(64, 64)] * 4)
        alone, listed, several = (
            list(FuseOptimizer().propose(program(f, *given[:n], written=range(n // 2)), ctx))
            for f, n in ((single, 2), (lists, 4), (plain_sgd, 4))
        )
    assert [item.reason.text for item in alone if isinstance(item, NearMiss)] == [
        "code generators make one kernel of one parameter's update"
    ]
    assert [item.reason.text for item in listed if isinstance(item, NearMiss)] == [
        "code generators make one kernel of calls on lists"
    ]
    assert isinstance(several[0], Candidate) and several[0].delta.seconds < 0


def test_without_its_kernel_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt_passes.fuse_optimizer as module

    class Bare:
        def kernels(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(module, "default_host", Bare)
    assert reasons(plain_sgd, *torch.randn(4, 2, 3)) == {"the kernel sgd-update is not installed"}


def test_it_runs_before_schedules_are_chosen() -> None:
    names = [step.name for step in Pipeline.of("default", host()).steps]
    assert names.index("fuse-optimizer") < names.index("insert-checkpoints")


def test_lists_and_single_tensors_come_to_the_same() -> None:
    ours, theirs = Updates(on_lists), Updates(on_lists)
    given = gradients(ours)
    fast = optimized(ours, (given[0],), emit="eager")
    numbers = calls(fast)[0].args[4]
    assert numbers[6] == pytest.approx(0.01) and numbers[7:] == [1.0, 1e-8]
    for each in given:
        fast(each)
        theirs(each)
    assert_same(ours, theirs)
