"""Garbage collection is put off within the block alone."""

from __future__ import annotations

import gc

import pytest

from graphopt.collection import uncollected


def test_collection_is_off_within_and_on_after_even_when_something_fails() -> None:
    with pytest.raises(ValueError, match="inside"), uncollected():
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled()


def test_blocks_within_blocks_leave_it_off() -> None:
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
