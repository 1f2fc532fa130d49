"""What it takes to start: `import graphopt` beyond torch's own import, and `graphopt --help`.

    python benchmarks/start_up.py

Each is a new interpreter, whose processor time is taken, the least of seven; beside it stands how many
modules it has loaded. ``graphopt.optimize`` is the import of everything that the first call needs. Targets:
`import graphopt` at most 0.15 s beyond `import torch`, `graphopt --help` at most 0.5 s and without torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from harness import figure, parser

RUNS = 7
IMPORT_SECONDS, HELP_SECONDS = 0.15, 0.5

_HELP = "from graphopt.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
STARTS = {
    "nothing": "",
    "import torch": "import torch",
    "import torch, graphopt": "import torch, graphopt",
    "import torch; graphopt.optimize": "import torch, graphopt; graphopt.optimize",
    "import graphopt": "import graphopt",
    "graphopt --help": _HELP,
}
_COUNT = "\nimport sys\nsys.stderr.write(f\"{len(sys.modules)} {'torch' in sys.modules}\")"


def started(code: str) -> tuple[float, int, bool]:
    """Processor seconds of an interpreter that runs ``code``, its modules, and whether torch is one."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code + _COUNT], capture_output=True, text=True, check=True)
    after = os.times()
    count, torch_loaded = done.stderr.split()[-2:]
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, int(count), torch_loaded == "True"


def rows(name: str) -> Iterator[dict[str, Any]]:
    found = [started(STARTS[name]) for _ in range(RUNS)]
    yield {
        "model": name,
        "seconds": round(min(seconds for seconds, _, _ in found), 3),
        "modules": found[0][1],
        "torch": found[0][2],
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_name = {row["model"]: row for row in found if "error" not in row}
    failed = [row["model"] for row in found if "error" in row]
    if failed or by_name.keys() != STARTS.keys():
        return {"failed": failed, "met": False}
    beyond = by_name["import torch, graphopt"]["seconds"] - by_name["import torch"]["seconds"]
    told = by_name["graphopt --help"]
    return {
        "failed": failed,
        "import_beyond_torch": round(beyond, 3),
        "help_seconds": told["seconds"],
        "help_imports_torch": told["torch"],
        "targets": {"import_beyond_torch": IMPORT_SECONDS, "help_seconds": HELP_SECONDS},
        "met": beyond <= IMPORT_SECONDS and told["seconds"] <= HELP_SECONDS and not told["torch"],
    }


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    figure("start_up", options, rows, summary, options.models or list(STARTS))
