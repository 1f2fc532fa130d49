"""Single rewrites by name, and the smallest set of them that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.bisection import Bisection, BisectionError, Outcome
from graphopt.cli.main import main
from tests.faulty import faulty_plugin

Invoke = Callable[..., tuple[int, str, str]]
ITEMS = tuple(f"g0/p/c@{k}" for k in range(40))


def failing(*culprits: int, untested: frozenset[int] = frozenset()) -> Callable[[tuple[str, ...]], Outcome]:
    """A run that fails where all of ``culprits`` are applied, and cannot be tested where, without that, one
    of ``untested`` is left out."""
    wanted = {ITEMS[k] for k in culprits}

    def test(some: tuple[str, ...]) -> Outcome:
        if wanted <= set(some):
            return "fails"
        return "untested" if some and untested - {ITEMS.index(x) for x in some} else "passes"

    return test


@pytest.mark.parametrize("culprits", [(0,), (39,), (17,), (3, 31), (0, 1, 39), (5, 6, 7, 8)])
def test_the_smallest_set_is_found(culprits: tuple[int, ...]) -> None:
    found = Bisection(ITEMS).run(failing(*culprits))
    assert found.rewrites == tuple(ITEMS[k] for k in culprits)
    assert found.complete
    if len(culprits) == 1:
        # All, none, and twice the logarithm of their number.
        assert found.tests <= 2 + 2 * 6


def test_what_cannot_be_tested_is_gone_around() -> None:
    found = Bisection(ITEMS).run(failing(3, 31, untested=frozenset({20})))
    assert set(found.rewrites) >= {ITEMS[3], ITEMS[31]}
    assert failing(3, 31)(found.rewrites) == "fails"


def test_a_search_goes_on_from_its_state() -> None:
    whole = Bisection(ITEMS)
    expected = whole.run(failing(3, 31))
    state, asked = "", 0

    def counting(some: tuple[str, ...]) -> Outcome:
        nonlocal asked
        asked += 1
        return failing(3, 31)(some)

    while True:
        part = Bisection(ITEMS, state)
        found = part.run(counting, most=3)
        state = str(part)
        if found.complete:
            break
        assert failing(3, 31)(found.rewrites) == "fails"
    assert (found, state) == (expected, str(whole))
    assert asked == expected.tests


def test_a_state_of_other_rewrites_is_refused() -> None:
    with pytest.raises(BisectionError, match=r"is of other rewrites: these are [0-9a-f]{8}"):
        Bisection(ITEMS, "00000000:fp")
    with pytest.raises(BisectionError, match="cannot read state 'nonsense': expected"):
        Bisection(ITEMS, "nonsense")
    with pytest.raises(BisectionError, match="with all 40 rewrites the run does not fail"):
        Bisection(ITEMS).run(lambda some: "passes")
    assert Bisection(ITEMS).run(lambda some: "fails").rewrites == ()


@pytest.fixture
def invoke(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Invoke]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        torch._dynamo.reset()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    with faulty_plugin(tmp_path):
        yield run


TARGET = ("faulty_targets:small", "--emit", "eager")


def test_only_the_rewrites_that_are_named_are_applied(invoke: Invoke) -> None:
    from faulty_targets import small

    model, inputs = small()
    options = {"emit": "eager", "pipeline": "normalize,spoil{bad=[2]}"}
    whole = graphopt.optimize(model, inputs, **options)
    names = [rewrite.id for rewrite in whole.report.rewrites]
    assert names == [f"g0/spoil/spoil@{k}" for k in range(6)]
    assert [rewrite.layer for rewrite in whole.report.rewrites] == ["1", "3", "5", "7", "9", "11"]
    assert graphopt.Report.from_json(whole.report.to_json()) == whole.report
    some = graphopt.optimize(model, inputs, rewrites=(names[0], names[5]), **options)
    assert [rewrite.id for rewrite in some.report.rewrites] == [names[0], names[5]]
    assert some.dump(stage="semantic").count("aten.clamp_min") == 2
    why = {declined.candidate: declined.why for declined in some.report.declined}
    assert why["spoil@2"] == "not among the rewrites that were asked for"
    torch.testing.assert_close(some(*inputs), model(*inputs), rtol=0, atol=0)
    none = graphopt.optimize(model, inputs, rewrites=(), **options)
    assert none.report.rewrites == ()
    gone = graphopt.optimize(model, inputs, rewrites=("g0/spoil/spoil@9",), **options)
    assert "rewrites that were asked for and not applied: g0/spoil/spoil@9" in gone.report.diagnostics


def test_named_rewrites_are_those_of_every_capture_of_the_model(invoke: Invoke) -> None:
    from faulty_targets import small

    model, inputs = small()
    options = {"emit": "eager", "pipeline": "spoil", "dynamic_shapes": False}
    some = graphopt.optimize(model, inputs, rewrites=("g0/spoil/spoil@1",), **options)
    some(torch.randn(7, 8))
    (program,) = [p for p in some.programs if p.level == "semantic"]
    assert program.name == "g1"
    assert sum("clamp_min" in str(node.target) for node in program.nodes()) == 1


def test_schedules_and_kernels_are_rewrites_of_their_own() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(16, 16), torch.nn.SiLU())]
    model, inputs = torch.nn.Sequential(*layers), (torch.randn(64, 16),)
    options = {"emit": "eager", "loss_fn": torch.mean, "pipeline": "insert-checkpoints"}
    with_all = graphopt.optimize(model, inputs, budget="80%", **options)
    assert "insert-checkpoints/schedules" in [rewrite.id for rewrite in with_all.report.rewrites]
    with pytest.raises(graphopt.BudgetError):
        graphopt.optimize(model, inputs, budget="80%", rewrites=(), **options)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("g0/spoilt/x",), "unknown pass of rewrite 'g0/spoilt/x': 'spoilt'; did you mean 'spoil'?"),
        (("fuse/kernels",), "unknown source of rewrite 'fuse/kernels': 'fuse'"),
        (("spoil",), "'spoil' names no rewrite"),
        ("g0/spoil/x", "rewrites is the text 'g0/spoil/x': expected names"),
    ],
)
def test_names_of_nothing_are_refused(invoke: Invoke, names: object, text: str) -> None:
    from faulty_targets import small

    with pytest.raises(graphopt.GraphoptError) as raised:
        graphopt.optimize(*small(), emit="eager", pipeline="spoil", rewrites=names)  # type: ignore[arg-type]
    assert text in str(raised.value)


def test_bisect_finds_the_rewrite_whose_numbers_are_wrong(invoke: Invoke) -> None:
    pipeline = ("-p", "normalize,spoil{bad=[4]}")
    code, out, err = invoke("bisect", *TARGET, *pipeline)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [["rewrite", "layer"], ["g0/spoil/spoil@4", "9"]]
    assert "6 of 6 rewrites: fails: output 0: the largest difference is" in err
    assert "0 of 6 rewrites: passes" in err
    # Stopped after two tests, and gone on with from what it said.
    code, _, err = invoke("bisect", *TARGET, *pipeline, "--tests", "2")
    state = err.splitlines()[-2].rpartition("--state ")[2]
    assert state.endswith(":fp")
    assert "smallest so far set that fails: 6 of 6 rewrites, 2 tests" in err
    code, out, err = invoke("bisect", *TARGET, *pipeline, "--state", state, "--json")
    assert json.loads(out)["rewrites"] == ["g0/spoil/spoil@4"]
    assert "6 of 6" not in err


def test_bisect_finds_the_rewrite_that_raises(invoke: Invoke) -> None:
    code, out, err = invoke("bisect", *TARGET, "-p", "spoil{bad=[1],how=raise}", "--json")
    assert code == 0
    assert json.loads(out)["rewrites"] == ["g0/spoil/spoil@1"]
    assert "spoil was rolled back: candidate 'spoil@1': apply() raised RuntimeError: spoilt 1" in err


def test_rtol_says_what_a_failure_is(invoke: Invoke) -> None:
    pipeline = ("-p", "spoil{bad=[4]}")
    code, out, err = invoke("bisect", *TARGET, *pipeline, "--rtol", "100")
    assert (code, out) == (1, "")
    assert "error[bisect]: with all 6 rewrites the run does not fail: there is nothing to find" in err


CHECK = """
import sys, torch, graphopt
from faulty_targets import small
from graphopt.cli.rewrites import named_rewrites
model, inputs = small()
fast = graphopt.optimize(
    model, inputs, emit="eager", pipeline="spoil{bad=[3]}", rewrites=named_rewrites(sys.argv[1])
)
sys.exit(0 if torch.equal(fast(*inputs), model(*inputs)) else 3)
"""


@pytest.mark.slow
def test_bisect_by_the_exit_code_of_a_command(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "check.py").write_text(CHECK)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    asked = (
        "bisect",
        *TARGET,
        "-p",
        "spoil{bad=[3]}",
        "--json",
        "--",
        sys.executable,
        "check.py",
        "{rewrites}",
    )
    code, out, err = invoke(*asked)
    assert code == 0
    assert json.loads(out)["rewrites"] == ["g0/spoil/spoil@3"]
    assert "6 of 6 rewrites: fails: exit code 3" in err


def test_commands_fail_pass_or_cannot_tell(invoke: Invoke) -> None:
    asked = ("bisect", *TARGET, "-p", "spoil", "--json", "--")
    script = 'case "$0" in *spoil@5*) exit 7;; *spoil@0*) exit 125;; esac'
    code, out, err = invoke(*asked, "sh", "-c", script, "{rewrites}")
    assert code == 0
    assert json.loads(out)["rewrites"] == ["g0/spoil/spoil@5"]
    assert "cannot be tested: exit code 125" in err
    code, out, _ = invoke(*asked, "sh", "-c", "exit 1", "{rewrites}")
    assert code == 0
    assert json.loads(out)["rewrites"] == []
    code, _, err = invoke(*asked, "no-such-command", "{rewrites}")
    assert code == 1
    assert "error[inputs]: cannot run 'no-such-command': No such file or directory" in err
    code, _, err = invoke(*asked, "true")
    assert code == 2
    assert "COMMAND has to name {rewrites}, which stands for the rewrites to apply" in err
    code, _, err = invoke("bisect", *TARGET, "--rtol", "1", "--", "true", "{rewrites}")
    assert code == 2
    assert "--rtol compares with the model itself, COMMAND by its exit code: give one" in err


def test_rewrites_are_given_to_verbs_as_text_or_in_a_file(invoke: Invoke, tmp_path: Path) -> None:
    asked = ("run", *TARGET, "-p", "spoil", "--json")
    names = ["g0/spoil/spoil@1", "g0/spoil/spoil@2"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    for given in (",".join(names), "@names.txt"):
        code, out, _ = invoke(*asked, "--rewrites", given)
        assert code == 0
        assert [rewrite["id"] for rewrite in json.loads(out)["rewrites"]] == names
    code, _, err = invoke(*asked, "--rewrites", "@gone.txt")
    assert code == 1
    assert "cannot read rewrites from 'gone.txt'" in err
