"""Plans of sharing that need no calibration: which layers share is a pattern."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.errors import InputsError, UnknownNameError

__all__ = ["PRESETS", "preset_plan"]

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


PRESETS = {"cla": cla, "sandwich": sandwich}


def preset_plan(name: str, count: int, fits: Fits, group: int) -> dict[int, int]:
    """The plan of preset ``name`` for ``count`` attentions. Raises ``UnknownNameError``, and ``InputsError``
    where nothing comes to be shared."""
    if name not in PRESETS:
        raise UnknownNameError("preset of share-kv", name, PRESETS)
    least = {"cla": 2, "sandwich": 1}[name]
    if group < least:
        raise InputsError(f"preset {name!r} with group={group}: the nearest valid choice is {least}")
    plan = PRESETS[name](count, fits, group)
    if not plan:
        raise InputsError(
            f"preset {name!r} with group={group} lets none of {count} attentions share: none fit so"
        )
    return plan
