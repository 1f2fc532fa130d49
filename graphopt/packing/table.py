"""What each weight could be kept as: bytes, seconds and error of every scheme that takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import nn

from graphopt import _torch
from graphopt.candidate import Reason
from graphopt.cost import CostModel
from graphopt.errors import QuantizationError
from graphopt.packing.calibration import Calibration
from graphopt.packing.convert import matrix_of
from graphopt.packing.discover import Discovery, Use, Weight
from graphopt.packing.knapsack import Solution, hull_walk, least
from graphopt.packing.scheme import Scheme, operator_named, reason_of_weight, scheme_text
from graphopt.plugins.records import ScorerSpec

__all__ = ["FrontierRow", "Group", "Kept", "Table", "WeightFrontier", "make_table", "refusal"]


@dataclass(frozen=True)
class Kept:
    """One way to keep weights that share a scheme: ``scheme`` ``None`` is as they are. Bytes that they hold,
    predicted seconds of all their reads in a step, error by weight."""

    scheme: Scheme | None
    bytes: int
    seconds: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return math.fsum(self.errors)


@dataclass(frozen=True)
class Group:
    """Weights that get one scheme, and the ways to keep them, as they are first."""

    weights: tuple[Weight, ...]
    options: tuple[Kept, ...]


@dataclass(frozen=True)
class FrontierRow:
    """Bytes of all tensors of the model, error and seconds of one allocation; ``picked``: an option for each
    group."""

    bytes: int
    error: float
    seconds: float
    picked: tuple[int, ...]


@dataclass(frozen=True)
class WeightFrontier:
    """Allocations along the lower convex hulls of all weights, least bytes first: none with as few bytes as
    one of them has less error. ``metric`` says what errors measure."""

    points: tuple[FrontierRow, ...]
    metric: str

    def at(self, bytes: int) -> FrontierRow | None:
        """The one of least error within ``bytes``; ``None`` where even the least takes more."""
        return max((p for p in self.points if p.bytes <= bytes), key=lambda p: p.bytes, default=None)


@dataclass(frozen=True)
class Table:
    """All groups of a model. ``other_bytes``: parameters and buffers that are not among their weights."""

    groups: tuple[Group, ...]
    other_bytes: int
    metric: str

    @property
    def dense_bytes(self) -> int:
        """Bytes of the model's tensors with every weight as it is."""
        return self.other_bytes + sum(group.options[0].bytes for group in self.groups)

    @property
    def least_bytes(self) -> int:
        """Bytes of the model's tensors with every weight in as few as it can be."""
        return self.other_bytes + sum(min(o.bytes for o in group.options) for group in self.groups)

    def bytes_at(self, bits: float) -> int:
        """Bytes of the model's tensors whose weights take ``bits`` each on average, all that they are stored
        in counted."""
        elements = sum(math.prod(weight.shape) for group in self.groups for weight in group.weights)
        return self.other_bytes + math.floor(bits * elements / 8)

    def cheapest_error(self, bytes: int | None, seconds: float | None) -> Solution | None:
        """Least error with at most ``bytes`` for all tensors of the model and ``seconds`` for reads."""
        rows = [[(o.error, float(o.bytes), o.seconds) for o in group.options] for group in self.groups]
        return least(rows, (None if bytes is None else bytes - self.other_bytes, seconds))

    def fewest_bytes(self, error: float, seconds: float | None) -> Solution | None:
        """Fewest bytes of weights with at most ``error``, and ``seconds`` for reads."""
        rows = [[(float(o.bytes), o.error, o.seconds) for o in group.options] for group in self.groups]
        return least(rows, (error, seconds))

    def packed(self) -> tuple[int, ...]:
        """For each group the scheme of least error, fewest bytes among equals; as it is where none takes
        it."""
        return tuple(
            min(range(1, len(g.options)), key=lambda j: (g.options[j].error, g.options[j].bytes))
            if len(g.options) > 1
            else 0
            for g in self.groups
        )

    def frontier(self) -> WeightFrontier:
        rows = [[(o.error, float(o.bytes)) for o in group.options] for group in self.groups]
        points = []
        for picked in hull_walk(rows):
            chosen = [group.options[j] for group, j in zip(self.groups, picked, strict=True)]
            points.append(
                FrontierRow(
                    self.other_bytes + sum(o.bytes for o in chosen),
                    math.fsum(o.error for o in chosen),
                    math.fsum(o.seconds for o in chosen),
                    picked,
                )
            )
        return WeightFrontier(tuple(points), self.metric)


def make_table(
    model: nn.Module,
    discovery: Discovery,
    schemes: Sequence[Scheme],
    scorer: ScorerSpec,
    calibration: Calibration | None,
    cost: CostModel,
) -> Table:
    """Pack every weight with every scheme that takes it, one after the other, and see how far it is off.

    Raises ``QuantizationError`` where the scorer needs what calibration did not observe, where no weight can
    be packed for what is in it or was not calibrated, and for a scheme that does not keep its contract
    (bytes, finite errors).
    """
    _check_calibration(scorer, calibration, discovery)
    prices = _Prices(cost)
    parameters = dict(model.named_parameters())
    groups = []
    refused: list[str] = []
    for weights in discovery.groups():
        seconds = math.fsum(prices.dense(weight) for weight in weights)
        kept = [Kept(None, sum(w.dense_bytes for w in weights), seconds, (0.0,) * len(weights))]
        found: dict[str, list[tuple[int, float, float]]] = {}
        for weight in weights:
            parameter = parameters[weight.name]
            for name, row in _rows(weight, parameter, schemes, scorer, calibration, prices, refused):
                found.setdefault(name, []).append(row)
        for scheme in schemes:
            rows = found.get(scheme_text(scheme), [])
            if len(rows) == len(weights):
                sizes, times, errors = zip(*rows, strict=True)
                kept.append(Kept(scheme, sum(sizes), math.fsum(times), errors))
        groups.append(Group(weights, tuple(kept)))
    if refused and all(len(group.options) == 1 for group in groups):
        raise QuantizationError(f"no weight can be packed: {refused[0]}")
    total = _torch.storage_bytes([*model.parameters(), *model.buffers()])
    mine = sum(group.options[0].bytes for group in groups)
    return Table(tuple(groups), total - mine, scorer.metric)


def refusal(
    scheme: Scheme, weight: Weight, device: torch.device, statistics: Mapping[str, torch.Tensor]
) -> Reason | None:
    """``None``, or why ``weight`` cannot be kept as ``scheme``, whatever is in it, where ``statistics`` is
    what is known of its inputs."""
    if weight.looked_up and not scheme.by_rows:
        return Reason(f"rows of a weight packed as {scheme.name} cannot be unpacked alone")
    reason = scheme.refuses(weight.n, weight.k, weight.dtype, device)
    return reason or scheme.lacks(weight.k, statistics)


def _rows(
    weight: Weight,
    parameter: torch.Tensor,
    schemes: Sequence[Scheme],
    scorer: ScorerSpec,
    calibration: Calibration | None,
    prices: _Prices,
    refused: list[str],
) -> list[tuple[str, tuple[int, float, float]]]:
    """Bytes, seconds and error of ``weight`` by each scheme that takes it; ``refused`` gets why others do not
    take what is in it."""
    matrix = matrix_of(parameter, weight.orientation)
    if reason_of_weight(matrix) is not None:
        return []
    exact: torch.Tensor | None = None
    statistics: Mapping[str, torch.Tensor] = {}
    for_packing = calibration.for_packing(weight.name) if calibration is not None else {}
    found = []
    for scheme in schemes:
        if refusal(scheme, weight, parameter.device, for_packing) is not None:
            continue
        if exact is None:
            exact = matrix.float()
            given = calibration.of(weight.name) if calibration is not None else {}
            statistics = {name: value.to(exact.device) for name, value in given.items()}
        for_packing = {name: value.to(exact.device) for name, value in for_packing.items()}
        reason = scheme.refuses_numbers(matrix, for_packing)
        if reason is not None:
            refused.append(f"{weight.name} as {scheme_text(scheme)}: {reason}")
            continue
        with torch.no_grad():
            packed = scheme.pack(matrix, for_packing)
            unpacked = scheme.unpack(packed, weight.n, weight.k, weight.dtype)
            error = float(scorer.score(exact, unpacked.float(), statistics))
        size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        promised = scheme.stored_bytes(weight.n, weight.k, weight.dtype)
        if size > promised or (size != promised and scheme.exact_bytes):
            raise QuantizationError(
                f"scheme {scheme_text(scheme)} packs {weight.name} [{weight.n}, {weight.k}] in {size} bytes, "
                f"its stored_bytes() says {promised}"
            )
        if not (math.isfinite(error) and error >= 0):
            raise QuantizationError(
                f"scorer {scorer.name!r} gives {error} for {weight.name} as {scheme_text(scheme)}: "
                "expected a finite number from 0"
            )
        found.append((scheme_text(scheme), (size, prices.packed(weight, scheme, packed), error)))
    return found


def _check_calibration(scorer: ScorerSpec, calibration: Calibration | None, discovery: Discovery) -> None:
    if not scorer.needs:
        return
    call = f"graphopt.calibrate(model, batches, observers={scorer.needs!r})"
    if calibration is None:
        raise QuantizationError(f"score {scorer.name!r} needs calibration data", hint=f"calibration={call}")
    missing = [name for name in scorer.needs if name not in calibration.observers]
    if missing:
        raise QuantizationError(
            f"score {scorer.name!r} needs calibration with observer {missing[0]!r}; this one has "
            f"{', '.join(calibration.observers) or 'none'}",
            hint=f"calibration={call}",
        )
    unknown = [weight.name for weight in discovery.weights if not calibration.of(weight.name)]
    if unknown and len(unknown) == len(discovery.weights):
        raise QuantizationError(
            f"the calibration knows none of the weights, such as {unknown[0]}: it is of another model"
        )
    for weight in discovery.weights:
        amax = calibration.of(weight.name).get("amax")
        if amax is not None and amax.shape != (weight.k,):
            raise QuantizationError(
                f"the calibration is of another model: {weight.name} has {weight.k} inputs, it saw "
                f"{tuple(amax.shape)}"
            )


class _Prices:
    """Predicted seconds of the reads of weights. Shapes are priced once."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.known: dict[object, float] = {}

    def dense(self, weight: Weight) -> float:
        return math.fsum(self._dense(weight, use) for use in weight.uses)

    def packed(self, weight: Weight, scheme: Scheme, packed: Mapping[str, torch.Tensor]) -> float:
        """Products are read packed; stacks and convolutions are unpacked for every read, look-ups by rows."""
        return math.fsum(self._packed(weight, use, scheme, packed) for use in weight.uses)

    def _dense(self, weight: Weight, use: Use) -> float:
        if use.kind == "look-up":
            return 0.0
        # The blocks of a stack one after the other: each has its own rows, all of them the same outputs.
        blocks = weight.blocks if use.kind == "product" else 1
        x = _meta((use.rows * blocks, weight.k), weight.dtype)
        w = _meta((weight.n // blocks, weight.k), weight.dtype)
        return self._price(torch.ops.aten.linear.default, (x, w, None))

    def _packed(self, weight: Weight, use: Use, scheme: Scheme, packed: Mapping[str, torch.Tensor]) -> float:
        if use.kind == "look-up":
            return 0.0
        tensors = [_meta(tuple(tensor.shape), tensor.dtype) for tensor in packed.values()]
        constants = scheme.constants(weight.n, weight.k)
        if use.kind == "product" and weight.blocks == 1:
            x = _meta((use.rows, weight.k), weight.dtype)
            return self._price(operator_named(scheme.linear_op), (x, *tensors, None, *constants))
        unpacking = self._price(operator_named(scheme.unpack_op), (*tensors, *constants, weight.dtype))
        return unpacking + self._dense(weight, use)

    def _price(self, target: object, arguments: tuple[object, ...]) -> float:
        key = (
            target,
            tuple((tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments),
        )
        if key not in self.known:
            graph = fx.Graph()
            nodes: list[object] = []
            for argument in arguments:
                if isinstance(argument, torch.Tensor):
                    node = graph.placeholder("value")
                    node.meta["val"] = argument
                    nodes.append(node)
                else:
                    nodes.append(argument)
            call = graph.call_function(target, tuple(nodes))  # type: ignore[arg-type]
            call.meta["val"] = target(*arguments)  # type: ignore[operator]
            self.known[key] = self.cost.node(call).seconds
        return self.known[key]


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
