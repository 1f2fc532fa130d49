"""``graphopt tune``: what it is asked, what it says, what it refuses; with a device that is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from graphopt.cli.main import main
from graphopt.errors import UnknownNameError
from graphopt.plugins import PluginHost
from graphopt_kernels.tuning import command as module
from graphopt_kernels.tuning import work
from graphopt_kernels.tuning.command import command, tuning_device
from graphopt_kernels.tuning.lookup import Choice
from graphopt_kernels.tuning.store import read_entries
from graphopt_kernels.tuning.tuner import TuningError
from graphopt_kernels.tuning.work import launched_by, shipped_work
from tests.tunables import H200, Meter, Sizes, Way, plugin, tunable

SPEC = tunable(Way(100), Way(80), Way(1, "errs"))
OTHER = tunable(Way(100), Way(99), name="add-one-again")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginHost:
    """Two kernels of a plugin, on an H200 that the CPU stands in for."""
    made = PluginHost([plugin(SPEC, OTHER)], entry_points=())
    monkeypatch.setattr(work, "default_host", lambda: made)
    monkeypatch.setattr(module, "tuning_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(module, "present_gpu", lambda device: H200)
    monkeypatch.setattr(module, "GraphMeter", lambda device: Meter())
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    return made


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)


def test_the_usual_problems_are_tuned_and_kept(host: PluginHost, tmp_path: Path) -> None:
    result = run("--json")
    assert result.return_value == 0
    first, *rest = json.loads(result.stdout)
    assert first == {
        "kernel": "add-one",
        "problem": "rows=8 dtype=float32 soft=no",
        "default": "us=100 fault=",
        "default_us": 100.0,
        "best": "us=80 fault=",
        "best_us": 80.0,
        "chosen": "us=80 fault=",
        "measured": 2,
        "refused": [
            {
                "configuration": "us=1 fault=errs",
                "reason": "result 0 is off by 0.01: at most 0.0001 is rounding",
            }
        ],
    }
    assert [(item["kernel"], item["chosen"]) for item in rest] == [
        ("add-one", "us=80 fault="),
        ("add-one-again", "us=100 fault="),
        ("add-one-again", "us=100 fault="),
    ]
    path = tmp_path / "cache" / "tuning" / "nvidia-h200.json"
    assert f"kept in {path}" in result.stderr
    assert [entry.configuration for entry in read_entries(path)] == ["us=80 fault="] * 2 + [None] * 2


def test_the_table_says_what_was_chosen_and_what_is_wrong(host: PluginHost, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = run("--kernels", "add-one", "--shapes", "rows=32", "--out", str(out))
    head, row = result.stdout.splitlines()
    assert head.split() == ["kernel", "problem", "default", "us", "best", "us", "chosen"]
    assert " ".join(row.split()) == "add-one rows=32 dtype=float32 soft=no 100.0 80.0 us=80 fault="
    assert "add-one us=1 fault=errs: result 0 is off by 0.01: at most 0.0001 is rounding" in result.stderr
    assert [entry.problem for entry in read_entries(out)] == ["rows=32 dtype=float32 soft=no"]
    assert not (tmp_path / "cache").exists()


def test_a_default_that_is_wrong_fails(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PluginHost([plugin(tunable(Way(100, "errs"), Way(90)))], entry_points=())
    monkeypatch.setattr(work, "default_host", lambda: broken)
    result = run()
    assert result.return_value == 1
    assert "none: result 0 is off by 0.01" in result.stdout


def test_kernels_of_a_target_are_those_that_its_step_starts(host: PluginHost) -> None:
    choice = Choice("add-one", SPEC.sources, SPEC.default, SPEC.check)
    other = Choice("of nobody", SPEC.sources, SPEC.default, SPEC.check)

    def step() -> None:
        for rows in (4, 4, 64):
            choice(Sizes(rows), torch.device("cpu"))
        other(Sizes(1), torch.device("cpu"))

    assert launched_by(step, (), "a:b") == [(SPEC, Sizes(4)), (SPEC, Sizes(64))]
    with pytest.raises(TuningError, match=r"a:b launches no kernel that can be tuned$"):
        launched_by(lambda: None, (), "a:b")
    with pytest.raises(
        TuningError,
        match=r"launches no kernel that can be tuned of those named; it launches add-one, of nobody$",
    ):
        launched_by(step, ("add-one-again",), "a:b")


def test_a_target_is_optimized_and_run(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice("add-one", SPEC.sources, SPEC.default, SPEC.check)
    forward = torch.relu

    def relu(x: torch.Tensor) -> torch.Tensor:
        choice(Sizes(x.shape[0]), x.device)
        return forward(x)

    library = torch.library.Library("graphopt_tests", "FRAGMENT")
    library.define("asks(Tensor x) -> Tensor")
    library.impl("asks", relu, "CPU")
    library.impl("asks", torch.empty_like, "Meta")
    result = run("tests.tunables:target", "--infer", "--emit", "eager", "--json")
    assert [item["problem"] for item in json.loads(result.stdout)] == ["rows=6 dtype=float32 soft=no"]


def test_shapes_replace_fields_of_the_usual_problems(host: PluginHost) -> None:
    found = shipped_work((), ("rows=4,soft=yes", "dtype=float16"))
    assert [problem for spec, problem in found if spec is SPEC] == [
        Sizes(4, soft=True),
        Sizes(8, torch.float16),
        Sizes(16, torch.float16),
    ]


@pytest.mark.parametrize(
    ("kernels", "shapes", "error", "message"),
    [
        (("add-two",), (), UnknownNameError, "'add-two'.*'add-one'"),
        ((), ("row=4",), UnknownNameError, "field 'row'.*'rows'"),
        (("add-one",), ("width=4",), UnknownNameError, "field 'width'"),
        ((), ("rows",), TuningError, "cannot read shapes 'rows'\n.*write FIELD=VALUE"),
        ((), ("rows=0",), TuningError, "rows is '0': expected a whole number above 0"),
        ((), ("soft=true",), TuningError, "soft is 'true': expected yes or no"),
        ((), ("dtype=half16",), TuningError, "dtype is 'half16': expected a dtype of torch or none"),
    ],
)
def test_what_is_not_known_is_named(
    host: PluginHost, kernels: tuple[str, ...], shapes: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shipped_work(kernels, shapes)


def test_a_kernel_that_two_plugins_offer_is_the_firsts() -> None:
    host = PluginHost([plugin(SPEC), plugin(tunable(Way(1)), OTHER, name="other")], entry_points=())
    assert dict(host.tunables()) == {"add-one": SPEC}
    assert any("'add-one' is registered twice" in record.error for record in host.records())
    with pytest.raises(UnknownNameError, match=r"tunable kernel 'add-won'.*'add-one'"):
        host.tunable("add-won")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu", "tuning needs a CUDA device: 'cpu' is not one"),
        ("toaster", "cannot tune on 'toaster': no such torch device"),
    ],
)
def test_a_device_that_cannot_be_tuned_is_named(name: str, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        tuning_device(name)


def test_without_a_cuda_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        main(["tune"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "graphopt: error[tune]: tuning needs a CUDA device: torch sees none here\n"
        "  hint: kernels start with their defaults until tuned\n"
    )


def test_a_device_or_a_compiler_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TuningError, match="cannot tune on cuda:3: this machine has 1 CUDA devices"):
        tuning_device("cuda:3")
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(TuningError, match="tuning needs triton, which is not installed"):
        tuning_device("cuda")


def test_shapes_and_a_target_are_one_too_many() -> None:
    result = CliRunner().invoke(command, ["a:b", "--shapes", "rows=4"])
    assert result.exit_code == 2 and "--shapes are for tuning without TARGET" in result.stderr


def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    host: PluginHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(module, "tune", None)
    with pytest.raises(
        TuningError, match=r"results cannot be kept: folder '.*' cannot be written to\n.*--out"
    ):
        run()
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    with pytest.raises(TuningError, match="results cannot be kept"):
        run()
