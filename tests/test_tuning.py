"""Tuning without a GPU: what is compiled, pruned, refused and chosen; launches compiled for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.candidate import Reason
from graphopt.plugins import TunableSpec, default_host
from graphopt_kernels.tuning.checking import difference, poisoned
from graphopt_kernels.tuning.compiling import calls_of, usage_of
from graphopt_kernels.tuning.lookup import fields_text, parsed
from graphopt_kernels.tuning.model import Gpu, Usage, memory_bound, resident
from graphopt_kernels.tuning.store import code_of, read_entries, shipped_file, versions
from graphopt_kernels.tuning.tuner import MOST, Outcome, Trial, ranked, shortlist, tune
from tests.tunables import H200, Meter, Sizes, Way, launched, tunable

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def tuned(spec: TunableSpec, meter: Meter | None = None) -> Outcome:
    (outcome,) = tune([(spec, Sizes(8))], meter or Meter(), H200, threads=2)
    return outcome


# --- what is chosen ----------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_told_with_the_default() -> None:
    outcome = tuned(tunable(Way(100), Way(80), Way(90)))
    assert outcome.chosen is not None and outcome.chosen.configuration == Way(80)
    assert outcome.default.configuration == Way(100) and outcome.default.seconds == pytest.approx(100e-6)
    assert [trial.configuration.us for trial in outcome.trials] == [100, 80, 90]
    entry = outcome.entry(tunable(Way(100)), H200.name)
    assert entry is not None
    assert (entry.problem, entry.configuration) == ("rows=8 dtype=float32 soft=no", "us=80 fault=")
    assert (entry.default_us, entry.us, entry.device) == (100.0, 80.0, H200.name)
    assert (entry.torch, entry.triton) == versions()
    assert entry.code == code_of(("graphopt_kernels.bandwidth_triton",))


@pytest.mark.parametrize(("other", "kept"), [(100, True), (99, True), (98, False)])
def test_the_default_stays_unless_another_is_faster_by_two_percent(other: int, kept: bool) -> None:
    outcome = tuned(tunable(Way(100), Way(other)))
    assert outcome.chosen is not None
    assert (outcome.chosen is outcome.default) is kept
    entry = outcome.entry(tunable(Way(100)), H200.name)
    assert entry is not None and (entry.configuration is None) is kept


def test_a_lucky_figure_does_not_count() -> None:
    class Moody(Meter):
        """The first figures say that everything is twice as fast as it is."""

        def __call__(self, runs: Any, operands: tuple[Any, ...]) -> list[float]:
            first = not self.asked
            times = super().__call__(runs, operands)
            return [times[0], *(t / 2 for t in times[1:])] if first else times

    meter = Moody()
    outcome = tuned(tunable(Way(100), Way(99), Way(120)), meter)
    assert meter.asked == [Way(100), Way(99), Way(120), Way(100), Way(99)]
    assert outcome.chosen is outcome.default and outcome.trials[1].seconds == pytest.approx(99e-6)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("errs", "result 0 is off by 0.01: at most 0.0001 is rounding"),
        ("forgets", "result 0 is finite where the reference is not, or the other way around"),
        ("raises", "it does not run: RuntimeError: out of resources"),
        ("widens", "result 0 is torch.float64 [8, 2]: expected torch.float32 [8, 2]"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_and_never_timed(fault: str, reason: str) -> None:
    meter = Meter()
    outcome = tuned(tunable(Way(100), Way(1, fault), Way(90)), meter)
    refused = {trial.configuration: str(trial.refused) for trial in outcome.trials if trial.refused}
    assert refused == {Way(1, fault): reason}
    assert outcome.chosen is not None and outcome.chosen.configuration == Way(90)
    assert Way(1, fault) not in meter.asked


def test_a_default_that_is_wrong_chooses_nothing() -> None:
    outcome = tuned(tunable(Way(100, "errs"), Way(90)))
    assert outcome.chosen is None and outcome.entry(tunable(Way(100)), H200.name) is None
    assert "is off by" in str(outcome.default.refused)


def test_a_problem_that_does_not_fit_is_said() -> None:
    def operands(problem: Any, device: torch.device) -> tuple[Any, ...]:
        if device.type != "meta":
            raise torch.OutOfMemoryError("tried to allocate")
        return (torch.empty(1, device=device),)

    outcome = tuned(replace(tunable(Way(100), Way(90)), operands=operands))
    assert outcome.chosen is None
    assert str(outcome.default.refused) == "the problem does not fit the memory of the device"


def test_a_problem_that_cannot_be_timed_for_lack_of_memory_is_said() -> None:
    class Full(Meter):
        def __call__(self, runs: Any, operands: Any) -> Any:
            raise torch.OutOfMemoryError("tried to allocate")

    outcome = tuned(tunable(Way(100), Way(90)), Full())
    assert outcome.chosen is None and outcome.entry(tunable(Way(100)), H200.name) is None
    reasons = {str(trial.refused) for trial in outcome.trials}
    assert reasons == {"timing it does not fit the memory of the device"}


def test_what_the_kernel_does_not_allow_is_not_tried() -> None:
    launched.clear()
    outcome = tuned(tunable(Way(100), Way(1, "invalid"), Way(100), Way(90)))
    assert [trial.configuration for trial in outcome.trials] == [Way(100), Way(90)]
    assert Way(1, "invalid") not in launched


def test_few_configurations_are_tried_and_progress_is_told() -> None:
    steps: list[tuple[str, int, int]] = []
    spec = tunable(Way(1000), *(Way(us) for us in range(100, 140)))
    (outcome,) = tune([(spec, Sizes(8))], Meter(), H200, threads=1, progress=lambda *step: steps.append(step))
    assert len(outcome.trials) == MOST
    assert {trial.configuration.us for trial in outcome.trials} == {1000, *range(100, 99 + MOST)}
    assert steps[0] == ("compiling add-one", 0, MOST + 1) and steps[-1] == ("done", MOST + 1, MOST + 1)


def test_the_list_holds_unlike_configurations_where_the_model_sees_no_difference() -> None:
    spec = default_host().tunable("row-norm-forward")
    for problem in spec.shipped():
        trials = shortlist(spec, problem, H200)
        assert trials[0].configuration == spec.default(problem) and len(trials) <= MOST
        found = [trial.configuration for trial in trials]
        assert len(set(found)) == len(found)
        assert len({c.warps for c in found}) >= 2 and {c.ahead for c in found} == {False, True}


# --- how results are compared ------------------------------------------------------------------


def test_new_tensors_hold_nan_while_results_are_checked_and_never_after() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="inside"), poisoned():
        assert torch.empty(100).isnan().all()
        raise ValueError("inside")
    assert torch.are_deterministic_algorithms_enabled() is before


def test_results_are_the_same_up_to_rounding_with_infinities_and_nan_in_place() -> None:
    nan, inf = float("nan"), float("inf")
    right = torch.tensor([1.0, nan, inf, -inf, 300.0])
    assert difference([right + 1e-5], [right]) is None
    assert difference([right.half()], [right.half()]) is None
    assert "finite" in str(difference([right.nan_to_num()], [right]))
    assert str(difference([right * torch.tensor([1, 1, -1, 1, 1])], [right])) == (
        "result 0 has other infinities than the reference"
    )
    assert str(difference([], [right])) == "it gives 0 results: expected 1"
    assert difference([torch.empty(0)], [torch.empty(0)]) is None
    whole = torch.arange(3)
    assert difference([whole], [whole]) is None
    assert str(difference([whole + 1], [whole])) == "result 0 differs from the reference"


# --- the model ---------------------------------------------------------------------------------


def test_programs_of_a_multiprocessor_follow_from_registers_warps_and_shared_memory() -> None:
    assert resident(Usage(64, 0, 0), 4, H200) == 8
    assert resident(Usage(255, 0, 0), 8, H200) == 1
    assert resident(Usage(16, 0, 0), 1, H200) == 32
    assert resident(Usage(32, 0, 100 * 1024), 4, H200) == 2
    assert resident(Usage(32, 0, 228 * 1024), 4, H200) == 0
    # A capability that is not known counts as the smallest that is.
    unknown = Gpu.of("another", (8, 9), 128)
    assert (unknown.warps, unknown.shared_of_program) == (48, 99 * 1024)


def test_predictions_price_what_slows_a_stream_down() -> None:
    groups = 132 * 16 * 100
    streams = {"warps": 4, "groups": groups, "programs": 0, "tile_bytes": 8192, "ahead": False, "useful": 1.0}

    def time(spilled: int = 0, shared: int = 0, **changes: Any) -> float:
        settings: dict[str, Any] = streams | changes
        return memory_bound(Usage(32, spilled, shared), H200, **settings)

    assert time() == pytest.approx(1.0)
    assert time(useful=0.6) > time()
    assert time(tile_bytes=256) > time()
    assert time(programs=1) > time(programs=1, ahead=True)
    assert time(groups=132 * 16 + 1) > time()
    assert time(spilled=64) > time()
    assert time(shared=300 * 1024) == float("inf")


def test_what_spills_more_than_the_default_or_does_not_fit_is_pruned() -> None:
    spec = tunable(Way(100))
    trials = [Trial(Way(us)) for us in (100, 90, 80, 70, 60)]
    usages = [Usage(255, 8, 0), Usage(128, 8, 0), Usage(255, 12, 0), Usage(64, 0, 228 * 1024), Reason("no")]
    found = ranked(spec, Sizes(8), trials, usages, H200)
    reasons = {trial.configuration.us: trial.refused and trial.refused.text for trial in found}
    assert reasons == {
        100: None,
        90: None,
        80: "it spills 12 bytes of a thread",
        70: "it takes 233472 bytes of shared memory: a program has 232448",
        60: "no",
    }
    assert [trial.configuration.us for trial in found][:2] == [100, 90]


# --- real kernels, compiled for sm_90 ----------------------------------------------------------


def problems(*names: str) -> list[Any]:
    return [
        pytest.param(name, problem, id=f"{name} {fields_text(problem)}")
        for name in names
        for problem in default_host().tunable(name).shipped()
    ]


ALL = ("row-norm-forward", "row-norm-backward", "cross-entropy-rows")


def spilled(problem: Any) -> int:
    """Bytes of a thread that a configuration may keep in memory: only where rows fill the registers."""
    full = getattr(problem, "width", 0) > 8192 and problem.centered and "d_bias" in problem._fields
    return 192 if full else 0


def compiled(name: str, problem: Any, configuration: Any) -> Usage:
    spec = default_host().tunable(name)
    usage = usage_of(calls_of(spec, problem, configuration, H200.processors), H200)
    assert isinstance(usage, Usage), usage
    return usage


@needs_triton
@pytest.mark.parametrize("name", ALL)
def test_a_default_compiles_for_sm_90_without_spills(name: str) -> None:
    spec = default_host().tunable(name)
    problem = next(iter(spec.shipped()))
    usage = compiled(name, problem, spec.default(problem))
    assert usage.spilled == 0 and 16 <= usage.registers <= 128 and usage.shared <= 16384


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("name", "problem"), problems(*ALL))
def test_every_default_compiles_for_sm_90_without_spills(name: str, problem: Any) -> None:
    spec = default_host().tunable(name)
    usage = compiled(name, problem, spec.default(problem))
    assert usage.spilled <= spilled(problem) and usage.shared <= H200.shared_of_program


@needs_triton
def test_configurations_that_spill_are_never_launched() -> None:
    spec = default_host().tunable("cross-entropy-rows")
    problem = next(iter(spec.shipped()))
    (wide,) = [c for c in spec.configurations(problem) if c.block == 32768]
    trials = [Trial(spec.default(problem)), Trial(wide)]
    usages = [usage_of(calls_of(spec, problem, t.configuration, 132), H200) for t in trials]
    found = ranked(spec, problem, trials, usages, H200)
    assert found[0].refused is None and found[0].usage is not None and found[0].usage.spilled == 0
    assert str(found[1].refused).startswith("it spills ")


@needs_triton
def test_what_does_not_compile_says_why() -> None:
    from graphopt_kernels import row_norm_triton
    from graphopt_kernels.tuning.calls import KernelCall

    call = KernelCall(row_norm_triton.columns_kernel, (1,), {"programs": 3, "WIDTH": 8}, {"num_warps": 4})
    assert str(usage_of([call], H200)).startswith("it does not compile: ")


@needs_triton
def test_what_is_compiled_ahead_is_what_a_launch_compiles() -> None:
    """By triton's own launcher, on a driver that has no device: in a process of its own."""
    script = """
        from types import SimpleNamespace
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        from graphopt.plugins import default_host
        from graphopt_kernels.tuning.compiling import calls_of, compiled

        driver.set_active(SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        ))
        for name in ("row-norm-backward", "cross-entropy-rows"):
            spec = default_host().tunable(name)
            problem = next(iter(spec.shipped()))
            for call in calls_of(spec, problem, spec.default(problem), 1):
                ahead = compiled(call, (9, 0))
                tensors = {
                    name: torch.empty(64, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
                    for name, value in call.arguments.items()
                }
                launched = call.function.run(**tensors, **call.options, grid=(1,), warmup=True)
                assert launched.hash == ahead.hash, (call.signature, launched.src.attrs)
    """
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
def test_every_configuration_of_a_kernel_computes_what_its_reference_does() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import torch
        from graphopt.plugins import default_host
        from graphopt_kernels.tuning.checking import copied, difference, poisoned

        torch.manual_seed(0)
        single, half = torch.float32, torch.float16
        changes = {
            "row-norm-forward": [
                dict(rows=5, width=100, dtype=single, result=single, weight=single),
                dict(rows=32, width=100, dtype=half, result=half, weight=single, added=True, bias=single),
            ],
            "row-norm-backward": [
                dict(rows=8, width=100, dtype=single, weight=single, passed=True, centered=True, d_bias=True),
                dict(rows=5, width=100, dtype=half, weight=None, d_weight=False),
            ],
            "cross-entropy-rows": [
                dict(rows=4, columns=3000, dtype=single, smoothed=True, softcapped=True),
                dict(rows=3, columns=3000, dtype=half, statistics=False, aligned=False),
                dict(rows=3, columns=3000, dtype=single, gradient=False),
            ],
        }
        for name, problems in changes.items():
            spec = default_host().tunable(name)
            first = next(iter(spec.shipped()))
            for problem in (first._replace(**change) for change in problems):
                operands = spec.operands(problem, torch.device("cpu"))
                right = spec.reference(problem, copied(operands))
                tried = [spec.default(problem), *spec.configurations(problem)]
                assert len(tried) > 4, problem
                for configuration in tried[:: max(1, len(tried) // 6)]:
                    with poisoned():
                        found = spec.run(spec.kernels(), 2, problem, copied(operands), configuration)
                    reason = difference(found, right)
                    assert reason is None, (name, problem, configuration, reason)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


# --- what is shipped ---------------------------------------------------------------------------


def shipped() -> list[Any]:
    """Problems and configurations of what is shipped for the present code of kernels; the rest is left out at
    a launch as well."""
    found = []
    for path in sorted(Path(str(shipped_file("any"))).parent.glob("*.json")):
        for entry in read_entries(path):
            spec = default_host().tunable(entry.kernel)
            assert entry.us <= entry.default_us
            known = {fields_text(problem): problem for problem in spec.shipped()}
            if entry.code == code_of(spec.sources) and entry.configuration is not None:
                problem = known[entry.problem]
                found.append((spec, problem, parsed(spec.default(problem), entry.configuration)))
    return found


def test_shipped_results_are_of_problems_and_configurations_that_there_are() -> None:
    for spec, problem, configuration in shipped():
        assert spec.check(problem, configuration) is None
        assert configuration != spec.default(problem)


@pytest.mark.slow
@needs_triton
def test_every_shipped_configuration_compiles_for_sm_90_without_spills() -> None:
    for spec, problem, configuration in shipped():
        assert compiled(spec.name, problem, configuration).spilled <= spilled(problem)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", ALL)
def test_a_kernel_is_tuned_on_a_gpu(name: str) -> None:
    from graphopt_kernels.tuning.tuner import GraphMeter, present_gpu

    spec, device = default_host().tunable(name), torch.device("cuda", 0)
    problem = next(iter(spec.shipped()))._replace(rows=512)
    (outcome,) = tune([(spec, problem)], GraphMeter(device), present_gpu(device), threads=4)
    assert outcome.chosen is not None and outcome.chosen.seconds
    assert not [t for t in outcome.trials if t.refused and not str(t.refused).startswith("it spills")]
