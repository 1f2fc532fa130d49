"""Whether what runs again before one slot can do so within a target, in whichever order is best.

An exhaustive search over orders with memory of the sets of operators from which there is no way on
(the register-pebbling problem, Sethi 1975, on the few operators of one slot).
"""

from __future__ import annotations

from collections.abc import Set

from graphopt_passes.insert_checkpoints.model import StepModel

__all__ = ["fits"]

_STATES = 20_000
"""Sets of operators that are looked at before the question stays open."""


def fits(
    model: StepModel, k: int, here: Set[int], runs: Set[int], onward: Set[int], target: int
) -> bool | None:
    """``here``: storages held as slot ``k`` begins; ``runs``: operators that run again before it;
    ``onward``: storages held as the next slot begins. ``None`` if it was not found out.

    ``target``: bytes above the static base. Whether the slot itself is within it is not looked at.
    """
    slot = model.slots[k]
    free = model.free
    room = target - model.output_bytes - slot.before
    kept = {b for b in (*slot.reads, *onward) if not free[b]}
    operators = sorted(runs)
    inputs = [[b for b in model.inputs[i] if not free[b]] for i in operators]
    levels = [model.workspace_again[i] + sum(model.size[b] for b in model.outputs[i]) for i in operators]
    everything = (1 << len(operators)) - 1
    dead: set[int] = set()
    stack = [(0, frozenset(here))]
    seen = 0
    while stack:
        done, present = stack.pop()
        if done == everything:
            return True
        if done in dead:
            continue
        dead.add(done)
        seen += 1
        if seen > _STATES:
            return None
        needed = kept.union(*(inputs[n] for n in range(len(operators)) if not done >> n & 1))
        present &= needed
        held = sum(model.size[b] for b in present)
        # The one that leaves the least behind is tried first.
        ready = [
            n
            for n in range(len(operators))
            if not done >> n & 1 and held + levels[n] <= room and present.issuperset(inputs[n])
        ]
        ready.sort(key=lambda n: -levels[n])
        stack += [(done | 1 << n, present.union(model.outputs[operators[n]])) for n in ready]
    return False
