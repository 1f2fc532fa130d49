"""Where results of tuning live, and what a launch makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from graphopt import cache_folder
from graphopt.candidate import Reason
from graphopt.plugins import default_host
from graphopt_kernels.row_norm_launch import FORWARD, ForwardProblem, forward_launch
from graphopt_kernels.tuning import lookup, store, table
from graphopt_kernels.tuning.lookup import Choice, asked_for, fields_text, forget_choices, rows_class
from graphopt_kernels.tuning.store import Entry, cached_file, code_of, read_entries, write_entries
from graphopt_kernels.tuning.warning import TuningWarning

H200 = "NVIDIA H200, 132 multiprocessors, sm_90"
CUDA = torch.device("cuda", 0)
HALF = torch.bfloat16
PROBLEM = ForwardProblem(16384, 4096, HALF, HALF, HALF, None, False, False, True)
FASTER = forward_launch(PROBLEM)._replace(warps=8, programs=2, ahead=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, nothing shipped, and an H200 as the device of index 0."""
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(lookup, "device_text", lambda device: H200)
    (tmp_path / "shipped").mkdir()
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    table.forget_table()
    forget_choices()


def entry(**changes: Any) -> Entry:
    torch_version, triton_version = store.versions()
    made = Entry(
        kernel=FORWARD.kernel,
        problem=fields_text(PROBLEM),
        device=H200,
        torch=torch_version,
        triton=triton_version,
        code=code_of(FORWARD.sources),
        configuration=fields_text(FASTER),
        default_us=100.0,
        us=90.0,
    )
    return replace(made, **changes)


def keep(*entries: Entry) -> Path:
    path = cached_file(H200)
    write_entries(path, entries)
    forget()
    return path


# --- what a launch gets ------------------------------------------------------------------------


def test_nothing_stored_gives_the_default() -> None:
    assert FORWARD(PROBLEM, CUDA) == forward_launch(PROBLEM)


def test_what_is_stored_is_used_for_its_problem_alone() -> None:
    keep(entry())
    assert FORWARD(PROBLEM, CUDA) == FASTER
    for other in (PROBLEM._replace(rows=8192), PROBLEM._replace(added=True), PROBLEM._replace(weight=None)):
        assert FORWARD(other, CUDA) == forward_launch(other)
    assert FORWARD(PROBLEM, torch.device("cpu")) == forward_launch(PROBLEM)


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "1.0"},
        {"triton": "2.0"},
        {"code": "0123456789ab"},
        {"device": "NVIDIA H200, 60 multiprocessors, sm_90"},
        {"device": "NVIDIA H200, 132 multiprocessors, sm_91"},
        {"kernel": "row-norm-backward"},
    ],
)
def test_what_was_measured_of_something_else_is_not_used(change: dict[str, str]) -> None:
    keep(entry(**change))
    assert FORWARD(PROBLEM, CUDA) == forward_launch(PROBLEM)


def test_the_users_results_count_more_than_shipped_ones_even_where_the_default_won() -> None:
    shipped = store._SHIPPED / "nvidia-h200.json"
    write_entries(shipped, [entry(), entry(problem="another")])
    assert FORWARD(PROBLEM, CUDA) == FASTER
    keep(entry(configuration=None, us=100.0))
    assert FORWARD(PROBLEM, CUDA) == forward_launch(PROBLEM)


def test_files_are_read_once_and_looked_up_without_them_after(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(entry())
    reads: list[object] = []
    read = store.read_entries
    monkeypatch.setattr(store, "read_entries", lambda path: reads.append(path) or read(path))
    for rows in (1, 2, 4, 16384, 16384):
        FORWARD(PROBLEM._replace(rows=rows), CUDA)
    assert len(reads) == 2
    # A launch that was looked up before asks nobody.
    monkeypatch.setattr(Choice, "_look_up", None)
    assert FORWARD(PROBLEM, CUDA) == FASTER


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("block=4096 rows=1", "'block=4096 rows=1' has other fields than block, rows, warps, programs"),
        (fields_text(FASTER).replace("warps=8", "warps=many"), "warps is 'many': expected int"),
        (fields_text(FASTER).replace("ahead=yes", "ahead=1"), "ahead is '1': expected yes or no"),
        (
            fields_text(FASTER._replace(block=2048)),
            "a block of 2048 elements does not hold rows of 4096: 4096",
        ),
        (fields_text(FASTER._replace(warps=6)), "6 warps are no power of two up to 32"),
        (
            fields_text(FASTER._replace(rows=8)),
            "8 rows of 4096 elements do not fit the registers of a program",
        ),
        (fields_text(FASTER._replace(programs=-1)), "-1 programs cannot be launched"),
    ],
)
def test_what_would_compute_something_else_is_left_out_and_said(text: str, reason: str) -> None:
    keep(entry(configuration=text))
    with pytest.warns(TuningWarning) as said:
        assert FORWARD(PROBLEM, CUDA) == forward_launch(PROBLEM)
    (message,) = [str(warning.message) for warning in said]
    assert message.startswith(f"a stored configuration of row-norm-forward for {fields_text(PROBLEM)} ")
    assert f"is not used: {reason}" in message


def test_backward_programs_have_to_stay() -> None:
    spec = default_host().tunable("row-norm-backward")
    problem = next(iter(spec.shipped()))
    launch = spec.default(problem)
    assert spec.check(problem, launch) is None
    assert str(spec.check(problem, launch._replace(programs=0))) == "sums over rows need programs that stay"


def test_every_default_and_listed_configuration_is_allowed() -> None:
    for spec in default_host().tunables().values():
        for problem in spec.shipped():
            assert spec.check(problem, spec.default(problem)) is None
            assert all(spec.check(problem, c) is None for c in spec.configurations(problem))


def test_cross_entropy_blocks_are_powers_of_two() -> None:
    spec = default_host().tunable("cross-entropy-rows")
    problem = next(iter(spec.shipped()))
    launch = spec.default(problem)
    assert str(spec.check(problem, launch._replace(block=3000))) == (
        "3000 elements are no power of two up to 65536"
    )
    assert str(spec.check(problem, launch._replace(warps=64))) == "64 warps are no power of two up to 32"


# --- keys --------------------------------------------------------------------------------------


def test_a_problem_is_written_the_same_in_every_process() -> None:
    text = (
        "rows=16384 width=4096 dtype=bfloat16 result=bfloat16 weight=bfloat16 bias=none added=no centered=no "
        "rounded=yes"
    )
    assert fields_text(PROBLEM) == text
    script = (
        "from graphopt_kernels.tuning.store import code_of\n"
        "from graphopt_kernels.row_norm_launch import FORWARD\n"
        "print(code_of(FORWARD.sources))"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == code_of(FORWARD.sources)


def test_rows_are_rounded_up_to_a_power_of_two_and_many_are_alike() -> None:
    found = [rows_class(rows, 2048) for rows in (1, 2, 3, 1000, 1024, 1025, 2049, 10**6)]
    assert found == [1, 2, 4, 1024, 1024, 2048, 2048, 2048]


def test_code_is_what_runs_not_how_it_is_written_or_explained() -> None:
    one = 'def f(x):\n    """Says."""\n    return x + 1  # one\n'
    two = "def f(x):\n\n    return (x + 1)\n"
    assert store._code(one) == store._code(two)
    assert store._code(one) != store._code(two.replace("1", "2"))
    assert store._code('def f():\n    """Nothing."""\n') == store._code("def f():\n    pass\n")
    assert code_of(("graphopt_kernels.row_norm_triton",)) != code_of(("graphopt_kernels.bandwidth_triton",))
    with pytest.raises(ModuleNotFoundError, match="no source of 'no_such_module'"):
        code_of(("no_such_module",))


def test_what_is_asked_for_is_written_down_each_once() -> None:
    with asked_for() as asked:
        for rows in (16384, 16384, 8192):
            FORWARD(PROBLEM._replace(rows=rows), CUDA)
    FORWARD(PROBLEM, CUDA)
    assert list(asked) == [(FORWARD.kernel, PROBLEM), (FORWARD.kernel, PROBLEM._replace(rows=8192))]


# --- files -------------------------------------------------------------------------------------


def test_entries_come_back_and_newer_ones_take_the_place_of_older_ones() -> None:
    path = keep(entry(), entry(problem="another"))
    keep(entry(code="000000000000", us=80.0))
    found = {e.problem: e for e in read_entries(path)}
    assert found == {
        fields_text(PROBLEM): entry(code="000000000000", us=80.0),
        "another": entry(problem="another"),
    }
    lines = path.read_text().splitlines()
    assert json.loads(path.read_text())["schema"] == store.SCHEMA and len(lines) == 7
    assert path.name == "nvidia-h200.json"


def test_a_file_is_never_seen_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep(entry())
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_entries(path, [entry(us=1.0)])
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == [path.name]


BROKEN = [
    ("", "Expecting value"),
    ("[]", "expected schema 'graphopt/tuning@1'"),
    ('{"schema": "graphopt/tuning@0", "entries": []}', "expected schema 'graphopt/tuning@1'"),
    ('{"schema": "graphopt/tuning@1"}', "expected a list of entries"),
    ('{"schema": "graphopt/tuning@1", "entries": [{}]}', r"entries\[0\]: field 'kernel' is missing"),
    (
        json.dumps({"schema": store.SCHEMA, "entries": [vars(entry()) | {"us": -1.0}]}),
        r"entries\[0\].us is -1.0",
    ),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_broken_file_is_left_out_and_said_once(text: str, reason: str) -> None:
    path = keep(entry())
    path.write_text(text)
    forget()
    with pytest.warns(TuningWarning, match=f"ignoring the results of tuning in .*nvidia-h200.json: {reason}"):
        assert FORWARD(PROBLEM, CUDA) == forward_launch(PROBLEM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FORWARD(PROBLEM._replace(rows=1), CUDA)
    with pytest.warns(TuningWarning, match=f"replacing .*nvidia-h200.json: {reason}"):
        write_entries(path, [entry()])
    assert read_entries(path) == [entry()]


def test_a_folder_that_cannot_be_read_leaves_shipped_results() -> None:
    write_entries(store._SHIPPED / "nvidia-h200.json", [entry()])
    path = cached_file(H200)
    path.mkdir(parents=True)  # what is no file cannot be read, whoever asks
    with pytest.warns(TuningWarning, match="ignoring the results of tuning in .*nvidia-h200.json"):
        assert FORWARD(PROBLEM, CUDA) == FASTER


# --- written out with a program ----------------------------------------------------------------


def test_a_program_that_is_written_out_takes_what_is_known_along_as_constants() -> None:
    from graphopt_kernels.emit.carried_ops import carried_ops

    keep(entry(), entry(kernel="cross-entropy-rows"), entry(problem="stale", code="000000000000"))
    name, files = carried_ops(["graphopt_kernels.row_norm"])
    namespace: dict[str, Any] = {}
    exec(files["tuning/table.py"], namespace)
    assert namespace["FOUND"] == {(FORWARD.kernel, H200, fields_text(PROBLEM)): fields_text(FASTER)}
    assert namespace["found"](FORWARD.kernel, (), H200, fields_text(PROBLEM)) == fields_text(FASTER)
    assert namespace["found"](FORWARD.kernel, (), "another", fields_text(PROBLEM)) is None
    assert not [
        path
        for path, text in files.items()
        if re.search(r"^\s*(from|import) graphopt(?!_ops_)", text, re.MULTILINE)
    ]
    keep(entry(configuration=None))
    assert carried_ops(["graphopt_kernels.row_norm"])[0] != name


# --- a choice of one's own ---------------------------------------------------------------------


class Shape(NamedTuple):
    rows: int


class Way(NamedTuple):
    warps: int


def test_a_kernel_of_a_plugin_asks_in_the_same_way() -> None:
    choice = Choice(
        "own-kernel",
        ("graphopt_kernels.bandwidth_triton",),
        lambda problem: Way(4),
        lambda problem, way: None if way.warps <= 8 else Reason("too many warps"),
    )
    shape = Shape(16)
    keep(entry(kernel="own-kernel", problem="rows=16", code=code_of(choice.sources), configuration="warps=8"))
    assert choice(shape, CUDA) == Way(8) and choice(Shape(32), CUDA) == Way(4)


def test_what_is_not_stored_depends_on_the_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(
        "counted-kernel",
        ("graphopt_kernels.bandwidth_triton",),
        lambda problem: Way(1),
        lambda problem, way: None,
        lambda problem, processors: Way(processors),
    )
    monkeypatch.setattr("graphopt_kernels.tuning.lookup.processors_of", lambda device: 78)
    assert choice(Shape(16), CUDA) == Way(78)
    assert choice(Shape(16), torch.device("cpu")) == Way(1)


def test_what_artefacts_bring_counts_between_what_is_shipped_and_what_was_found_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "_lent", {})
    lent = tmp_path / "lent"
    name = cached_file(H200).name
    one, other = FASTER, FASTER._replace(warps=4)
    default = forward_launch(PROBLEM)
    assert table.found(FORWARD.kernel, FORWARD.sources, H200, fields_text(PROBLEM)) is None
    write_entries(lent / name, [entry(configuration=fields_text(one))])
    cache_folder.lend_tuning(lent)
    assert table.found(FORWARD.kernel, FORWARD.sources, H200, fields_text(PROBLEM)) == fields_text(one)
    write_entries(cached_file(H200), [entry(configuration=fields_text(other))])
    table.forget_table()
    assert table.found(FORWARD.kernel, FORWARD.sources, H200, fields_text(PROBLEM)) == fields_text(other)
    assert default not in (one, other)
