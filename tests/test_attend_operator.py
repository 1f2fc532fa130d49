"""What a record of an operator over stores makes of itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.library import opcheck

from graphopt.candidate import Reason
from graphopt.operator_scratch import stated_scratch
from graphopt_kernels.attend_operator import Asked, AttendOperator, NoConstants, RowStores


class Sums(NamedTuple):
    """One store, of the sum of all rows."""

    total: torch.Tensor


class Steps(NamedTuple):
    """Numbers, text, tensors."""

    steps: int
    name: str
    table: torch.Tensor | None


launches: list[Steps] = []


def added(asked: Asked, stores: Sums, constants: Steps) -> torch.Tensor:
    if asked.key is not None:
        stores.total.add_(asked.key.sum(2, keepdim=True) * constants.steps)
    return asked.query + stores.total


def refused(asked: Asked, stores: Sums, constants: Steps) -> Reason | None:
    return Reason("less than one step") if constants.steps < 1 else None


def launched(asked: Asked, stores: Sums, constants: Steps) -> torch.Tensor | None:
    if constants.name != "kernel":
        return None
    launches.append(constants)
    return added(asked, stores, constants)


ADDED = AttendOperator(
    "attend_added_in_a_test",
    Sums,
    Steps,
    summary="adds",
    reference=added,
    refuses=refused,
    value_width=lambda stores, _: stores.total.shape[3],
    launch=launched,
    scratch=lambda asked, stores, constants: constants.steps * stores.total.nbytes,
)
OPERATOR = torch.ops.graphopt.attend_added_in_a_test.default


def given(**change: Any) -> list[Any]:
    numbers = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    values: dict[str, Any] = {
        "query": numbers, "key": numbers, "value": numbers, "total": torch.zeros(2, 1, 1, 4),
        "positions": torch.arange(3), "valid": None, "slopes": None, "sinks": None, "scale": 1.0,
        "softcap": 0.0, "window": 0, "length": 3, "steps": 2, "name": "reference", "table": None,
    }  # fmt: skip
    return [*{**values, **change}.values()]


def test_stores_stand_before_positions_and_constants_behind_all() -> None:
    assert str(OPERATOR._schema) == (
        "graphopt::attend_added_in_a_test(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) total, "
        "Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float scale, float softcap, "
        "SymInt window, SymInt length, SymInt steps, str name, Tensor? table) -> Tensor"
    )
    asked, stores, constants = ADDED.parted(arguments := given())
    assert [*asked[:3], *stores, *asked[3:], *constants] == arguments


def test_the_operator_is_its_reference_and_its_kernel_where_that_takes_the_arguments() -> None:
    opcheck(OPERATOR, given())
    reference, operator, kernel = given(), given(), given(name="kernel")
    expected = ADDED.reference(*reference)
    assert torch.equal(ADDED(*operator), expected) and torch.equal(operator[3], reference[3])
    assert not launches
    assert torch.equal(ADDED(*kernel), expected) and launches == [Steps(2, "kernel", None)]


def test_what_is_refused_is_said_with_the_operators_name() -> None:
    assert str(ADDED.supports(*given(steps=0))) == "less than one step"
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in given(steps=0)]
    with pytest.raises(ValueError, match="attend_added_in_a_test: less than one step"):
        OPERATOR(*meta)


def test_what_is_registered_is_the_records() -> None:
    spec = ADDED.spec
    assert (spec.name, spec.op) == ("attend-added-in-a-test", "graphopt::attend_added_in_a_test")
    assert spec.supports(*given()) is None and spec.summary == "adds"
    scratch = stated_scratch(spec.op)
    assert scratch is not None and scratch(*given()) == 2 * 2 * 4 * 4


def test_fields_that_no_schema_has_are_named() -> None:
    class Words(NamedTuple):
        words: list[str]

    with pytest.raises(TypeError, match=r"attend_refused_in_a_test: words is list\[str\]: expected one of"):
        AttendOperator(
            "attend_refused_in_a_test",
            RowStores,
            Words,
            summary="",
            reference=lambda asked, stores, constants: asked.query,
            refuses=lambda asked, stores, constants: None,
            value_width=lambda stores, constants: 1,
        )
    assert not hasattr(torch.ops.graphopt, "attend_refused_in_a_test")


def test_stores_that_are_read_alone_are_not_written() -> None:
    AttendOperator(
        "attend_read_in_a_test",
        RowStores,
        NoConstants,
        summary="",
        reference=lambda asked, stores, constants: asked.query.clone(),
        refuses=lambda asked, stores, constants: None,
        value_width=lambda stores, constants: 1,
        writes=False,
    )
    assert "!" not in str(torch.ops.graphopt.attend_read_in_a_test.default._schema)
