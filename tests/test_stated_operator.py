"""What ``state_operator`` makes of a reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from graphopt.candidate import Reason
from graphopt_kernels.stated_operator import state_operator


def counted(x: torch.Tensor, count: torch.Tensor, times: int) -> torch.Tensor:
    count.add_(times)
    return x * times


def refused(x: torch.Tensor, count: torch.Tensor, times: int) -> Reason | None:
    return Reason(f"{times} times: expected once at least") if times < 1 else None


def launched(x: torch.Tensor, count: torch.Tensor, times: int) -> torch.Tensor | None:
    # Another result than the reference's tells which of them ran.
    return -x if times == 7 else None


COUNTED = state_operator(
    "counted_in_a_test",
    counted,
    mutates=("count",),
    refuses=refused,
    output=lambda x, *_: torch.empty_like(x),
    launch=launched,
)
OPERATOR = torch.ops.graphopt.counted_in_a_test.default


def test_the_schema_is_the_references() -> None:
    assert str(OPERATOR._schema) == (
        "graphopt::counted_in_a_test(Tensor x, Tensor(a1!) count, SymInt times) -> Tensor"
    )


def test_the_reference_runs_where_no_kernel_does() -> None:
    x, count = torch.randn(3), torch.zeros(())
    opcheck(OPERATOR, (x, count, 2))
    assert torch.equal(COUNTED(x, count.zero_(), 2), x * 2) and float(count) == 2
    assert torch.equal(COUNTED(x, count, 7), -x)


def test_what_is_refused_is_said_with_the_operators_name() -> None:
    with pytest.raises(ValueError, match="counted_in_a_test: 0 times: expected once at least"):
        OPERATOR(torch.empty(3, device="meta"), torch.empty((), device="meta"), 0)
