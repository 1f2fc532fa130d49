"""Pictures: well-formed, complete, and without labels that overlap."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from graphopt.cost import MemoryProfile, MemoryStep
from graphopt.dump.memory_picture import memory_svg, pareto_svg
from graphopt.dump.svg import Box, Labels, elided, nice_ticks, number, text_width

MIB = 2**20
SVG = "{http://www.w3.org/2000/svg}"


def profile(*runs: tuple[str, list[int]]) -> MemoryProfile:
    steps = tuple(
        MemoryStep("g0", phase, f"{phase}_{index}", value * MIB)
        for phase, values in runs
        for index, value in enumerate(values)
    )
    peak = max(steps, key=lambda step: step.bytes)
    return MemoryProfile(peak.bytes, steps, peak)


BASELINE = profile(("forward", [10, 30, 60, 90]), ("backward", [100, 70, 40, 20]))
OPTIMIZED = profile(("forward", [10, 20, 30, 40]), ("backward", [45, 50, 40, 45, 30, 20]))


def texts(svg: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(f"{SVG}text"))


def boxes(svg: str) -> list[tuple[str, Box]]:
    """Where texts that are not turned stand, by the same upper estimate of widths."""
    out = []
    for element in texts(svg):
        if element.get("transform"):
            continue
        size, text = float(element.get("font-size", "0")), element.text or ""
        width = text_width(text, size, bold=element.get("font-weight") == "600")
        x, y = float(element.get("x", "0")), float(element.get("y", "0"))
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor", "start")] * width
        out.append((text, Box(left, y - 0.8 * size, left + width, y + 0.2 * size)))
    return out


def assert_legible(svg: str) -> None:
    root = ET.fromstring(svg)
    page = Box(0, 0, float(root.get("width", "0")), float(root.get("height", "0")))
    found = boxes(svg)
    for text, box in found:
        assert box.within(page), f"{text!r} leaves the page"
    for (one, first), (two, second) in combinations(found, 2):
        assert not first.meets(second), f"{one!r} overlaps {two!r}"


def test_memory_picture(golden) -> None:
    svg = memory_svg(
        {"baseline": BASELINE, "optimized": OPTIMIZED},
        budget_bytes=60 * MIB,
        title="A <step> & its memory",
        layers={"backward_0": "model.layers.3"},
    )
    golden("memory.svg", svg)
    assert_legible(svg)
    written = [element.text for element in texts(svg)]
    assert "A <step> & its memory" in written
    assert "peak 100.0 MiB at backward_0 in model.layers.3" in written
    assert "peak 50.00 MiB at backward_1" in written
    assert {"forward", "backward", "budget", "60.00 MiB", "live memory (MiB)", "operations executed"} <= set(
        written
    )


def test_curves_meet_where_the_backward_begins() -> None:
    late = profile(("forward", [1] * 6), ("backward", [5, 1]))
    svg = memory_svg({"early": BASELINE, "late": late})
    starts = re.findall(r'<path d="M([\d.]+) [^"]*" stroke="#', svg)
    left, right = 88.0, 840.0
    # Of ten steps across, the early curve starts two after the late one.
    assert float(starts[0]) == pytest.approx(left + (right - left) * 2 / 10, abs=0.01)
    assert float(starts[1]) == left


def test_thousands_of_steps_keep_their_extremes_and_a_small_file() -> None:
    values = [100 + index % 7 for index in range(20_000)]
    values[12_345] = 500
    svg = memory_svg({"baseline": profile(("forward", values))})
    assert len(svg) < 200_000
    assert "500.0 MiB" in [element.text for element in texts(svg)]
    curve = re.findall(r'<path d="(M[^"]*)" stroke="#', svg)[0]
    heights = [float(value) for value in re.findall(r"V([\d.]+)", curve)]
    tall = min(heights)
    assert sum(height < tall + 50 for height in heights) == 1
    assert_legible(svg)


def test_long_names_are_elided_and_equal_peaks_stay_apart() -> None:
    names = ["a profile with a name that is far too long " * 4, "other"]
    svg = memory_svg(
        dict.fromkeys(names, OPTIMIZED),
        budget_bytes=50 * MIB,
        layers={"backward_1": "layer." * 60},
    )
    assert_legible(svg)
    assert sum("…" in (element.text or "") for element in texts(svg)) >= 2


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no profile has steps"):
        memory_svg({"baseline": MemoryProfile(0, (), None)})
    with pytest.raises(ValueError, match="no points"):
        pareto_svg([])


def test_pareto_picture(golden) -> None:
    points = [((40 + 4 * i) * MIB, 0.1 + 0.05 * 0.8**i, f"point {i}") for i in range(12)]
    peers = [(int(m * MIB), t, n) for m, t, n in [(70, 0.148, "torch 0.5"), (70.4, 0.1485, "torch 0.4 <x>")]]
    svg = pareto_svg(points, 60 * MIB, peers)
    golden("pareto.svg", svg)
    assert_legible(svg)
    tooltips = [element.text for element in ET.fromstring(svg).iter(f"{SVG}title")]
    assert "torch 0.4 <x>, 70.40 MiB, 148 ms" in tooltips
    assert len(tooltips) == 1 + len(points) + len(peers)
    assert "budget 60.00 MiB" in [element.text for element in texts(svg)]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_crowded_points_never_overlap(count: int) -> None:
    points = [
        (5 * 2**30 + index * MIB, 0.1 + index * 1e-5, f"a label of some length {index}")
        for index in range(count)
    ]
    svg = pareto_svg(points, 5 * 2**30)
    assert_legible(svg)


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0.1, 0.15, 5) == pytest.approx([0.1, 0.11, 0.12, 0.13, 0.14, 0.15])
    assert nice_ticks(3, 3, 5) == [3]


def test_numbers_and_elision() -> None:
    assert [number(value) for value in (1.0, 0.456, -0.001, 10, 100)] == ["1", "0.46", "0", "10", "100"]
    assert elided("short", 12, 500) == "short"
    cut = elided("a_very_long_node_name", 12, 80)
    assert cut.startswith("a_") and cut.endswith("me") and "…" in cut and text_width(cut, 12) <= 80


def test_labels_give_up_where_there_is_no_room() -> None:
    labels = Labels(Box(0, 0, 60, 40))
    assert labels.place(30, 20, "abc", 12) is not None
    assert labels.place(30, 20, "a label wider than the frame", 12) is None
