"""The command line without a model: help, verbs of plugins, usage, exit codes, listings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from graphopt.cli.main import main

Run = Callable[..., subprocess.CompletedProcess[str]]

ACME = """
import click
from graphopt.plugins import Command, hookimpl
graphopt_api = 1

@click.command("greet")
@click.argument("name")
def greet(name):
    "Greet NAME."
    click.echo(f"hello {name}")

def broken():
    raise RuntimeError("no greeting today")

@hookimpl
def graphopt_commands():
    return [
        Command("greet", "Greet somebody.", lambda: greet),
        Command("sulk", "Fail to load.", broken),
        Command("mumble", "Load no command.", lambda: 3),
        Command("run", "Run away.", lambda: greet),
    ]
"""


def install(folder: Path, name: str, source: str) -> None:
    """A distribution as pip would leave it: a module and its metadata."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[graphopt.plugins]\n{name} = {name}\n")


@pytest.fixture
def graphopt_command(tmp_path: Path) -> Run:
    """Runs the command in its own process, with ``tmp_path`` importable and current."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return subprocess.run(
            [sys.executable, "-m", "graphopt", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": search, **environment},
        )

    return run


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_help_lists_verbs_and_stays_light(graphopt_command: Run) -> None:
    done = graphopt_command("--help")
    assert done.returncode == 0
    for verb in (
        "dump", "run", "cost", "passes", "plugins", "pareto", "calibrate",
        "diff", "bisect", "repro", "lint", "schema", "bench",
    ):  # fmt: skip
        assert f"\n  {verb} " in done.stdout
    code = (
        "import sys\nfrom graphopt.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print([m for m in ('torch', 'rich') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_help_answers_at_once(graphopt_command: Run) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        graphopt_command("--help")
        return time.perf_counter() - start

    # The best of three: a busy machine may delay one run, not all of them.
    assert min(seconds() for _ in range(3)) < 0.5


def test_a_plugin_adds_verbs_and_cannot_break_the_others(graphopt_command: Run, tmp_path: Path) -> None:
    install(tmp_path, "acme", ACME)
    install(tmp_path, "badly", "raise ImportError('needs libbad')")
    listed = graphopt_command("--help")
    assert listed.returncode == 0
    assert "greet       Greet somebody." in listed.stdout
    assert "Run away." not in listed.stdout
    assert "plugin 'acme' offers 'run', which is graphopt's own verb" in listed.stderr
    assert graphopt_command("greet", "you").stdout == "hello you\n"

    sulking = graphopt_command("sulk")
    assert sulking.returncode == 1
    assert (
        "graphopt: error[plugin]: plugin 'acme' cannot load its verb 'sulk': RuntimeError: no greeting today"
        in sulking.stderr
    )
    assert "gives 3 for its verb 'mumble', not a click command" in graphopt_command("mumble").stderr

    plugins = graphopt_command("plugins")
    assert plugins.returncode == 0
    assert "plugin 'badly' (failed): ImportError: needs libbad" in plugins.stderr
    assert [line.split()[:4] for line in plugins.stdout.splitlines() if "badly" in line] == [
        ["badly", "badly", "1.0", "failed"]
    ]
    assert graphopt_command("plugins", "--check").returncode == 1
    records = json.loads(graphopt_command("plugins", "--json", GRAPHOPT_DISABLE_PLUGINS="badly").stdout)
    assert {record["name"]: record["status"] for record in records}["badly"] == "disabled"
    strict = graphopt_command("plugins", GRAPHOPT_STRICT_PLUGINS="1")
    assert strict.returncode == 1
    assert "error[plugin]: plugin 'badly' of badly (failed): ImportError" in strict.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmup"], "no such verb 'dmup'; did you mean 'dump'?"),
        (["dump"], "Missing argument 'TARGET'"),
        (["run", "x:y", "--emit", "fortran"], "'fortran' is not one of 'auto', 'eager', 'inductor'"),
        (["--verbos"], "--verbos"),
    ],
)
def test_wrong_usage_exits_with_2(invoke: Any, arguments: Iterable[str], message: str) -> None:
    code, out, err = invoke(*arguments)
    assert code == 2
    assert out == ""
    assert message in err


def test_version(invoke: Any) -> None:
    import graphopt

    assert invoke("--version") == (0, f"graphopt {graphopt.__version__}\n", "")


def test_passes_lists_and_shows_one(invoke: Any) -> None:
    code, out, err = invoke("passes")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["pass", "level", "result", "plugin", "what", "it", "does"]
    assert "insert-checkpoints" in out
    code, out, _ = invoke("passes", "insert-checkpoints")
    assert code == 0
    assert out.startswith("insert-checkpoints (joint, exact, plugin passes)\n")
    assert "options:" in out
    listed = json.loads(invoke("passes", "--json")[1])
    shown = json.loads(invoke("passes", "insert-checkpoints", "--json")[1])
    assert shown in listed
    assert {"name", "level", "result", "plugin", "summary", "options", "doc"} <= set(shown)


def test_a_failure_exits_with_1_and_names_its_code(invoke: Any) -> None:
    code, out, err = invoke("passes", "insert-checkpoint")
    assert (code, out) == (1, "")
    assert err.startswith(
        "graphopt: error[unknown-name]: unknown pass 'insert-checkpoint'; did you mean 'insert-checkpoints'?"
    )
    code, out, err = invoke("run", "no_such_package.models:small")
    assert (code, out) == (1, "")
    assert "graphopt: error[target]: cannot find module 'no_such_package'" in err


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    # The reader closes its end and stays, so that the writer meets a closed pipe every time.
    command = f"{sys.executable} -m graphopt --help | (exec 0<&-; sleep 1); echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("1\n", "")
