"""Attention as what ``graphopt tune`` chooses launches for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.plugins import default_host
from graphopt_kernels import attention_launch as launching
from graphopt_kernels.attention_launch import FORWARD, AttentionProblem, Launch, check_launch
from graphopt_kernels.tuning import lookup, store, table
from graphopt_kernels.tuning.calls import Recorder
from graphopt_kernels.tuning.compiling import calls_of, usage_of
from graphopt_kernels.tuning.lookup import asked_for, fields_text, forget_choices
from graphopt_kernels.tuning.model import Usage
from graphopt_kernels.tuning.store import Entry, cached_file, code_of, write_entries
from graphopt_kernels.tuning.tuner import MOST, shortlist
from tests.tunables import H200

pytest.importorskip("triton")

NAMES = ("attention-forward", "attention-keys", "attention-queries", "attention-bias")


def first(name: str) -> AttentionProblem:
    problem = next(iter(default_host().tunable(name).shipped()))
    assert isinstance(problem, AttentionProblem)
    return problem


@pytest.mark.parametrize("name", NAMES)
def test_a_default_compiles_for_sm_90_without_spills(name: str) -> None:
    spec = default_host().tunable(name)
    calls = calls_of(spec, first(name), spec.default(first(name)), H200.processors)
    # The backward computes sums of rows first.
    assert len(calls) == (1 if name == "attention-forward" else 2)
    usage = usage_of(calls, H200)
    assert isinstance(usage, Usage) and not usage.spilled and usage.shared <= H200.shared_of_program


@pytest.mark.parametrize("name", NAMES)
def test_few_launches_are_tried_and_all_of_them_fit(name: str) -> None:
    spec = default_host().tunable(name)
    for problem in spec.shipped():
        trials = shortlist(spec, problem, H200)
        assert 4 <= len(trials) <= MOST
        assert trials[0].configuration == spec.default(problem)
        for trial in trials[1:]:
            usage = spec.estimate(problem, trial.configuration)
            assert spec.predict(problem, trial.configuration, usage, H200) < float("inf")


def test_launches_compute_what_the_references_do() -> None:
    """In the interpreter, which must be on before triton is imported: in a process of its own."""
    script = """
        import torch
        from graphopt.plugins import default_host
        from graphopt_kernels.attention_launch import Launch
        from graphopt_kernels.tuning.checking import copied, difference, poisoned

        torch.manual_seed(0)
        for name in %r:
            spec = default_host().tunable(name)
            small = dict(heads=2, group=2, rows=32, columns=32, width=16, value_width=16, dtype=torch.float32)
            first = next(iter(spec.shipped()))._replace(**small)
            for problem in (first, first._replace(capped=True, causal=False), first._replace(window=8)):
                operands = spec.operands(problem, torch.device("cpu"))
                right = spec.reference(problem, copied(operands))
                for launch in (spec.default(problem), Launch(16, 32, 4, 1), Launch(32, 16, 4, 2)):
                    with poisoned():
                        found = spec.run(spec.kernels(), 2, problem, copied(operands), launch)
                    reason = difference(found, right)
                    assert reason is None, (name, problem, launch, reason)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script % (NAMES,))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]


SMALL = "tiles are of 16 rows and columns or more, of up to 16 warps and one stage or more"


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (Launch(48, 64, 8, 2), "rows is 48: expected a power of two"),
        (Launch(64, 64, 3, 2), "warps is 3: expected a power of two"),
        (Launch(8, 64, 8, 2), SMALL),
        (Launch(64, 64, 8, 0), SMALL),
    ],
)  # fmt: skip
def test_what_cannot_be_started_says_why(launch: Launch, reason: str) -> None:
    assert str(check_launch(first("attention-forward"), launch)) == reason
    assert check_launch(first("attention-forward"), Launch(64, 64, 4, 3)) is None


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An H200 of which nothing is known."""
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(lookup, "device_text", lambda device: H200.name)
    (tmp_path / "shipped").mkdir()
    table.forget_table()
    forget_choices()
    yield H200.name
    table.forget_table()
    forget_choices()


def test_what_is_stored_is_launched(device: str) -> None:
    problem, better = first("attention-forward"), Launch(64, 64, 4, 4)
    cuda = torch.device("cuda", 0)
    assert FORWARD(problem, cuda) == launching.forward_launch(*problem.size)
    torch_version, triton_version = store.versions()
    entry = Entry(
        FORWARD.kernel, fields_text(problem), device, torch_version, triton_version, code_of(FORWARD.sources),
        fields_text(better), 20.0, 10.0,
    )  # fmt: skip
    write_entries(cached_file(device), [entry])
    table.forget_table()
    forget_choices()
    assert FORWARD(problem, cuda) == better


def test_launches_ask_for_what_they_are() -> None:
    query = torch.empty(2, 8, 300, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 2, 500, 64, dtype=torch.bfloat16, device="meta")
    settings: tuple[Any, ...] = (0.125, 30.0, 99, 0)
    recorder = Recorder(launching.jitted())
    with asked_for() as asked:
        output, sums = launching.forward(recorder, query, key, key, None, *settings)
        launching.backward(
            recorder, output, query, key, key, None, output, sums, *settings, [True, True, True, False]
        )
    problem = AttentionProblem(16, 4, 512, 512, 64, 64, torch.bfloat16, False, True, 128, True)
    assert list(asked) == [
        (name, problem) for name in ("attention-forward", "attention-keys", "attention-queries")
    ]
    assert [call.function.fn.__name__ for call in recorder.calls] == [
        "forward_kernel", "rows_kernel", "keys_kernel", "queries_kernel",
    ]  # fmt: skip
