"""Updates of optimizers among the writes of a program: by what is written, not by who calls it.

::

    m <- beta * m + (1 - beta) * g          v <- b * v + (1 - b) * g * g
    p <- keep * p - rate * m / (sqrt(v) / correction + eps)                            Adam, AdamW

    m <- momentum * m + share * g           p <- keep * p - rate * m                   SGD

with ``g`` a gradient, scaled, and with a part of the parameter added to it.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
import torch.fx as fx

from graphopt.candidate import Reason
from graphopt.capture.aliasing import written_inputs
from graphopt.program import Program
from graphopt_passes.fuse_optimizer.forms import (
    CONSTANT,
    Expansion,
    Form,
    Numbering,
    Product,
    Quotient,
    SquareRoot,
    is_sized,
    ratio,
)
from graphopt_passes.fuse_optimizer.scalars import ONE, ZERO, Scalar, close, known, over, plus

__all__ = ["Update", "Write", "updates_in", "writes_in"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Write:
    """``value`` is written to the input ``place``: by the call ``copy``, or by the caller, from the output
    of number ``output``."""

    place: fx.Node
    value: fx.Node
    copy: fx.Node | None = None
    output: int = -1


@dataclass(frozen=True)
class Update:
    """An update of one parameter. ``writes``: of the parameter, then of its states; ``numbers`` as
    ``ADAM_NUMBERS`` or ``SGD_NUMBERS`` of ``graphopt_kernels.optimizer_update`` are."""

    kind: str
    writes: tuple[Write, ...]
    gradient: fx.Node
    numbers: tuple[Scalar, ...]
    nesterov: bool = False

    @property
    def places(self) -> tuple[fx.Node, ...]:
        return tuple(write.place for write in self.writes)


def writes_in(program: Program) -> list[Write]:
    """Inputs that are given a new value once, in the order of the inputs."""
    places = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    by_fqn = {spec.fqn: places[spec.node] for spec in program.signature.inputs if spec.fqn}
    found: dict[fx.Node, list[Write]] = {}
    for node in program.nodes(_aten.copy_.default):
        place, value = node.args[0], node.args[1]
        if isinstance(place, fx.Node) and place.op == "placeholder" and isinstance(value, fx.Node):
            found.setdefault(place, []).append(Write(place, value, node))
    nodes = {node.name: node for node in program.graph.nodes}
    for index, spec in enumerate(program.signature.outputs):
        target = by_fqn.get(spec.target) or places.get(spec.target)
        if spec.role == "mutation" and target is not None:
            found.setdefault(target, []).append(Write(target, nodes[spec.node], output=index))
    order = {node: k for k, node in enumerate(places.values())}
    copies = {write.copy for writes in found.values() for write in writes}
    # What another call writes as well has no one value before the update.
    elsewhere = {source for n in program.nodes() if n not in copies for source in written_inputs(n)}
    once = [w[0] for place, w in found.items() if len(w) == 1 and place not in elsewhere]
    return sorted(once, key=lambda write: order[write.place])


def updates_in(writes: Sequence[Write]) -> tuple[list[Update], list[tuple[Write, int, Reason]]]:
    """Updates among ``writes``; and writes that look like one and are none, with how many of their values
    were understood and why the next was not."""
    search = _Search(writes)
    found: list[Update] = []
    missed: dict[fx.Node, tuple[Write, int, Reason]] = {}
    taken: set[fx.Node] = set()
    for look in (search.adam, search.moving_sgd, search.sgd):
        for write in writes:
            if write.place in taken:
                continue
            result = look(write)
            if isinstance(result, Update):
                if not taken.intersection(result.places):
                    found.append(result)
                    taken.update(result.places)
            elif result is not None:
                missed.setdefault(write.place, (write, *result))
    return found, [miss for place, miss in missed.items() if place not in taken]


Missed = tuple[int, Reason]


class _Search:
    def __init__(self, writes: Sequence[Write]) -> None:
        self._numbering = Numbering()
        graph = writes[0].place.graph if writes else fx.Graph()
        self._order = {node: k for k, node in enumerate(graph.nodes)}
        self._by_value = {write.value: write for write in writes if _is_array(write.place)}
        self._values = frozenset(self._by_value)

    # --- one update -----------------------------------------------------------------------------

    def adam(self, write: Write) -> Update | Missed | None:
        """``p = keep * p - rate * m / (sqrt(v) / correction + eps)``"""
        form = self._form(write)
        quotients = [term for term in form if isinstance(term, Quotient)]
        if write.place not in form or not quotients:
            return None
        here = (write.value.name,)
        if len(quotients) > 1 or form.keys() != {write.place, quotients[0]}:
            return 1, Reason("more is added to it than an average over a root", here)
        quotient = quotients[0]
        average = self._state(quotient.numerator)
        if average is None:
            return 1, Reason("what is divided is no moving average that is written", here)
        square, correction, eps = self._denominator(quotient)
        if isinstance(square, Reason):
            return 2, square
        if correction is None:
            return 2, Reason("what it is divided by is not a root and a number", here)
        moved = self._expansion(write, {average.value, square.value}, average)[1]
        beta = moved.pop(average.place, ZERO)
        if beta.value is None:
            return 3, Reason("how an average decays is known at run time alone", (average.value.name,))
        gradient, rest = self._gradient(write, average, moved, {average.value, square.value})
        if gradient is None:
            return 3, Reason("no one value is its gradient", (average.value.name,))
        weight = known(1 - beta.value)
        if rest[gradient].value is not None and close(known(abs(rest[gradient].coefficient)), weight):
            weight = known(abs(rest[gradient].coefficient))
        scale, decay = over(rest[gradient], weight), over(rest.get(write.place, ZERO), weight)
        squares = self._expansion(write, {average.value, square.value}, square, {gradient})[1]
        decays = squares.pop(square.place, ZERO)
        share = self._squared(squares, gradient, write.place, scale, decay)
        if scale is None or decay is None or share is None:
            return 4, Reason("squares are not those of the gradient that is averaged", (square.value.name,))
        rate = -form[quotient] * dict(quotient.numerator)[average.value]
        numbers = (scale, form[write.place], decay, weight, decays, share, rate, correction, eps)
        return Update("adam", (write, average, square), gradient, _settled(numbers))

    def moving_sgd(self, write: Write) -> Update | Missed | None:
        """``m = momentum * m + share * g; p = keep * p - rate * m``, or of ``g + momentum * m``."""
        form = self._form(write)
        states = [self._by_value[term] for term in form if isinstance(term, fx.Node) and term in self._values]
        if write.place not in form or len(states) != 1 or states[0] is write:
            return None
        state = states[0]
        along = form.pop(state.value)
        moved = self._expansion(write, {state.value}, state)[1]
        momentum = moved.pop(state.place, ZERO)
        if momentum.coefficient == 0:
            # What is written to the other input does not depend on what was there: it is no average.
            return None
        gradient, rest = self._gradient(write, state, moved, {state.value})
        if gradient is None:
            return 2, Reason("no one value is its gradient", (state.value.name,))
        keep = form.pop(write.place)
        share, part = rest[gradient], rest.get(write.place, ZERO)
        if not form:
            decay = over(part, share)
            if decay is None:
                return None
            numbers = (ONE, keep, decay, momentum, share, -along)
            return Update("sgd", (write, state), gradient, _settled(numbers))
        direct = self._form(write, {gradient})
        step = direct.get(gradient)
        rate = over(-along, momentum)
        if step is None or rate is None or direct.keys() != {write.place, state.value, gradient}:
            return 2, Reason("more is added to it than a moving average and a gradient", (write.value.name,))
        scale = over(-step, rate)
        taken = over(share, scale) if scale is not None else None
        decay = over(part, taken) if taken is not None else None
        if scale is None or taken is None or decay is None:
            return None
        numbers = (scale, plus(direct[write.place], rate * decay), decay, momentum, taken, rate)
        return Update("sgd", (write, state), gradient, _settled(numbers), nesterov=True)

    def sgd(self, write: Write) -> Update | Missed | None:
        """``p = keep * p - rate * g``"""
        form = self._form(write)
        if write.place not in form or len(form) < 2 or CONSTANT in form:
            return None
        keep = form.pop(write.place)
        gradient, rest = self._gradient(write, write, dict(form), set())
        if gradient is None or rest.keys() != {gradient}:
            return None
        return Update("sgd", (write,), gradient, _settled((ONE, keep, ZERO, ZERO, ONE, -rest[gradient])))

    # --- its parts ------------------------------------------------------------------------------

    def _expansion(
        self, write: Write, inside: set[fx.Node], of: Write, stops: Set[fx.Node] = frozenset()
    ) -> tuple[Expansion, Form]:
        """What ``of`` writes, other writes but those ``inside`` an update left as they are."""
        expansion = Expansion(
            write.place.meta["val"], (self._values - inside - {of.value}) | stops, self._numbering
        )
        return expansion, dict(expansion.of(of.value))

    def _form(self, write: Write, stops: Set[fx.Node] = frozenset()) -> Form:
        if not _is_array(write.place):
            return {write.value: ONE}
        return self._expansion(write, set(), write, stops)[1]

    def _state(self, items: frozenset[tuple[object, Scalar]]) -> Write | None:
        """The write of the value that a form is a multiple of."""
        form = dict(items)
        if len(form) != 1:
            return None
        (term,) = form
        return self._by_value.get(term) if isinstance(term, fx.Node) else None

    def _denominator(self, quotient: Quotient) -> tuple[Write | Reason, Scalar | None, Scalar]:
        """Of ``sqrt(v) / correction + eps``: who writes ``v``, and the numbers."""
        below = dict(quotient.denominator)
        eps = below.pop(CONSTANT, ZERO)
        roots = [term for term in below if isinstance(term, SquareRoot)]
        named = [term.name for term in below if isinstance(term, fx.Node)]
        if len(below) != 1 or not roots:
            return Reason("what it is divided by is not a root and a number", tuple(named)), None, ZERO
        square = self._state(roots[0].of)
        if square is None:
            largest = [n for n, _ in roots[0].of if isinstance(n, fx.Node) and _is_largest(n)]
            if largest:
                return Reason("it keeps the largest squares (amsgrad)", (largest[0].name,)), None, ZERO
            return Reason("what a root is taken of is no mean of squares that is written"), None, ZERO
        if _is_largest(square.value):
            return Reason("it keeps the largest squares (amsgrad)", (square.value.name,)), None, ZERO
        return square, over(ONE, below[roots[0]]), eps

    def _gradient(
        self, write: Write, of: Write, moved: Form, inside: set[fx.Node]
    ) -> tuple[fx.Node | None, Form]:
        """The value that an average takes in beside the parameter, and the form with that as a term."""
        rest = {term: number for term, number in moved.items() if term is not write.place}
        nodes = [term for term in rest if isinstance(term, fx.Node)]
        if len(rest) == 1 and nodes:
            return nodes[0], moved
        expansion = self._expansion(write, inside, of)[0]
        for node in sorted(expansion.forms, key=self._order.__getitem__):
            if node in self._values or ratio(rest, expansion.forms[node]) is None:
                continue
            again = self._expansion(write, inside, of, {node})[1]
            again.pop(of.place, None) if of is not write else None
            if node in again and again.keys() <= {node, write.place}:
                return node, again
        return None, {}

    def _squared(
        self, squares: Form, gradient: fx.Node, place: fx.Node, scale: Scalar | None, decay: Scalar | None
    ) -> Scalar | None:
        """The share of ``(scale * gradient + decay * place) ** 2`` in what is added to a mean of squares."""
        if len(squares) != 1 or scale is None or decay is None:
            return None
        (term, share), = squares.items()  # fmt: skip
        if not isinstance(term, Product) or len(term.factors) != 1:
            return None
        (items,) = term.factors
        taken = {gradient: scale, place: decay} if decay.coefficient else {gradient: scale}
        factor = ratio(taken, dict(items))
        return over(share, factor * factor) if factor is not None else None


def _settled(numbers: Sequence[Scalar]) -> tuple[Scalar, ...]:
    """Coefficients that rounding alone keeps from 0, 1 or -1 are that."""
    found = []
    for number in numbers:
        whole = next((x for x in (0.0, 1.0, -1.0) if abs(number.coefficient - x) < 1e-12), number.coefficient)
        found.append(Scalar(whole, number.factors) if whole else ZERO)
    return tuple(found)


def _is_array(place: fx.Node) -> bool:
    """Whether an input has several elements: one alone could not be told from a number."""
    value = place.meta.get("val")
    return is_sized(value) and value.numel() != 1 and value.dtype.is_floating_point


def _is_largest(node: fx.Node) -> bool:
    """Whether a value is the larger one of two, or a copy or an element of that."""
    names = ("aten::maximum", "aten::_foreach_maximum")
    around = [node, *node.all_input_nodes]
    return any(getattr(getattr(n.target, "_schema", None), "name", "") in names for n in around)
