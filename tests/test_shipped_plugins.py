"""Plugins as others write them: built from their own pyproject, found, tested, with public API alone."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from graphopt import InputsError
from graphopt.plugins.scaffold import new_plugin, project_files

ROOT = Path(__file__).parent.parent
# Not looked for with find_spec: that of pip makes setuptools unusable in this process.
BUILDERS = {"pip", "setuptools"}
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
each = pytest.mark.parametrize("project", PLUGINS, ids=lambda path: path.name)
needs_builder = pytest.mark.skipif(
    not BUILDERS.issubset(packages_distributions()), reason="needs pip and setuptools"
)

PUBLIC = (
    "graphopt", "graphopt.candidate", "graphopt.cost", "graphopt.observed", "graphopt.operator_scratch",
    "graphopt.plugins", "graphopt.program", "graphopt.rules", "graphopt.testing",
)  # fmt: skip
"""What plugins may import: docs/plugins.md promises these."""


def installed(project: Path, place: Path) -> Path:
    """Where ``project`` is importable: built without a network, from a copy, which building writes into."""
    source, target = place / "source", place / "installed"
    shutil.copytree(project, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def ran(target: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A command of Python's with ``target`` on the path, before the packages of the checkout."""
    path = os.pathsep.join([str(target), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, **extra}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=target, capture_output=True, text=True
    )


def check_installed(target: Path, tests: Path, name: str) -> None:
    """``graphopt plugins --check`` finds nothing wrong with it, and its own tests pass."""
    checked = ran(target, "-m", "graphopt", "plugins", "--check", "--json", GRAPHOPT_STRICT_PLUGINS="1")
    assert checked.returncode == 0, checked.stderr
    (record,) = [row for row in json.loads(checked.stdout) if row["distribution"] == name]
    assert (record["status"], record["error"]) == ("active", "")
    config = str(target / "pytest.ini")
    Path(config).write_text("[pytest]\n")
    tested = ran(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", config, str(tests))
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert " passed" in tested.stdout and " failed" not in tested.stdout


@needs_builder
@pytest.mark.slow
@each
def test_a_plugin_is_installed_from_its_pyproject_and_its_tests_pass(project: Path, tmp_path: Path) -> None:
    check_installed(installed(project, tmp_path), project / "tests", project.name)


@needs_builder
def test_all_of_them_together_are_found(tmp_path: Path) -> None:
    for number, project in enumerate(PLUGINS):
        place = tmp_path / str(number)
        place.mkdir()
        shutil.copytree(installed(project, place), tmp_path / "all", dirs_exist_ok=True)
    found = ran(
        tmp_path / "all",
        "-c",
        "from graphopt.plugins import default_host as host\n"
        "print(sorted(host().policies()), 'l4' in host().devices(), 'csv' in host().formats(),"
        " 'serial' in host().cost_models(), 'fuse-causal-convolution' in host().passes(),"
        " 'causal-convolution-silu' in host().kernels(), list(host().costs()))",
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[0] == (
        "['frugal', 'frugal-10'] True True True True True ['causal_conv::forward']"
    )
    light = ran(
        tmp_path / "all",
        "-c",
        "import sys\nfrom graphopt.plugins import default_host\ndefault_host().commands()\n"
        "print('torch' in sys.modules)",
    )
    assert light.stdout.strip() == "False", light.stderr


@each
def test_a_plugin_uses_the_public_api_alone(project: Path) -> None:
    sources = list((project / project.name.replace("-", "_")).glob("**/*.py"))
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.partition(".")[0].startswith("graphopt") and not name.startswith(
                    project.name.replace("-", "_")
                ):
                    assert name in PUBLIC, (source.name, name)
                    wanted = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
                    hidden = set(wanted) - set(importlib.import_module(name).__all__)
                    assert not hidden, (source.name, name, hidden)
            if isinstance(node, ast.Attribute):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "ctx")
                assert not private or own, (source.name, node.attr)


@needs_builder
def test_a_new_plugin_installs_and_passes_as_it_stands(tmp_path: Path) -> None:
    written = ran(tmp_path, "-m", "graphopt", "new-plugin", "acme-fusions")
    assert written.returncode == 0, written.stderr
    project = tmp_path / "acme-fusions"
    assert written.stderr == "wrote acme-fusions\n"
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()} == set(
        project_files("acme-fusions")
    )
    place = tmp_path / "place"
    place.mkdir()
    check_installed(installed(project, place), project / "tests", "acme-fusions")


def test_a_new_plugin_is_written_whole_and_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_plugin("acme-fusions", tmp_path)
    with pytest.raises(InputsError, match="acme-fusions' already: nothing is written over"):
        new_plugin("acme-fusions", tmp_path)

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("graphopt.plugins.scaffold.os.rename", full)
    with pytest.raises(OSError, match="no space left"):
        new_plugin("acme-more", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["acme-fusions"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Acme", "'Acme' is no name for a plugin: expected lower-case words joined by hyphens"),
        ("acme_fusions", "'acme_fusions' is no name for a plugin"),
        ("../acme", "'../acme' is no name for a plugin"),
        ("", "'' is no name for a plugin"),
        ("torch", "a plugin 'torch' would be the package 'torch', which Python already has"),
        ("lambda", "a plugin 'lambda' would be the package 'lambda', which Python already has"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputsError, match=reason):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())
