"""Seconds from a model to the end of its first training step: graphopt beside torch.compile, on one GPU.

    python benchmarks/gpu_compile_time.py --out benchmarks/results/gpu_compile_time.json

The model and step of gpu_train.py. ``cold`` starts with empty caches of generated code, ``warm`` in a new
process with those that the cold start left. Seconds count from the model on the GPU to the end of the first
forward and backward; importing and building the model are left out. Both modes start at the same time, each
on cores of its own where the machine has enough of them. ``tune_s`` is ``graphopt tune`` for one block of
the same model with all that it calls, ``tuned_again_s`` the same with its results there. ``--profiles
FOLDER`` keeps, for each start, which functions of Python took longest: what a start adds is seen there.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_train import LossOnly, peer_step, prepared

from graphopt.atomic import write_atomically

MODES = ("graphopt", "compile")
STARTS = ("cold", "warm")


def one(mode: str, shape: argparse.Namespace) -> dict[str, Any]:
    """The seconds of one start in this process."""
    if mode == "compile":
        model, ids, _, step = peer_step(mode, shape)
    else:
        model, ids, _ = prepared(shape)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    optimized, notes = 0.0, list[str]()
    if mode == "graphopt":
        import graphopt

        inputs = {"input_ids": ids, "labels": ids}
        fast = graphopt.optimize(LossOnly(model).train(), inputs, emit="inductor", on_error="raise")
        optimized = time.perf_counter() - begun
        step = lambda ids: fast(input_ids=ids, labels=ids)  # noqa: E731
    loss = step(ids)
    loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    if mode == "graphopt":
        notes = list(fast.report.diagnostics)
    return {
        "mode": mode,
        "seconds": round(seconds, 1),
        "optimize_s": round(optimized, 1),
        "loss": round(float(loss), 4),
        "notes": notes,
    }


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """``command``, run beside this file, with all caches of generated code in ``folder``."""
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **caches}, cwd=Path(__file__).parent
    )


def result(process: subprocess.Popen[str], limit: float) -> dict[str, Any]:
    """What the process printed as its result, or that it printed none."""
    try:
        printed, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"not ready after {limit:.0f} s"}
    found = [line[7:] for line in printed.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0]) if found else {"error": f"it failed with {process.returncode}"}


def one_block() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of one layer with its inputs: what ``graphopt tune`` is given."""
    model, ids, _ = prepared(parser().parse_args(["--layers", "1"]))
    return LossOnly(model).train(), {"input_ids": ids, "labels": ids}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_compile_time.json"))
    made.add_argument("--one", choices=MODES)
    made.add_argument("--limit", type=float, default=150.0, help="seconds for each start")
    made.add_argument("--profiles", type=Path, help="keep profiles of the starts in this folder")
    made.add_argument("--no-tune", action="store_true", help="leave out graphopt tune")
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--seq", type=int, default=2048)
    made.add_argument("--vocab", type=int, default=128256)
    return made


def main() -> None:
    shape = parser().parse_args()
    if not torch.cuda.is_available():
        print("gpu_compile_time needs a CUDA device")
        return
    if shape.one:
        profile = cProfile.Profile()
        found = profile.runcall(one, shape.one, shape) if shape.profiles else one(shape.one, shape)
        if shape.profiles:
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(120)
            shape.profiles.mkdir(parents=True, exist_ok=True)
            write_atomically(shape.profiles / f"{shape.one}-{time.time():.0f}.txt", text.getvalue())
        print("RESULT " + json.dumps(found), flush=True)
        return
    rows: list[dict[str, Any]] = []
    command = [sys.executable, str(Path(__file__).resolve())]
    if shape.profiles:
        command += ["--profiles", str(shape.profiles.resolve())]
    for name in ("hidden", "layers", "batch", "seq", "vocab"):
        command += [f"--{name}", str(getattr(shape, name))]
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            running = {mode: started([*command, "--one", mode], Path(folder) / mode) for mode in MODES}
            for mode, process in running.items():
                rows.append({"mode": mode, "start": start, **result(process, shape.limit)})
                print(json.dumps(rows[-1]), flush=True)
        for name in () if shape.no_tune else ("tune_s", "tuned_again_s"):
            rows.append({"mode": "tune", "start": name, **tuned(Path(folder) / "graphopt", shape.limit)})
            print(json.dumps(rows[-1]), flush=True)
    document = {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_compile_time.py",
        "rows": rows,
    }
    write_atomically(shape.out, json.dumps(document, indent=1) + "\n")


def tuned(folder: Path, limit: float) -> dict[str, Any]:
    """Seconds of ``graphopt tune`` for one block."""
    begun = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "graphopt",
        "tune",
        f"{Path(__file__).stem}:one_block",
        "--emit",
        "inductor",
    ]
    process = started(command, folder)
    try:
        process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"not ready after {limit:.0f} s"}
    if process.returncode:
        return {"error": f"it failed with {process.returncode}"}
    return {"seconds": round(time.perf_counter() - begun, 1)}


if __name__ == "__main__":
    main()
