"""What goes wrong outside of a program: full and damaged folders, interrupts."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt import atomic, session, step_store
from graphopt.emit.eager import EagerEmitter
from graphopt.session import Session
from graphopt_kernels.tuning.store import read_entries, write_entries
from tests.test_tuning_store import entry


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.norm(self.one(x)).tanh().square().mean()
        return value


def state_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


# --- interrupts --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["semantic", "joint", "planning", "lowering"])
def test_an_interrupt_leaves_the_model_as_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is raised, not recorded; the model is as before, and it can be tried again."""
    owner, name = {
        "semantic": (Session, "_semantic"),
        "joint": (session, "see_joint"),
        "planning": (session, "choose_schedules"),
        "lowering": (EagerEmitter, "compile"),
    }[place]
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8)
    before, random = state_of(net), torch.get_rng_state()
    torch._dynamo.reset()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            graphopt.optimize(net, (x,), emit="eager", cache=False)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net(x).backward()
    fast = graphopt.optimize(net, (x,), emit="eager", cache=False, on_error="raise")
    fast(x).backward()


# --- folders -----------------------------------------------------------------------------------


class Full:
    """A stream of a disk that has room for a few characters."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *said: object) -> None:
        self.stream.close()

    def write(self, text: str) -> None:
        self.stream.write(text[:7])
        self.stream.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> Full:
        return Full(open(*args, **kwargs))

    monkeypatch.setattr(atomic, "open", opened, raising=False)


def test_a_full_disk_leaves_what_was_there_and_no_half(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "kept.json"
    path.write_text("before")
    with pytest.raises(OSError, match="No space left"):
        atomic.write_atomically(path, "after " * 100)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_an_interrupt_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("before")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_atomically(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_a_step_is_not_kept_on_a_full_disk_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: None
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(step_store, "step_text", lambda step, plan: "a step " * 10)

    class Step:
        key = "0" * 64

    said = step_store.store_step(Step(), object())  # type: ignore[arg-type]
    assert said.startswith("the folder of what is kept cannot be written (OSError: [Errno 28] No space left")
    assert list((tmp_path / "steps").iterdir()) == []


def _written(path: str, number: int) -> None:
    for place in range(10):
        write_entries(Path(path), [entry(problem=f"problem {number} {place}")])


def test_processes_that_tune_at_once_never_leave_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(_written, [(str(path), 0), (str(path), 1)])
    # Who writes last wins where two wrote at once: the file is whole, and holds at least all of one.
    found = {e.problem for e in read_entries(path)}
    assert any({f"problem {number} 9"} <= found for number in (0, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["device.json"]


def test_a_tuning_file_cut_at_any_place_is_told(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    write_entries(path, [entry()])
    text = path.read_text()
    for end in range(0, len(text.rstrip()) - 1, 13):
        path.write_text(text[:end])
        with pytest.raises(ValueError):
            read_entries(path)
    assert json.loads(text)["entries"]
