"""Tune the kernels of a release on one GPU and write the results that are shipped with the package.

    python benchmarks/gpu_tuning.py

Norms of rows, forward (of a sum too) and backward, RMSNorm and LayerNorm, for the widths of usual models, and
the row kernel of the cross entropy for usual vocabularies; bf16. The results go to
``kernels/graphopt_kernels/tuning/results/<device>.json`` (``--out`` for elsewhere), in place of all of
the same kernels; those of other kernels whose code has changed since are dropped. ``rank`` is where the
model had what was chosen among those that were measured: 1 is first.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from graphopt.plugins import default_host
from graphopt_kernels.tuning.command import tuning_device
from graphopt_kernels.tuning.lookup import fields_text
from graphopt_kernels.tuning.store import code_of, read_entries, shipped_file, write_entries
from graphopt_kernels.tuning.tuner import GraphMeter, Outcome, TuningError, present_gpu, tune
from graphopt_kernels.tuning.work import shipped_work


def row(outcome: Outcome) -> str:
    name = f"{outcome.kernel:18} {fields_text(outcome.problem)}"
    if outcome.chosen is None:
        return f"{name}\n    FAILED: {outcome.default.refused}"
    default, chosen = outcome.default, outcome.chosen
    assert default.seconds is not None and chosen.seconds is not None
    times = f"{default.seconds * 1e6:8.1f} us"
    measured = [trial for trial in outcome.trials if trial.seconds is not None]
    if chosen is default:
        return f"{name}\n    {times}, the fastest of {len(measured)}"
    rank = sorted(measured, key=lambda trial: trial.predicted or 0.0).index(chosen) + 1
    return (
        f"{name}\n    {times} -> {chosen.seconds * 1e6:8.1f} us, rank {rank} of {len(measured)}: "
        f"{fields_text(chosen.configuration)}"
    )


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, help="file for the results (default: the shipped one)")
    options.add_argument("--kernels", nargs="*", default=[], metavar="NAME", help="some of the kernels only")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="compile so many at a time")
    given = options.parse_args()
    start = time.perf_counter()
    try:
        device = tuning_device("cuda")
    except TuningError as error:
        print(error)
        return 0
    gpu = present_gpu(device)
    out = given.out or Path(str(shipped_file(gpu.name)))
    work = shipped_work(given.kernels, ())
    specs = {spec.name: spec for spec, _ in work}
    # Results are there as soon as they are known.
    others = []
    if out.is_file():
        tunables = default_host().tunables()
        others = [e for e in read_entries(out) if e.kernel in tunables and e.kernel not in specs]
        others = [e for e in others if e.code == code_of(tunables[e.kernel].sources)]
        out.unlink()
    write_entries(out, others)
    outcomes = []
    for outcome in tune(work, GraphMeter(device), gpu, threads=given.threads):
        outcomes.append(outcome)
        entry = outcome.entry(specs[outcome.kernel], gpu.name)
        write_entries(out, [] if entry is None else [entry])
        print(row(outcome), flush=True)
        for trial in outcome.trials:
            if trial.refused is not None and not trial.refused.text.startswith("it spills"):
                print(f"    refused {fields_text(trial.configuration)}: {trial.refused}", flush=True)
    gains = [o.default.seconds / o.chosen.seconds for o in outcomes if o.chosen and o.chosen is not o.default]
    print(
        f"{len(outcomes)} problems, {len(gains)} with another configuration than the default "
        f"(up to {max(gains, default=1.0):.2f} times faster), in {time.perf_counter() - start:.0f} s: {out}"
    )
    return 0 if all(outcome.chosen is not None for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
