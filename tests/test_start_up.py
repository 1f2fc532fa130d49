"""Starting is light, counted in modules rather than seconds."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "scipy", "networkx", "rich", "yaml", "transformers", "triton", "ortools")


def loaded(code: str) -> set[str]:
    """Modules that an interpreter has loaded beyond those that it starts with, after ``code``."""
    told = "sys.stderr.write(' '.join(set(sys.modules) - before))"
    text = f"import sys\nbefore = set(sys.modules)\n{code}\n{told}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_loads_one_module_of_ours_and_none_that_is_heavy() -> None:
    found = loaded("import graphopt")
    assert {name for name in found if name.split(".")[0].startswith("graphopt")} == {"graphopt"}
    assert not found & set(HEAVY)
    # What it needs of the standard library, and that loads.
    assert len(found) < 60


def test_help_loads_nothing_that_is_heavy() -> None:
    found = loaded(
        "from graphopt.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    )
    assert "graphopt.cli.main" in found and not found & set(HEAVY)
    # No verb is loaded before it is called.
    assert not {name for name in found if name.startswith("graphopt.cli.verbs.")}
