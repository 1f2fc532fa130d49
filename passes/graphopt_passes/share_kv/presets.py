"""Plans of sharing that need no calibration: which layers share is a pattern."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.errors import InputsError

__all__ = ["CONDENSED", "PRESETS", "condensed_plan", "preset_plan", "preset_streams"]

CONDENSED = "layer-condensed"
"""The preset whose sources come later than their consumers."""

Fits = Callable[[int, int], str]


def cla(count: int, fits: Fits, group: int) -> dict[int, int]:
    """Of every ``group`` attentions that follow each other and fit, the others read the first (CLA, arXiv
    2405.12981)."""
    plan: dict[int, int] = {}
    open_: list[list[int]] = []
    for index in range(count):
        mates = next((one for one in open_ if len(one) < group and not fits(index, one[0])), None)
        if mates is None:
            open_.append([index])
        else:
            plan[index] = mates[0]
            mates.append(index)
    return plan


def sandwich(count: int, fits: Fits, group: int) -> dict[int, int]:
    """The first and the last ``group`` attentions keep their own, all between read the first of those that
    they fit (the sandwich of arXiv 2410.14442, its middle layers reading the lowest)."""
    plan: dict[int, int] = {}
    makers: list[int] = []
    for index in range(group, count - group):
        maker = next((one for one in makers if not fits(index, one)), None)
        if maker is None:
            makers.append(index)
        else:
            plan[index] = maker
    return plan


def swiftkv(count: int, fits: Fits, group: int) -> dict[int, int]:
    """Among attentions whose keys and values are made of one early stream, every ``group`` that follow each
    other and fit share (AcrossKV, arXiv 2410.03960)."""
    return cla(count, fits, group)


def condensed_plan(count: int, fits: Fits, warmup: int) -> dict[int, int]:
    """Of ``count`` attentions the first and the last make their own, ``warmup`` in all, one more of the first
    where that is odd; all between read the last of those that they fit (LCKV, arXiv 2405.10637).

    Raises ``InputsError`` where nothing comes to be shared.
    """
    plan: dict[int, int] = {}
    makers: list[int] = []
    for index in reversed(range((warmup + 1) // 2, count - warmup // 2)):
        maker = next((one for one in makers if not fits(index, one)), None)
        if maker is None:
            makers.append(index)
        else:
            plan[index] = maker
    if not plan:
        raise InputsError(
            f"preset {CONDENSED!r} with warmup={warmup} lets none of {count} attentions share: "
            + ("none fit so" if count - warmup > 1 else "two at least are to be left between"),
            hint=f"the nearest valid choice is warmup={max(0, count - 2)}" if 1 < count < warmup + 2 else "",
        )
    return dict(sorted(plan.items()))


PRESETS = {"cla": cla, "sandwich": sandwich, "swiftkv": swiftkv}
_GROUPS = {"cla": (2, 2), "sandwich": (2, 1), "swiftkv": (1, 1)}
"""What ``group`` is where it is not given, and at least."""


def preset_streams(count: int, early: int | None) -> dict[int, int]:
    """All attentions behind ``early``, by default the one in the middle, make keys and values of what enters
    it. Raises ``InputsError`` where that is none of ``count`` attentions, or there are none behind it."""
    if early is None:
        early = min(count // 2, count - 2)
    if not 0 <= early < count - 1:
        raise InputsError(
            f"preset 'swiftkv' with early={early}: the model attends {count} times, and one attention at "
            "least is to be behind the early one",
            hint=f"the nearest valid choice is {max(0, min(early, count - 2))}" if count > 1 else "",
        )
    return dict.fromkeys(range(early + 1, count), early)


def preset_plan(name: str, count: int, fits: Fits, group: int | None, first: int = 0) -> dict[int, int]:
    """The plan of preset ``name`` for the attentions from ``first`` on of ``count``. Raises ``InputsError``
    where nothing comes to be shared."""
    default, least = _GROUPS[name]
    group = default if group is None else group
    if group < least:
        raise InputsError(f"preset {name!r} with group={group}: the nearest valid choice is {least}")
    plan = PRESETS[name](count - first, lambda one, other: fits(one + first, other + first), group)
    plan = {consumer + first: source + first for consumer, source in plan.items()}
    if not plan and not (name == "swiftkv" and group == 1):
        raise InputsError(
            f"preset {name!r} with group={group} lets none of {count} attentions share: none fit so"
        )
    return plan
