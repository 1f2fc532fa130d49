"""A report as a table for the terminal: about twenty lines, the same wherever it is printed."""

from __future__ import annotations

import io
from collections import Counter

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphopt.budget import format_bytes
from graphopt.cost import Cost
from graphopt.decoding.record import DecodingRecord, LossyRecord, SharingRecord, SiteRecord
from graphopt.duration import format_seconds
from graphopt.plans import Plan, count_text, gap_text
from graphopt.price import PriceGroup, price_groups
from graphopt.report import Report

__all__ = [
    "GROUPS_SHOWN",
    "comparison",
    "cost_rows",
    "headline",
    "peak_rows",
    "plan_lines",
    "program_lines",
    "report_renderable",
    "report_text",
    "store_lines",
    "undone_lines",
    "weight_lines",
]

_POINTS_SHOWN = 6

_PAIRS_SHOWN = 8
GROUPS_SHOWN = 6
_WIDTH = 100


def report_text(report: Report) -> str:
    """The table as plain text, 100 columns, without colours."""
    stream = io.StringIO()
    # In a notebook rich would display the table instead of writing it to the stream; on a dumb
    # terminal it would take another width.
    console = Console(file=stream, width=_WIDTH, color_system=None, force_jupyter=False, force_terminal=False)
    console.print(report_renderable(report))
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def report_renderable(report: Report) -> RenderableType:
    """The same for a rich console, with styles."""
    parts: list[RenderableType] = [Text(headline(report), style="bold")]
    if cost_rows(report):
        parts.append(_costs(report))
    if comparison(report):
        parts.append(Text(comparison(report)))
    if report.plan is not None:
        parts += [Text(line) for line in plan_lines(report.plan)]
        groups = price_groups(report.plan)
        if groups:
            parts.append(_prices(groups))
    if report.steps:
        parts += [Text("passes", style="bold"), _passes(report)]
    if report.quantization is not None:
        parts.append(Text("weights", style="bold"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in weight_lines(report)]
    if report.decoding is not None:
        parts.append(Text("stores of keys and values", style="bold"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in store_lines(report.decoding)]
    programs = program_lines(report)
    if programs:
        parts.append(Text("programs", style="bold"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in programs]
    undone = undone_lines(report)
    if undone:
        parts.append(Text("not done", style="bold"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in undone]
    troubled = [plugin for plugin in report.plugins if plugin.status != "active" or plugin.slow]
    notes = [f"plugin {plugin}" for plugin in troubled] + list(report.diagnostics)
    if report.groups:
        parts.append(Text("kernels in place of Inductor's", style="bold"))
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in group_lines(report)]
    if notes:
        parts.append(Text("notes", style="bold"))
        parts += [Padding(Text(note), (0, 0, 0, 2)) for note in notes]
    return Group(*parts)


def group_lines(report: Report) -> list[str]:
    """A line for each group of operators that is kept, and one for each reason why others are not."""
    lines = []
    for group in report.groups:
        if group.kept:
            saved = (group.apart - group.together) * 1e6
            lines.append(f"{group.kernel}: {', '.join(group.operators)}: {saved:.1f} us, {group.reason}")
    reasons = Counter(group.reason for group in report.groups if not group.kept)
    lines += [f"not {count}: {reason}" for reason, count in sorted(reasons.items())]
    return lines


def store_lines(record: DecodingRecord, shown: int = GROUPS_SHOWN) -> list[str]:
    """What is kept from token to token: a sum, then a line for each kind of store and mask."""
    bound = f" of {format_bytes(record.budget)} allowed" if record.budget is not None else ""
    lines = [
        f"{format_bytes(record.cache_bytes)}{bound} for {record.max_batch} sequences of {record.max_tokens} "
        f"positions; prompts go in {record.chunk} tokens at a time; logits differ from those "
        f"{'without stores' if record.lossy is None else 'of rounded rows'} by at most {record.off:.1e}"
    ]
    if record.lossy is not None:
        lines += lossy_lines(record.lossy)
    if record.sharing is not None:
        lines += sharing_lines(record.sharing)
    kinds: dict[tuple[str, str], list[SiteRecord]] = {}
    for index, site in enumerate(record.sites):
        store = site.store if site.source == index or site.joins else "shared"
        kinds.setdefault((store, site.mask), []).append(site)
    for (store, mask), sites in list(kinds.items())[:shown]:
        layers = ", ".join(site.layer or "-" for site in sites[:2]) + (", ..." if len(sites) > 2 else "")
        total = format_bytes(sum(site.bytes for site in sites))
        lines.append(f"{store}: {len(sites)} attentions ({layers}), {mask}, {total}")
    if record.states:
        places = list(dict.fromkeys(state.layer or "-" for state in record.states))
        named = ", ".join(places[:2]) + (", ..." if len(places) > 2 else "")
        total = format_bytes(sum(state.bytes for state in record.states))
        lines.append(f"state: {len(record.states)} of recurrences ({named}), {total}")
    return lines


def lossy_lines(record: LossyRecord) -> list[str]:
    """What stores that are not exact do to predictions, as far as that was measured."""
    lines = [f"{record.attentions} attentions keep less than the model makes (lossy)"]
    if record.divergence is not None:
        lines[0] += f": KL {record.divergence:.3g} nats a token on {record.tokens} tokens"
        lines[0] += f", {record.predicted:.3g} predicted" if record.predicted is not None else ""
    if record.frontier:
        step = max(1, len(record.frontier) // _POINTS_SHOWN)
        points = [f"{format_bytes(p.bytes)} {p.divergence:.2g}" for p in record.frontier[::step]]
        lines.append(f"bytes and predicted KL: {', '.join(points)}")
    return [*lines, *record.notes]


def sharing_lines(record: SharingRecord) -> list[str]:
    """Which attentions read the keys and values of which, and what that freed."""
    pairs = ", ".join(f"{consumer} <- {source}" for consumer, source in record.sources[:_PAIRS_SHOWN])
    more = f" and {len(record.sources) - _PAIRS_SHOWN} more" if len(record.sources) > _PAIRS_SHOWN else ""
    bytes_, weights, flops = record.cache_bytes, record.weight_bytes, record.flops
    lines = []
    if record.sources:
        lines.append(f"{len(record.sources)} attentions read the keys and values of others: {pairs}{more}")
    if record.streams:
        early = ", ".join(map(str, sorted({early for _, early in record.streams})))
        lines.append(
            f"{len(record.streams)} attentions make keys and values of what enters attention {early}: "
            f"{record.prompt_flops.realised:,} FLOPs of a prompt of {record.prompt:,} tokens are gone "
            f"({record.prompt_flops.promised:,} promised)"
        )
    lines += [
        f"freed: {format_bytes(bytes_.realised)} of stores ({format_bytes(bytes_.promised)} promised), "
        f"{format_bytes(weights.realised)} of weights ({format_bytes(weights.promised)}), "
        f"{flops.realised:,} FLOPs a token ({flops.promised:,})",
    ]
    if record.divergence is not None:
        lines.append(f"predictions are off by {record.divergence:.3g} nats on {record.tokens:,} tokens")
    return lines


def weight_lines(report: Report, shown: int = GROUPS_SHOWN) -> list[str]:
    """What was packed: a sum, then a line for each scheme: ``int8: 12 weights (layers.0.q.weight, ...),
    32.00 MiB -> 16.13 MiB, error 0.0012``, and the weights that are most off."""
    plan = report.quantization
    if plan is None:
        return []
    lines = [plan.summary]
    for scheme in dict.fromkeys(choice.scheme for choice in plan.packed):
        chosen = [choice for choice in plan.packed if choice.scheme == scheme]
        names = ", ".join(c.weight for c in chosen[:2]) + (", ..." if len(chosen) > 2 else "")
        before, after = (format_bytes(sum(sizes)) for sizes in zip(
            *((c.bytes_before, c.bytes_after) for c in chosen), strict=True
        ))  # fmt: skip
        error = sum(choice.error for choice in chosen)
        lines.append(
            f"{scheme}: {count_text(len(chosen), 'weight')} ({names}), {before} -> {after}, error {error:.3g}"
        )
    worst = sorted(plan.packed, key=lambda choice: -choice.error)[:shown]
    if len(plan.packed) > 1:
        off = ", ".join(f"{c.weight} {c.error:.3g}" for c in worst)
        lines.append(f"most off: {off}")
    return lines


def headline(report: Report) -> str:
    """What ran where: ``train step on cpu, 2 programs (graphopt 0.1.0, torch 2.13.0, Python 3.11.2)``."""
    env = report.environment
    modes = sorted({program.mode for program in report.programs})
    what = f"{' and '.join(modes)} step" if modes else "step"
    programs = f", {count_text(len(report.programs), 'program')}" if report.programs else ""
    versions = f"graphopt {env.graphopt}, torch {env.torch}, Python {env.python}"
    return f"{what} on {env.device}{programs} ({versions})"


def cost_rows(report: Report) -> list[tuple[str, str, str, str, str, str]]:
    """Name, peak, its share of the baseline's, weights, seconds, and the times of the baseline's.

    The baseline is predicted: a measured time has nothing to be held against.
    """
    return [row for row, _ in peak_rows(report)]


def peak_rows(report: Report) -> list[tuple[tuple[str, str, str, str, str, str], int]]:
    """``cost_rows`` with the peak of each in bytes; what is not known has no row."""
    base = report.baseline
    rows = []
    if base is not None:
        rows.append((_cost_row("baseline", base, base), base.peak_bytes))
    if report.budget is not None:
        cells = ("budget", format_bytes(report.budget), _share(report.budget, base), "", "", "")
        rows.append((cells, report.budget))
    for name, cost in (("predicted", report.predicted), ("measured", report.measured)):
        if cost is not None:
            cells = _cost_row(name, cost, base)
            rows.append((cells if name == "predicted" else (*cells[:-1], ""), cost.peak_bytes))
    return rows


def comparison(report: Report) -> str:
    """The measured peak beside the predicted one: ``the peak measured is 12.00 KiB (1.3 %) above the one
    predicted``; "" before it was measured."""
    error = report.peak_error
    if error is None or report.predicted is None:
        return ""
    if error == 0:
        return "the peak measured is the one predicted, to the byte"
    share = 100 * abs(error) / max(1, report.predicted.peak_bytes)
    side = "above" if error > 0 else "below"
    return f"the peak measured is {format_bytes(abs(error))} ({share:.1f} %) {side} the one predicted"


def plan_lines(plan: Plan) -> list[str]:
    """The planner's arithmetic in sentences."""
    saved = [value for choice in plan.choices for value in choice.saved]
    again = [item for choice in plan.choices for item in choice.recomputed]
    added = sum(choice.seconds for choice in plan.choices)
    kept = format_bytes(sum(value.bytes for value in saved))
    lines = [
        f"planned in {format_seconds(plan.seconds_to_plan)}: no plan within the budget takes less than "
        f"{format_seconds(plan.lower_bound)} ({gap_text(plan.gap)})",
        f"saved for the backward: {count_text(len(saved), 'value')}, {kept}",
    ]
    if plan.policy:
        lines.append(f"chosen by policy {plan.policy}")
    taken: dict[str, list[str]] = {}
    for choice in plan.choices:
        if choice.alternative:
            taken.setdefault(choice.alternative, []).append(choice.program)
    lines += [f"rewritten: {name} in {', '.join(programs)}" for name, programs in taken.items()]
    if not again:
        return [*lines, "recomputed: nothing"]
    size = format_bytes(sum(item.bytes for item in again))
    verb = "adds" if added >= 0 else "with rewrites saves"
    change = f"{verb} {format_seconds(abs(added))}"
    return [*lines, f"recomputed: {count_text(len(again), 'node')}, {size}, {change}"]


def program_lines(report: Report) -> list[str]:
    """What was captured for which inputs, where there is more than one answer: ``g1 train f32[s77=48,16]:
    the step above``. Programs of one call are told by the first of them."""
    lines = []
    for programs, told in (
        (report.earlier, "captured earlier, has its own plan"),
        (report.programs, "the step above"),
    ):
        seen: dict[tuple[str, str, str], None] = {}
        for program in programs:
            if program.inputs:
                seen.setdefault((program.name.partition(".")[0], program.mode, program.inputs))
        if programs is report.programs and report.budget is not None and _symbolic(report):
            told += "; sizes with names may differ, of larger ones a step may take more than the budget"
        lines += [f"{name} {mode} {inputs}: {told}" for name, mode, inputs in seen]
    shown = lines if report.earlier or _symbolic(report) else []
    return [*shown, *capture_lines(report)]


def capture_lines(report: Report) -> list[str]:
    """Which plugins captured what, and which were asked and not used: ``g0: captured by plugin 'acme' of
    acme-tracer``."""
    lines = []
    for record in report.captures:
        plugin = f"plugin {record.plugin!r} of {record.distribution}"
        if record.programs:
            names = dict.fromkeys(name.partition(".")[0] for name in record.programs)
            lines.append(f"{', '.join(names)}: captured by {plugin}")
        if record.reason:
            lines.append(f"{plugin} did not capture the model: {record.reason}")
    return lines


def _symbolic(report: Report) -> bool:
    return any("=" in program.inputs for program in report.programs)


def rewrite_lines(report: Report) -> list[str]:
    """What each rewrite that was chosen was predicted to change, the largest gain first:
    ``g0/fuse-norm/rms@mul_3 (layers.0.norm): saves 1.20 ms``."""
    lines = []
    for rewrite in sorted(report.rewrites, key=lambda rewrite: rewrite.delta.seconds):
        delta = rewrite.delta
        parts = []
        if delta.seconds:
            parts.append(f"{'saves' if delta.seconds < 0 else 'adds'} {format_seconds(abs(delta.seconds))}")
        for size, what in ((delta.peak_bytes, "at the peak"), (delta.static_bytes, "of weights")):
            if size:
                parts.append(f"{'saves' if size < 0 else 'adds'} {format_bytes(abs(size))} {what}")
        if delta.error:
            parts.append(f"error {delta.error:.3g}")
        where = f" ({rewrite.layer})" if rewrite.layer else ""
        said = ", ".join(parts) or "weighed with the plan"
        lines.append(f"{rewrite.id}{where}: {said}" + ("" if rewrite.applied else "; rolled back"))
    return lines


def undone_lines(report: Report, shown: int | None = GROUPS_SHOWN) -> list[str]:
    """Declined rewrites and near misses by their reason, the most frequent first: ``12 x drop-view
    (view, view_1, ...): its result is an output``. ``shown`` bounds the lines; ``None``: all."""
    places: dict[tuple[str, str], list[str]] = {}
    for declined in report.declined:
        places.setdefault(("", declined.why), []).append(declined.candidate)
    for miss in report.near_misses:
        at = miss.at if miss.matched == miss.total else f"{miss.at} {miss.matched}/{miss.total}"
        places.setdefault((f"{miss.rule} ", miss.reason.text), []).append(at)
    ranked = sorted(places.items(), key=lambda item: -len(item[1]))
    lines = []
    for (rule, why), where in ranked[:shown]:
        examples = ", ".join(where[:2]) + (", ..." if len(where) > 2 else "")
        lines.append(f"{len(where)} x {rule}({examples}): {why}")
    rest = sum(len(where) for _, where in ranked[len(lines) :])
    return [*lines, f"and {rest} more"] if rest else lines


def _cost_row(name: str, cost: Cost, baseline: Cost | None) -> tuple[str, str, str, str, str, str]:
    times = ""
    if cost.seconds is not None and baseline is not None and baseline.seconds:
        times = f"{cost.seconds / baseline.seconds:.2f} x"
    peak, weights = format_bytes(cost.peak_bytes), format_bytes(cost.weight_bytes)
    return name, peak, _share(cost.peak_bytes, baseline), weights, format_seconds(cost.seconds), times


def _share(peak: int, baseline: Cost | None) -> str:
    return f"{100 * peak / baseline.peak_bytes:.1f} %" if baseline is not None and baseline.peak_bytes else ""


def _costs(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("peak", "of baseline", "weights", "time", "of baseline"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in cost_rows(report):
        table.add_row(*map(Text, row))
    return table


def _prices(groups: tuple[PriceGroup, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  layer", overflow="ellipsis", no_wrap=True, max_width=42)
    table.add_column("op", overflow="ellipsis", no_wrap=True, max_width=32)
    for heading in ("runs", "bytes", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    # One group too many would take the line that says so.
    shown = groups if len(groups) == GROUPS_SHOWN + 1 else groups[:GROUPS_SHOWN]
    for group in shown:
        table.add_row(*map(Text, _price_cells(f"  {group.layer or '-'}", group.op, [group])))
    rest = groups[len(shown) :]
    if rest:
        table.add_row(*map(Text, _price_cells(f"  and {len(rest)} more groups", "", list(rest))))
    return table


def _price_cells(layer: str, op: str, groups: list[PriceGroup]) -> tuple[str, str, str, str, str]:
    size = format_bytes(sum(group.bytes for group in groups))
    seconds = format_seconds(sum(group.seconds for group in groups))
    return layer, op, f"{sum(group.runs for group in groups):,}", size, seconds


def _passes(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, status, seconds, reason in step_rows(report):
        table.add_row(Text(f"  {name}"), Text(status), Text(seconds), Text(reason))
    return table


def step_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Name, status, time and reason of each pass; runs over several programs that came out alike are one
    row: ``("insert-checkpoints", "applied", "3.20 s", "6 programs")``."""
    runs: dict[tuple[str, str, str], list[float]] = {}
    for step in report.steps:
        name = step.id + (f"{{{step.options}}}" if step.options else "")
        runs.setdefault((name, step.status, step.reason), []).append(step.seconds)
    rows = []
    for (name, status, reason), seconds in runs.items():
        several = count_text(len(seconds), "program") if len(seconds) > 1 else ""
        rows.append((name, status, format_seconds(sum(seconds)), ", ".join(filter(None, (several, reason)))))
    return rows
