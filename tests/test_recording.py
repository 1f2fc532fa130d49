"""Steps replayed from graphs: when they are, when they are not, and that nobody can tell by the numbers.

Graphs of the CPU stand in for CUDA's: they run the recorded work again, into the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphopt import recording
from graphopt.recording import Recorder, Roles


class _Work:
    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class HostGraphs:
    """Runs recorded work again. ``kept`` is put back after recording, which must run nothing."""

    kept: list[torch.Tensor] = []
    free, pool = 1 << 40, 1 << 10
    share = 1.0
    released: list[int] = []
    recorder: Recorder

    def __init__(self, device: torch.device) -> None:
        self.latest: list[Any] | None = None

    def record(self, work: Callable[[], Any]) -> tuple[_Work, Any]:
        if self.latest is not None:
            return _Work(self._backward), None
        kept = [x.clone() for x in self.kept]
        made = work()
        with torch.no_grad():
            for x, value in zip(self.kept, kept, strict=True):
                x.copy_(value)
        first = self.latest = list(torch.utils._pytree.tree_leaves(made))
        with_gradients = torch.is_grad_enabled()

        def forward() -> None:
            with torch.set_grad_enabled(with_gradients):
                self.latest = list(torch.utils._pytree.tree_leaves(work()))
            for x, value in zip(first, self.latest, strict=True):
                if isinstance(x, torch.Tensor):
                    x.detach().copy_(value.detach())

        return _Work(forward), made

    def _backward(self) -> None:
        assert self.latest is not None and self.recorder._step is not None
        ends = [x for x in self.latest if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.backward(ends, self.recorder._step.tangents)

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        return work(), lambda: self.share

    def pool_bytes(self) -> int:
        return self.pool

    def release(self) -> None:
        self.released.append(self.pool)

    def free_bytes(self) -> int:
        return self.free


class Case:
    """A program of x, weight, bias and a buffer, which counts its runs; with its recorder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(4, 3, requires_grad=True)
        self.bias = torch.randn(4, requires_grad=True)
        self.buffer = torch.zeros(4)
        self.runs = 0
        self.notes: list[str] = []
        self.drops = options.pop("drops", False)
        roles = Roles(frozenset((1, 2, 3)), frozenset((3,)), random=self.drops)
        self.function = options.pop("function", self.program)
        options = {"graphs": HostGraphs, "roles": roles, **options}
        self.recorder = Recorder(self._run, device=torch.device("cpu"), note=self.notes.append, **options)
        monkeypatch.setattr(HostGraphs, "recorder", self.recorder, raising=False)
        monkeypatch.setattr(HostGraphs, "kept", [self.buffer])
        self.held()

    def held(self) -> None:
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def program(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, buffer: torch.Tensor) -> Any:
        y = torch.nn.functional.linear(x, weight, bias)
        if self.drops:
            y = torch.nn.functional.dropout(y, 0.5)
        with torch.no_grad():
            buffer.add_(y.detach().mean(0))
        return [y.square().mean(), y.detach().amax()]

    def _run(self, *arguments: Any) -> Any:
        self.runs += 1
        return self.function(*arguments)

    def __call__(self, x: torch.Tensor) -> Any:
        return self.recorder(x, self.weight, self.bias, self.buffer)

    def gradients(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What the gradients are, by running the program plainly."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.weight, self.bias)]
        loss = self.program(x, *leaves, self.buffer.clone())[0]
        return list(torch.autograd.grad(loss, leaves))

    def recorded(self) -> Case:
        for _ in range(recording.WARM):
            self(torch.randn(5, 3))[0].backward()
        self(torch.randn(5, 3))[0].backward()
        assert self.recorder._step is not None, self.notes
        for parameter in (self.weight, self.bias):
            assert parameter.grad is not None
            parameter.grad.zero_()
        self.runs = 0
        return self


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch)


def test_the_third_step_and_those_after_it_are_replayed_with_the_same_numbers(case: Case) -> None:
    expected = [torch.zeros(4, 3), torch.zeros(4)]
    total = torch.zeros(4)
    for number in range(6):
        x = torch.randn(5, 3)
        for sum_, grad in zip(expected, case.gradients(x), strict=True):
            sum_ += grad
        y = torch.nn.functional.linear(x, case.weight, case.bias).detach()
        total += y.mean(0)
        loss, largest = case(x)
        assert bool(case.notes) == (number >= recording.WARM)
        assert loss.item() == pytest.approx(y.square().mean().item()) and largest == y.amax()
        assert loss.requires_grad and not largest.requires_grad
        loss.backward()
    torch.testing.assert_close([case.weight.grad, case.bias.grad], expected)
    torch.testing.assert_close(case.buffer, total)
    assert case.notes == ["steps are replayed from a CUDA graph, which keeps 1.00 KiB"]


def test_results_stay_what_they_were_when_the_next_step_is_replayed(case: Case) -> None:
    case.recorded()
    first = case(torch.ones(5, 3))[0]
    value = first.item()
    first.backward()
    case(torch.zeros(5, 3))[0].backward()
    assert first.item() == value


def test_a_second_forward_before_the_backward_of_the_first_is_run_as_ever(case: Case) -> None:
    case.recorded()
    one, two = torch.randn(5, 3), torch.randn(5, 3)
    expected = [a + b for a, b in zip(case.gradients(one), case.gradients(two), strict=True)]
    (case(one)[0] + case(two)[0]).backward()
    torch.testing.assert_close([case.weight.grad, case.bias.grad], expected)


def test_a_forward_whose_result_is_dropped_is_not_waited_for(case: Case) -> None:
    case.recorded()
    case(torch.randn(5, 3))
    runs = case.runs
    case(torch.randn(5, 3))[0].backward()
    # The replay of the stand-in runs the program, once.
    assert case.runs == runs + 1 and case.recorder._step is not None


@pytest.mark.parametrize("drops", [False, True])
def test_gradients_that_are_only_asked_for_are_those_of_the_same_run(
    monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    case = Case(monkeypatch, drops=drops).recorded()
    x = torch.randn(5, 3)
    state = torch.get_rng_state()
    expected = case.gradients(x)
    torch.set_rng_state(state)
    loss = case(x)[0]
    buffer = case.buffer.clone()
    torch.testing.assert_close(list(torch.autograd.grad(loss, [case.weight, case.bias])), expected)
    pending = case.recorder._step.pending()  # type: ignore[union-attr,misc]
    assert pending is not None and pending.done, "later calls would not be replayed while the loss is held"
    assert torch.equal(case.buffer, buffer), "the second run has written for good"
    assert case.weight.grad is not None and not case.weight.grad.any()


def test_a_second_backward_through_a_graph_that_was_kept_adds_as_much_again(case: Case) -> None:
    case.recorded()
    x = torch.randn(5, 3)
    expected = [2 * g for g in case.gradients(x)]
    loss = case(x)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([case.weight.grad, case.bias.grad], expected)


def test_hooks_of_parameters_see_their_gradients(case: Case) -> None:
    case.recorded()
    x = torch.randn(5, 3)
    expected = case.gradients(x)
    seen = []
    loss = case(x)[0]
    case.weight.register_hook(seen.append)
    loss.backward()
    torch.testing.assert_close(seen, expected[:1])
    case(x)[0].backward()
    torch.testing.assert_close(seen[1], expected[0])


def test_without_gradients_in_place_nothing_is_recorded_and_nothing_said(case: Case) -> None:
    for _ in range(5):
        case.weight.grad = case.bias.grad = None
        case(torch.randn(5, 3))[0].backward()
    assert not case.notes and case.recorder._step is None


def test_gradients_that_go_between_forward_and_backward_end_replaying(case: Case) -> None:
    case.recorded()
    x = torch.randn(5, 3)
    loss = case(x)[0]
    case.weight.grad = case.bias.grad = None
    loss.backward()
    torch.testing.assert_close([case.weight.grad, case.bias.grad], case.gradients(x))
    assert case.notes[1:] == ["steps are launched kernel by kernel: gradients are not kept from step to step"]


def test_other_shapes_are_run_as_ever(case: Case) -> None:
    case.recorded()
    x = torch.randn(7, 3)
    expected = case.gradients(x)
    case(x)[0].backward()
    torch.testing.assert_close([case.weight.grad, case.bias.grad], expected)


def test_what_has_moved_is_recorded_anew_a_few_times_and_then_no_more(case: Case) -> None:
    case.recorded()
    for _ in range(2 * recording.MOVES):
        case.held()
        for _ in range(2):
            x = torch.randn(5, 3)
            before = [case.weight.grad.clone(), case.bias.grad.clone()]  # type: ignore[union-attr]
            expected = [a + b for a, b in zip(before, case.gradients(x), strict=True)]
            case(x)[0].backward()
            torch.testing.assert_close([case.weight.grad, case.bias.grad], expected)
    assert case.notes[1:] == ["steps are launched kernel by kernel: gradients move from step to step"]


def test_a_parameter_that_is_written_before_the_backward_is_an_error_as_ever(case: Case) -> None:
    case.recorded()
    loss = case(torch.randn(5, 3))[0]
    with torch.no_grad():
        case.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written between its forward and its backward"):
        torch.autograd.grad(loss, [case.weight])


def test_inference_is_replayed_too(case: Case) -> None:
    with torch.no_grad():
        for number in range(5):
            x = torch.full((5, 3), float(number))
            y = torch.nn.functional.linear(x, case.weight, case.bias)
            loss, _ = case(x)
            assert loss.item() == pytest.approx(y.square().mean().item())
    assert case.notes == ["steps are replayed from a CUDA graph, which keeps 1.00 KiB"]
    assert case.recorder._step is not None and case.recorder._step.backward is None


def test_a_pause_lasts_as_long_as_it_is_asked_for(case: Case) -> None:
    case.recorded()
    case.recorder.paused = True
    pending = case.recorder._step.pending  # type: ignore[union-attr]
    case(torch.randn(5, 3))[0].backward()
    assert case.recorder._step.pending is pending  # type: ignore[union-attr]
    case.recorder.paused = False
    case(torch.randn(5, 3))[0].backward()
    assert case.recorder._step.pending is not pending  # type: ignore[union-attr]


def _returns_input(x: Any, weight: Any, bias: Any, buffer: Any) -> Any:
    return [torch.nn.functional.linear(x, weight, bias).sum(), buffer]


def _returns_much(x: Any, weight: Any, bias: Any, buffer: Any) -> Any:
    return [torch.nn.functional.linear(x, weight, bias).sum(), torch.zeros(recording.RETURNED // 4 + 1)]


def _fails(x: Any, weight: Any, bias: Any, buffer: Any) -> Any:
    if _fails.count == recording.WARM:  # type: ignore[attr-defined]
        _fails.count += 1  # type: ignore[attr-defined]
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    _fails.count += 1  # type: ignore[attr-defined]
    return [torch.nn.functional.linear(x, weight, bias).sum()]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"roles": Roles(frozenset((1, 2)), frozenset((3,)))}, "it writes its inputs"),
        ({"function": _returns_input}, "it returns an input, or one tensor twice"),
        ({"function": _returns_much}, "it returns 16.00 MiB, of which each call would make a copy"),
        ({"room": 1000}, "a graph would keep 1.06 KiB, the budget leaves 1000 B"),
        (
            {"room": 1100, "expected_bytes": 1010},
            "a graph would keep about 1.08 KiB, the budget leaves 1.07 KiB",
        ),
        ({"expected_bytes": 1 << 40}, "a graph would keep 1024.00 GiB of the 1024.00 GiB that are free"),
        (
            {"function": _fails},
            "recording it failed (RuntimeError: operation not permitted when stream is capturing)",
        ),
    ],
)
def test_what_cannot_be_replayed_is_run_as_ever_and_the_reason_said(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    _fails.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(HostGraphs, "released", [])
    case = Case(monkeypatch, **options)
    for _ in range(5):
        case.held()
        case(torch.ones(5, 3))[0].backward()
        assert case.weight.grad is not None and case.weight.grad.any()
    assert case.notes == [f"steps are launched kernel by kernel: {reason}"]
    # What was recorded for nothing is given back.
    assert len(HostGraphs.released) == ("writes its inputs" not in reason)


def test_developers_are_told_why_recording_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    _fails.count = 0  # type: ignore[attr-defined]
    case = Case(monkeypatch, function=_fails, strict=True)
    for _ in range(recording.WARM):
        case(torch.ones(5, 3))[0].backward()
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        case(torch.ones(5, 3))


def test_steps_that_do_not_wait_for_the_host_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostGraphs, "share", 0.4)
    case = Case(monkeypatch)
    for _ in range(4):
        case(torch.randn(5, 3))[0].backward()
    reason = "queueing them takes 40 % of their time, so the GPU never waits"
    assert case.notes == [f"steps are launched kernel by kernel: {reason}"]


def test_inputs_that_want_gradients_and_hooks_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    for _ in range(4):
        x = torch.randn(5, 3, requires_grad=True)
        case(x)[0].backward()
        assert x.grad is not None
    assert case.notes == ["steps are launched kernel by kernel: gradients of its inputs are wanted"]
    case = Case(monkeypatch)
    seen: list[torch.Tensor] = []
    case.bias.register_hook(seen.append)
    for _ in range(4):
        case(torch.randn(5, 3))[0].backward()
    assert len(seen) == 4
    assert case.notes == ["steps are launched kernel by kernel: hooks wait for gradients of parameters"]
