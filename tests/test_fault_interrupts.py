"""Interrupts and full disks at many places of optimizing and saving: nothing half made, the model usable."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import graphopt
from graphopt.artefact import save as saving
from tests.test_faults import Net, state_of

HOME = str(Path(graphopt.__file__).parent)


def interrupted(run: Callable[[], object], at: int) -> tuple[int, bool]:
    """Run with an interrupt as the library's function number ``at`` is called: (calls seen, interrupted)."""
    seen = 0

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal seen
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            seen += 1
            if seen == at:
                raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        run()
    except KeyboardInterrupt:
        return seen, True
    finally:
        sys.setprofile(None)
    return seen, False


def check_interrupts(places: int, folder: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8)
    before, random = state_of(net), torch.get_rng_state()

    def optimize() -> None:
        torch._dynamo.reset()
        graphopt.optimize(net, (x,), emit="eager", budget="16GiB")

    optimize()
    total, _ = interrupted(optimize, -1)
    assert total > 500
    hit = 0
    for k in range(places):
        _, stopped = interrupted(optimize, 1 + k * (total - 1) // places)
        hit += stopped
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters()) and torch.is_grad_enabled()
        assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
    # One that falls into a finalizer is swallowed by Python.
    assert hit >= 0.8 * places
    torch._dynamo.reset()
    fast = graphopt.optimize(net, (x,), emit="eager", on_error="raise")
    fast(x).backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    with torch.no_grad():
        for name, value in net.named_buffers():
            value.copy_(before[name])
    net(x).backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(found, net.parameters(), strict=True))


def test_an_interrupt_at_any_call_leaves_the_model_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    check_interrupts(5, tmp_path)


@pytest.mark.slow
def test_an_interrupt_at_many_more_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    check_interrupts(100, tmp_path)


@pytest.fixture(scope="module")
def saved() -> graphopt.Optimized:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return graphopt.optimize(Net(), (torch.ones(4, 8),), emit="eager", cache=False, on_error="raise")


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
@pytest.mark.parametrize(("number", "done"), [(1, False), (1, True), (2, False), (2, True)])
def test_an_artefact_that_is_replaced_is_there_whatever_happens(
    number: int, done: bool, error: type[BaseException], saved: graphopt.Optimized, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, rename, count = saved.save(tmp_path / "kept"), os.rename, 0

    def failing(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number and not done:
            raise error
        rename(source, target)
        if count == number:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(error):
            saved.save(path)
    assert count >= number
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert graphopt.load(path).plan.predicted == saved.plan.predicted


@pytest.mark.parametrize("place", ["_write_json", "write_extras"])
def test_a_full_disk_keeps_the_artefact_that_was_there(
    place: str, saved: graphopt.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved.save(tmp_path / "kept")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(saving, place, full)
        with pytest.raises(OSError, match=r"No space left on device"):
            saved.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert graphopt.load(path).plan.predicted == saved.plan.predicted
