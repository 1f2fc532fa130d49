"""Run a script of the tests in Triton's interpreter and read the JSON that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["interpreted"]


def interpreted(script: str, *arguments: object) -> dict[str, Any]:
    """What ``tests/SCRIPT`` prints: TRITON_INTERPRET has to be set before triton is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / script), *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
