"""Whether a group of operators of a compiled program runs as Inductor's kernels or as one that is emitted.

The default is Inductor. ``graphopt tune TARGET`` asks while it compiles, measures what was asked for, and
keeps what is faster by more than 2 %; only then does ``graphopt.optimize`` use the kernel (``emit.replace``).
A problem is the name of a kernel's file, which ends in a hash of its text: shapes, layouts and all.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from graphopt.plugins import TunableSpec
from graphopt_kernels.emit.running import file_of, module_of
from graphopt_kernels.tuning.lookup import Choice, device_text, fields_text
from graphopt_kernels.tuning.model import Gpu, Usage
from graphopt_kernels.tuning.table import measured

__all__ = [
    "EMITTED",
    "GROUPS",
    "GroupCode",
    "GroupProblem",
    "anything_measured",
    "group_tunable",
    "was_measured",
]

EMITTED, INDUCTOR = "emitted", "inductor"

_JOINT = ":"
"""Between the name of a file and that of a function in it."""


class GroupProblem(NamedTuple):
    """``file``: the name of the kernel's, without ``.py``."""

    file: str


class GroupCode(NamedTuple):
    """``by``: whose kernels run, ``"inductor"`` or ``"emitted"``."""

    by: str


def _default(problem: GroupProblem) -> GroupCode:
    return GroupCode(INDUCTOR)


def _check(problem: GroupProblem, code: GroupCode) -> None:
    return None


GROUPS: Choice[GroupProblem, GroupCode] = Choice("emitted-group", (), _default, _check)


def anything_measured(device: torch.device) -> bool:
    """Whether any group was measured on a device."""
    return measured(GROUPS.kernel, device_text(device), None)


def was_measured(problem: GroupProblem, device: torch.device) -> bool:
    """Whether a group was measured on a device, whatever came of it."""
    return measured(GROUPS.kernel, device_text(device), fields_text(problem))


def group_tunable() -> TunableSpec:
    """The choice between emitted kernels and Inductor's."""
    return TunableSpec(
        name=GROUPS.kernel,
        sources=GROUPS.sources,
        kernels=_Kernels,
        default=_default,
        configurations=_configurations,
        check=_check,
        operands=_operands,
        run=_run,
        reference=_reference,
        estimate=lambda problem, code: Usage(0, 0, 0),
        predict=_predicted,
        shipped=lambda: (),
        summary="groups of operators of compiled programs: emitted kernels or Inductor's",
    )


class _Kernels:
    """The jitted functions of emitted files, by the names of both."""

    def __getattr__(self, name: str) -> Any:
        file, _, function = name.partition(_JOINT)
        return getattr(module_of(file), function)


def _configurations(problem: GroupProblem) -> Iterator[GroupCode]:
    yield GroupCode(EMITTED)


def _predicted(problem: GroupProblem, code: GroupCode, usage: Usage, gpu: Gpu) -> float:
    # There are two: both are measured.
    return 1.0


def _operands(problem: GroupProblem, device: torch.device) -> tuple[Any, ...]:
    return tuple(_filled(x, device) for x in file_of(problem.file).built.inputs)


def _filled(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if device.type == "meta":
        return made
    if like.dtype.is_floating_point:
        return made.normal_()
    # Zeros are places in every table.
    return made.bernoulli_() if like.dtype == torch.bool else made.zero_()


def _run(
    kernels: Any, processors: int, problem: GroupProblem, operands: tuple[Any, ...], code: GroupCode
) -> Sequence[torch.Tensor]:
    module = module_of(problem.file)
    if code.by == EMITTED:
        return _launching(kernels, problem.file)(*operands)  # type: ignore[no-any-return]
    if operands[0].device.type == "meta":
        return ()  # Inductor compiles what it runs when it first runs.
    return _compiled(problem.file, module.reference)(*operands)  # type: ignore[no-any-return]


def _launching(kernels: Any, file: str) -> Callable[..., Any]:
    """``launch()`` of a file that starts what ``kernels`` has of it, which may write launches down."""
    module = module_of(file)
    if isinstance(kernels, _Kernels):
        return module.launch  # type: ignore[no-any-return]
    jitted = {n: getattr(kernels, f"{file}{_JOINT}{n}") for n, f in vars(module).items() if hasattr(f, "fn")}
    return types.FunctionType(module.launch.__code__, {**vars(module), **jitted})


_code: dict[str, Callable[..., Any]] = {}


def _compiled(file: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    if file not in _code:
        _code[file] = torch.compile(reference, fullgraph=True, dynamic=False)
    return _code[file]


def _reference(problem: GroupProblem, operands: tuple[Any, ...]) -> Sequence[torch.Tensor]:
    return module_of(problem.file).reference(*operands)  # type: ignore[no-any-return]
