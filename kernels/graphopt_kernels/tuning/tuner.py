"""Which configuration of a kernel is fastest on a problem: few are compiled, fewer launched, one kept.

    configurations ── estimate, rank ──► at most 12 ── compile, prune, rank ──► check ──► measure ──► choose

Nothing that spills more than the default is launched, and nothing is measured whose results are not the
reference's. The default stays unless another is faster by more than 2 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from graphopt.candidate import Reason
from graphopt.errors import GraphoptError, brief
from graphopt.plugins import TunableSpec
from graphopt_kernels.tuning.checking import copied, difference, poisoned
from graphopt_kernels.tuning.compiling import calls_of, usage_of
from graphopt_kernels.tuning.lookup import device_text, fields_text
from graphopt_kernels.tuning.measuring import cold_copies, seconds_of
from graphopt_kernels.tuning.model import Gpu, Usage
from graphopt_kernels.tuning.store import Entry, code_of, versions

__all__ = ["Meter", "Outcome", "Trial", "TuningError", "present_gpu", "ranked", "shortlist", "tune"]

MOST = 12
"""Configurations of a problem that are compiled, the default among them."""

GAIN = 1.02
"""How many times faster than the default a configuration must be to be kept."""


class TuningError(GraphoptError):
    """Tuning that cannot begin: no device, no compiler, nothing to tune."""

    code = "tune"


@dataclass(frozen=True)
class Trial:
    """One configuration. ``usage`` is the compiler's, ``predicted`` the model's relative time, ``seconds``
    measured; ``refused`` says why it was not measured."""

    configuration: Any
    usage: Usage | None = None
    predicted: float | None = None
    seconds: float | None = None
    refused: Reason | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one kernel and problem. ``trials``: the default first, then as the model ranks them.

    ``chosen`` is the default unless another was faster by ``GAIN``; ``None`` where the default itself failed,
    which is an error of the kernel.
    """

    kernel: str
    problem: Any
    trials: tuple[Trial, ...]
    chosen: Trial | None

    @property
    def default(self) -> Trial:
        return self.trials[0]

    @property
    def best(self) -> Trial | None:
        """The fastest configuration, kept or not."""
        measured = [trial for trial in self.trials if trial.seconds is not None]
        return min(measured, key=lambda trial: trial.seconds or 0.0, default=None)

    def entry(self, spec: TunableSpec, device: str) -> Entry | None:
        """As it is stored; ``None`` where nothing was chosen."""
        if self.chosen is None or self.chosen.seconds is None or self.default.seconds is None:
            return None
        torch_version, triton_version = versions()
        kept = self.chosen is not self.default
        return Entry(
            kernel=self.kernel,
            problem=fields_text(self.problem),
            device=device,
            torch=torch_version,
            triton=triton_version,
            code=code_of(spec.sources),
            configuration=fields_text(self.chosen.configuration) if kept else None,
            default_us=round(self.default.seconds * 1e6, 2),
            us=round(self.chosen.seconds * 1e6, 2),
        )


class Meter(Protocol):
    """What measures: the present GPU, or a test's stand-in."""

    device: torch.device

    def __call__(
        self, runs: Sequence[Callable[[tuple[Any, ...]], object]], operands: tuple[Any, ...]
    ) -> list[float]:
        """Seconds of each of ``runs`` on ``operands``, which it may overwrite."""


class GraphMeter:
    """Replays CUDA graphs (``measuring``)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, runs: Sequence[Callable[[tuple[Any, ...]], object]], operands: tuple[Any, ...]
    ) -> list[float]:
        return seconds_of(runs, cold_copies(operands, self.device), self.device)


def present_gpu(device: torch.device) -> Gpu:
    """The limits of a CUDA device that is here."""
    about = torch.cuda.get_device_properties(device)
    return Gpu.of(device_text(device), (about.major, about.minor), about.multi_processor_count)


def shortlist(spec: TunableSpec, problem: Any, gpu: Gpu) -> list[Trial]:
    """The default, then others by the model's rank before anything is compiled; at most ``MOST``."""
    on = spec.default_on
    default = spec.default(problem) if on is None else on(problem, gpu.processors)
    guesses: dict[Any, float] = {}
    for configuration in spec.configurations(problem):
        if configuration != default and spec.check(problem, configuration) is None:
            usage = spec.estimate(problem, configuration)
            guesses[configuration] = spec.predict(problem, configuration, usage, gpu)
    kept = [default]
    while guesses and len(kept) < MOST:
        # What the model tells apart badly is told apart by measuring: next to one on the list, the like of it
        # is worth less.
        best = min(guesses, key=lambda c: guesses[c] * (1 + max(_alike(c, other) for other in kept)))
        kept.append(best)
        del guesses[best]
    return [Trial(configuration) for configuration in kept]


def _alike(one: Any, other: Any) -> float:
    """The share of fields that two configurations have in common."""
    return float(sum(a == b for a, b in zip(one, other, strict=True)) / len(one))


def ranked(
    spec: TunableSpec, problem: Any, trials: Sequence[Trial], usages: Sequence[Usage | Reason], gpu: Gpu
) -> list[Trial]:
    """Compiled ``trials``: the default first, then by predicted time, then those that are refused."""
    default_usage = usages[0]
    spilled = default_usage.spilled if isinstance(default_usage, Usage) else 0
    found = []
    for trial, usage in zip(trials, usages, strict=True):
        if isinstance(usage, Reason):
            found.append(replace(trial, refused=usage))
            continue
        predicted = spec.predict(problem, trial.configuration, usage, gpu)
        refused = None
        if usage.spilled > spilled:
            refused = Reason(f"it spills {usage.spilled} bytes of a thread")
        elif usage.shared > gpu.shared_of_program:
            refused = Reason(
                f"it takes {usage.shared} bytes of shared memory: a program has {gpu.shared_of_program}"
            )
        found.append(replace(trial, usage=usage, predicted=predicted, refused=refused))
    first, *rest = found
    return [first, *sorted(rest, key=lambda t: (t.refused is not None, t.predicted or 0.0))]


def tune(
    work: Sequence[tuple[TunableSpec, Any]],
    meter: Meter,
    gpu: Gpu,
    *,
    threads: int,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Iterator[Outcome]:
    """An ``Outcome`` for each kernel and problem of ``work``, in order. Nothing is stored.

    Everything is compiled before anything is measured: threads that compile would be in the way of the host.
    ``progress(step, done, total)`` counts configurations that were compiled and problems that were measured.
    """
    lists = [shortlist(spec, problem, gpu) for spec, problem in work]
    total = sum(len(trials) for trials in lists) + len(work)
    done = 0
    compiled: list[list[Usage | Reason]] = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        jobs = [
            [pool.submit(_usage, spec, problem, trial, gpu) for trial in trials]
            for (spec, problem), trials in zip(work, lists, strict=True)
        ]
        try:
            for (spec, _), futures in zip(work, jobs, strict=True):
                usages = []
                for future in futures:
                    progress(f"compiling {spec.name}", done, total)
                    usages.append(future.result())
                    done += 1
                compiled.append(usages)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for (spec, problem), trials, usages in zip(work, lists, compiled, strict=True):
        progress(f"measuring {spec.name}", done, total)
        yield _measured(spec, problem, ranked(spec, problem, trials, usages, gpu), meter, gpu)
        done += 1
    progress("done", total, total)


def _usage(spec: TunableSpec, problem: Any, trial: Trial, gpu: Gpu) -> Usage | Reason:
    return usage_of(calls_of(spec, problem, trial.configuration, gpu.processors), gpu)


def _measured(spec: TunableSpec, problem: Any, trials: Sequence[Trial], meter: Meter, gpu: Gpu) -> Outcome:
    try:
        operands = spec.operands(problem, meter.device)
        right = spec.reference(problem, copied(operands))
    except torch.OutOfMemoryError:
        reason = Reason("the problem does not fit the memory of the device")
        return Outcome(spec.name, problem, tuple(replace(t, refused=reason) for t in trials), None)
    checked = [
        trial
        if trial.refused is not None
        else replace(trial, refused=_wrong(spec, problem, trial, operands, right, gpu))
        for trial in trials
    ]
    del right
    left = [number for number, trial in enumerate(checked) if trial.refused is None]
    if 0 not in left:
        return Outcome(spec.name, problem, tuple(checked), None)
    kernels = spec.kernels()

    def runner(configuration: Any) -> Callable[[tuple[Any, ...]], object]:
        return lambda given: spec.run(kernels, gpu.processors, problem, given, configuration)

    def timed(numbers: Sequence[int]) -> None:
        runs = [runner(checked[number].configuration) for number in numbers]
        for number, seconds in zip(numbers, meter(runs, operands), strict=True):
            checked[number] = replace(checked[number], seconds=seconds)

    try:
        timed(left)
    except torch.OutOfMemoryError:
        # Timing takes copies of the operands, beyond what any cache holds.
        reason = Reason("timing it does not fit the memory of the device")
        refused = tuple(replace(trial, refused=trial.refused or reason) for trial in checked)
        return Outcome(spec.name, problem, refused, None)
    best = min(left, key=lambda number: checked[number].seconds or 0.0)
    if _faster(checked[best], checked[0]):
        # The least of several figures is partly luck: it has to win against the default alone, too.
        timed([0, best])
    chosen = checked[best] if _faster(checked[best], checked[0]) else checked[0]
    return Outcome(spec.name, problem, tuple(checked), chosen)


def _faster(one: Trial, default: Trial) -> bool:
    assert one.seconds is not None and default.seconds is not None
    return one.seconds * GAIN < default.seconds


def _wrong(
    spec: TunableSpec,
    problem: Any,
    trial: Trial,
    operands: tuple[Any, ...],
    right: Sequence[torch.Tensor],
    gpu: Gpu,
) -> Reason | None:
    """Why the results of a configuration are not the reference's, or ``None``."""
    try:
        with poisoned():
            given = copied(operands)
            found = spec.run(spec.kernels(), gpu.processors, problem, given, trial.configuration)
            return difference(found, right)
    except Exception as error:  # whatever a launch raises: what cannot run is not chosen
        if operands and any(isinstance(x, torch.Tensor) and x.is_cuda for x in operands):
            _check_device(spec, trial)
        return Reason(f"it does not run: {brief(error)}")


def _check_device(spec: TunableSpec, trial: Trial) -> None:
    """Some errors leave a device that runs nothing any more, until the process ends."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise TuningError(
            f"{spec.name} with {fields_text(trial.configuration)} broke the device: {brief(error)}",
            hint="what was measured before is kept",
        ) from error
