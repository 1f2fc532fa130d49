"""Figure 3: against all 21 settings of torch's ``activation_memory_budget`` on the same joint graph.

    python benchmarks/torch_budget.py [--models NAME ...] [--quick]

torch's min-cut partitioner splits the joint graph at 0.00, 0.05, ... 1.00; ours is searched once, for
the fewest FLOPs (``InsertCheckpoints(objective="flops")``) and, beside it, for the least predicted
time. Peaks of both come from the same simulation of what is held op by op, the one that figure 1
checks; they are counted above parameters, buffers and inputs. FLOPs are of matrix products, convolutions
and attention that run again. Targets: no setting of torch's is better than every point of ours in both; at
torch's own least peak, ours is at most 0.75 of it (geometric mean) with no more FLOPs again; at
equal peak, at most 0.25 of its FLOPs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import models
import torch
import torch.fx as fx
from harness import figure, geomean, parser

import graphopt
from graphopt import _torch
from graphopt.capture.joint import drop_unread_statistics, save_everything
from graphopt.emit.eager import EagerEmitter
from graphopt.partition import schedule_of
from graphopt.passes import PassContext
from graphopt.program import Program
from graphopt.replay import random_state_of
from graphopt.schedule import Schedule
from graphopt.session import Session
from graphopt_passes.insert_checkpoints import InsertCheckpoints

SETTINGS = [k / 20 for k in range(21)]
TARGET_PEAK, TARGET_FLOPS = 0.75, 0.25
FLOOR = 1e-3
"""A ratio of FLOPs below this counts as this: of zero there is no geometric mean."""


class Recorder(EagerEmitter):
    """Keeps the joint graph as AOTAutograd hands it to a partitioner, with the partitioner's arguments."""

    def __init__(self) -> None:
        self.joint: fx.GraphModule | None = None
        self.arguments: dict[str, Any] = {}
        self.context: Any = None

    def compile(self, gm: Any, inputs: Any, partition: Any, inference: Any) -> Any:
        def split(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **rest: Any) -> Any:
            if self.joint is not None:
                raise RuntimeError("the model was captured in several graphs; torch's setting is for one")
            _torch.eliminate_common_subexpressions(joint)
            drop_unread_statistics(joint)
            self.joint, self.context = copy.deepcopy(joint), _torch.capture_context()
            self.arguments = {"num_fwd_outputs": num_fwd_outputs, **rest}
            return partition(joint, num_fwd_outputs)

        def run(half: fx.GraphModule, half_inputs: Any) -> Any:
            return half.forward

        return _torch.joint_compiler(run, run, run, split, None)(gm, inputs)


def capture(name: str, *, build: Callable[[str], models.Built] = models.build) -> tuple[Session, Recorder]:
    """The session of a captured model, and the joint graph that torch's partitioner would see."""
    model, inputs = build(name)
    optimized = graphopt.optimize(model, emit="eager", on_error="raise", pipeline=["normalize"], cache=False)
    driver = optimized._driver
    driver.session.emitter = recorder = Recorder()
    driver.prepare((), inputs)
    if recorder.joint is None:
        raise RuntimeError("no joint graph was captured")
    return driver.session, recorder


def torch_points(session: Session, recorder: Recorder, settings: Sequence[float]) -> list[dict[str, Any]]:
    """Peak and FLOPs again of torch's partition at each setting."""
    assert recorder.joint is not None
    program = session.current[0].joint
    assert program is not None
    flops = {node.name: session.cost.node(node).flops for node in program.nodes()}
    points = []
    for setting in settings:
        with _torch.within(recorder.context):
            halves = _torch.torch_partition(copy.deepcopy(recorder.joint), setting, dict(recorder.arguments))
        schedule = with_random_states(program, schedule_of(program, *halves))
        points.append({
            "setting": setting,
            "peak": session.cost.memory([(program, schedule)]).peak_bytes,
            "flops": sum(flops[name] for name in schedule.recomputed),
        })  # fmt: skip
    return points


def with_random_states(program: Program, schedule: Schedule) -> Schedule:
    """The schedule with the generator states that its random operators are run again under.

    torch leaves that to the code generator. Run op by op the states have to be kept, 5 KB each, in its
    plans as in ours.
    """
    again = set(schedule.recomputed)
    states = {
        node.name: state.name
        for node in program.nodes()
        if node.name in again and (state := random_state_of(node))
    }
    forward = [
        name for node in schedule.forward for name in ([states[node], node] if node in states else [node])
    ]
    return Schedule(tuple(forward), (*schedule.saved, *states.values()), schedule.backward)


def our_points(session: Session, objective: str) -> tuple[list[tuple[int, int]], float]:
    """(peak, FLOPs again) of every point of the frontier, and the seconds that it took."""
    program = session.current[0].joint
    assert program is not None
    context = PassContext(session.cost, "train", "eager", None, frozenset())
    start = time.perf_counter()
    frontier = next(iter(InsertCheckpoints(objective=objective).propose(program, context)))
    seconds = time.perf_counter() - start
    flops = {node.name: session.cost.node(node).flops for node in program.nodes()}
    points = [
        (
            session.cost.memory([(program, point.schedule)]).peak_bytes,
            sum(flops[name] for name in point.schedule.recomputed),
        )
        for point in frontier.points
    ]
    return points, seconds


def compare(ours: Sequence[tuple[int, int]], torchs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where ours stands against every setting, and at the one with torch's own least peak."""
    best = min(torchs, key=lambda point: (point["peak"], point["flops"]))
    unmatched = [p["setting"] for p in torchs if not any(m <= p["peak"] and f <= p["flops"] for m, f in ours)]
    beating = [p["setting"] for p in torchs if all(p["peak"] <= m or p["flops"] < f for m, f in ours)]
    same_flops = [peak for peak, flops in ours if flops <= best["flops"]]
    same_peak = [flops for peak, flops in ours if peak <= best["peak"]]
    # Over every setting that recomputes: what ours needs to come down to the same peak.
    pairs = [
        (min((f for m, f in ours if m <= p["peak"]), default=None), p["flops"]) for p in torchs if p["flops"]
    ]
    ratios = [flops / theirs for flops, theirs in pairs if flops is not None]
    return {
        "dominated_by": [setting for setting in unmatched if setting in beating] or unmatched,
        "peak_ratio": min(same_flops) / best["peak"] if same_flops else None,
        "flops_ratio": min(same_peak) / best["flops"] if same_peak and best["flops"] else None,
        "flops_at_same_peak": min(same_peak, default=None),
        "flops_ratio_all_settings": geomean(max(ratio, FLOOR) for ratio in ratios),
    }


def rows(name: str, *, settings: Sequence[float]) -> Iterator[dict[str, Any]]:
    session, recorder = capture(name)
    program: Program | None = session.current[0].joint
    assert program is not None
    baseline = session.cost.memory([(program, save_everything(program))]).peak_bytes
    torchs = torch_points(session, recorder, settings)
    best = min(torchs, key=lambda point: (point["peak"], point["flops"]))
    row: dict[str, Any] = {
        "model": name,
        "nodes": len(program.graph.nodes),
        "step_flops": sum(session.cost.node(node).flops for node in program.nodes()),
        "baseline_peak": baseline,
        "torch_least_peak": best["peak"],
        "torch_least_setting": best["setting"],
        "torch_least_flops": best["flops"],
        "torch_rises": sum(later["peak"] < earlier["peak"] for earlier, later in itertools.pairwise(torchs)),
        "torch_worst_of_baseline": max(point["peak"] for point in torchs) / baseline,
    }
    for objective in ("flops", "seconds"):
        points, seconds = our_points(session, objective)
        row[objective] = {
            **compare(points, torchs),
            "points": len(points),
            "search_seconds": round(seconds, 2),
            "least_peak": min(peak for peak, _ in points),
        }
    row["torch"] = torchs
    yield row


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "error" not in row]
    result: dict[str, Any] = {
        "models": len(good),
        "failed": [row["model"] for row in found if "error" in row],
        "settings": sum(len(row["torch"]) for row in good),
        "flops_floor": FLOOR,
    }
    for objective in ("flops", "seconds"):
        parts = [row[objective] for row in good]
        result[objective] = {
            "dominated": {
                row["model"]: row[objective]["dominated_by"] for row in good if row[objective]["dominated_by"]
            },
            "peak_ratio": geomean(p["peak_ratio"] for p in parts if p["peak_ratio"]),
            "flops_ratio": geomean(
                max(p["flops_ratio"], FLOOR) for p in parts if p["flops_ratio"] is not None
            ),
            "flops_ratio_all_settings": geomean(
                p["flops_ratio_all_settings"] for p in parts if p["flops_ratio_all_settings"]
            ),
        }
    ours = result["flops"]
    complete = bool(good) and len(good) == len(found)
    result["met"] = {
        "dominated_by_none": complete and not ours["dominated"],
        "peak": complete and ours["peak_ratio"] is not None and ours["peak_ratio"] <= TARGET_PEAK,
        "flops": complete and ours["flops_ratio"] is not None and ours["flops_ratio"] <= TARGET_FLOPS,
    }
    return result


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    settings = SETTINGS[::5] if options.quick else SETTINGS
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    figure("torch_budget", options, functools.partial(rows, settings=settings), summary)
