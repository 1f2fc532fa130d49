"""Memory of the halves of programs whose kernels are fused, as parts of a step that was observed.

What was compiled states it; of the rest it is expected from the kernels that Inductor is expected to
make, moved by as much as what was compiled of the same program turned out to take more.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import torch.fx as fx

from graphopt import _torch
from graphopt.emit.fused_memory import fused_live
from graphopt.emit.fusion import fuse
from graphopt.emit.lowered import LoweredMemory, Owned, saved_count
from graphopt.observed import Arrival, BackwardHalf, Entry, ForwardHalf, Ports, Returned
from graphopt.program import Program, tensor_leaves
from graphopt.schedule import Schedule

__all__ = ["FusedHalves"]


class FusedHalves:
    """Implements ``graphopt.observed.Halves``. ``granularity`` is what the allocator rounds up to, in
    bytes."""

    def __init__(self, *, granularity: int) -> None:
        self.granularity = granularity
        self._programs: dict[int, tuple[Program, Ports, _Storages]] = {}
        self._code: dict[int, dict[Schedule, tuple[LoweredMemory, ...]]] = {}
        self._forwards: dict[Hashable, ForwardHalf] = {}
        self._backwards: dict[Hashable, BackwardHalf] = {}

    def state(self, program: Program, schedule: Schedule, records: Sequence[LoweredMemory]) -> None:
        """Go by the memory of the compiled halves from now on: a forward and its backward, or an
        inference."""
        self._known(program)
        self._code.setdefault(id(program), {})[schedule] = tuple(records)
        for cache in (self._forwards, self._backwards):
            cache.clear()

    def stated(self, program: Program, schedule: Schedule) -> bool:
        """Whether the memory of the compiled halves is known."""
        return schedule in self._code.get(id(program), {})

    def forward(self, program: Program, schedule: Schedule) -> ForwardHalf:
        key = id(program), schedule
        if key not in self._forwards:
            if self.stated(program, schedule):
                found = self._stated_forward(program, schedule)
            else:
                found = self._expected_forward(program, schedule)
                errors = [
                    self._stated_forward(program, known).peak - self._expected_forward(program, known).peak
                    for known in self._code.get(id(program), {})
                ]
                least = found.saved_bytes + sum(item.bytes for item in found.returned)
                peak = max(found.peak + max(errors, default=0), least)
                found = ForwardHalf(peak, found.saved_bytes, found.returned, found.held)
            self._forwards[key] = found
        return self._forwards[key]

    def backward(self, program: Program, schedule: Schedule, entry: Entry) -> BackwardHalf:
        key = id(program), schedule, entry
        if key not in self._backwards:
            if self.stated(program, schedule):
                found = self._stated_backward(program, schedule, entry)
            else:
                found = self._expected_backward(program, schedule, entry)
                errors = []
                for known in self._code.get(id(program), {}):
                    stated = self._stated_backward(program, known, entry)
                    expected = self._expected_backward(program, known, entry)
                    errors.append((stated.peak - stated.enters) - (expected.peak - expected.enters))
                peak = max(found.peak + max(errors, default=0), found.enters, found.leaves)
                found = BackwardHalf(found.enters, peak, found.leaves)
            self._backwards[key] = found
        return self._backwards[key]

    def _known(self, program: Program) -> tuple[Program, Ports, _Storages]:
        # The program is kept, so that its id stays its own.
        if id(program) not in self._programs:
            books = _Storages(program, self.granularity)
            self._programs[id(program)] = program, Ports.of(program), books
        return self._programs[id(program)]

    def _stated_forward(self, program: Program, schedule: Schedule) -> ForwardHalf:
        _, ports, _ = self._known(program)
        records = self._code[id(program)][schedule]
        ahead = records[0]
        first = _first_saved(records)
        returned, held, saved = [], set(), 0
        for storage in ahead.storages:
            given = [ahead.output_names[i] for i in storage.outputs if i < first]
            named = frozenset(port for name in given for port in ports.returned(name))
            kept = any(i >= first for i in storage.outputs)
            if storage.input:
                if kept and storage.input in ports.inputs:
                    held.add(ports.inputs[storage.input])
            elif named:
                returned.append(Returned(storage.bytes, named))
                if kept:
                    held.update(named)
            elif storage.outputs:
                saved += storage.bytes
        lasting = saved + sum(item.bytes for item in returned)
        return ForwardHalf(max([lasting, *ahead.live()]), saved, tuple(returned), frozenset(held))

    def _stated_backward(self, program: Program, schedule: Schedule, entry: Entry) -> BackwardHalf:
        _, ports, _ = self._known(program)
        records = self._code[id(program)][schedule]
        ahead, behind = records
        first = _first_saved(records)
        dying = dict(entry.dying)
        owned = []
        for storage in ahead.storages:
            names = tuple(ahead.output_names[i] for i in storage.outputs if i >= first)
            given = [ahead.output_names[i] for i in storage.outputs if i < first]
            staying = any(port in entry.staying for name in given for port in ports.returned(name))
            if not storage.input:
                if names and not staying:
                    owned.append(Owned(names, storage.bytes))
            elif size := dying.get(ports.inputs.get(storage.input, "")):
                owned.append(Owned(names, size))
        entering, unseen = _tangents(ports, entry.tangents, [s.input for s in behind.storages if s.input])
        owned += [Owned(names, size) for names, size in entering]
        enters = sum(item.bytes for item in owned)
        released = sum(item.bytes for item in owned if behind.releases(item))
        peak = max([enters, *(enters + live for live in behind.live([*owned]))])
        extra = sum(storage.bytes for storage in behind.storages if storage.input in unseen)
        return BackwardHalf(enters, peak + extra, enters - released + behind.output_bytes)

    def _expected_forward(self, program: Program, schedule: Schedule) -> ForwardHalf:
        _, ports, books = self._known(program)
        inputs = books.keys(ports.inputs)
        results = [name for name, _ in ports.outputs if name not in ports.inputs]
        saved = books.keys(schedule.saved)
        returned: dict[int, set[str]] = {}
        for name, port in ports.outputs:
            # What is written to inputs is written within the program.
            if port.startswith("out"):
                for key in books.keys([name]) - inputs:
                    returned.setdefault(key, set()).add(port)
        read = saved | books.keys(books.entering(schedule.backward))
        held = {port for name, port in ports.inputs.items() if books.keys([name]) & read}
        held.update(*(found for key, found in returned.items() if key in saved))
        own = books.bytes(saved - inputs - returned.keys())
        given = tuple(Returned(books.bytes([key]), frozenset(found)) for key, found in returned.items())
        live = self._live(program, schedule.forward, {*results, *schedule.saved})
        return ForwardHalf(max([own + books.bytes(returned), *live]), own, given, frozenset(held))

    def _expected_backward(self, program: Program, schedule: Schedule, entry: Entry) -> BackwardHalf:
        _, ports, books = self._known(program)
        dying = dict(entry.dying)
        staying = books.keys(name for name, port in ports.outputs if port in entry.staying)
        lasting = books.keys(n for n, p in ports.inputs.items() if p not in dying)
        entering, _ = _tangents(ports, entry.tangents, list(ports.tangents))
        handed = [*schedule.saved, *books.entering(schedule.backward)]
        own = [name for name in handed if not books.keys([name]) & (staying | lasting)]
        ending = books.keys(own) - books.keys(n for n, p in ports.inputs.items() if p in dying)
        enters = books.bytes(ending) + sum(dying.values()) + sum(size for _, size in entering)
        gradients = {spec.node for spec in program.signature.outputs if spec.role == "gradient"}
        owned = {*own, *(name for names, _ in entering for name in names)}
        live = self._live(program, schedule.backward, gradients, owned)
        # A gradient may lie in what was handed over.
        left = books.bytes(books.keys(gradients) - staying - books.keys(ports.inputs))
        return BackwardHalf(enters, max([enters, left, *(enters + bytes for bytes in live)]), left)

    def _live(
        self,
        program: Program,
        order: Sequence[str],
        outputs: Collection[str],
        owned: Collection[str] = (),
    ) -> list[int]:
        _, _, books = self._known(program)
        calls = [books.nodes[name] for name in order if books.nodes[name].op == "call_function"]
        fused = fuse(calls, outputs, device_type=books.device_type)
        return [live for _, live in fused_live(fused, owned, granularity=self.granularity)]


class _Storages:
    """Distinct storages of a program's values, rounded as the allocator does."""

    def __init__(self, program: Program, granularity: int) -> None:
        self.nodes: Mapping[str, fx.Node] = {node.name: node for node in program.graph.nodes}
        self._tangents = {spec.node for spec in program.signature.by_role("tangent")}
        self._sizes: dict[int, int] = {}
        self._keys: dict[str, set[int]] = {}
        kinds = []
        for name, node in self.nodes.items():
            leaves = tensor_leaves(node.meta.get("val"))
            kinds += [leaf.device.type for leaf in leaves]
            self._keys[name] = {_torch.storage_key(leaf) for leaf in leaves}
            for leaf in leaves:
                size = _torch.hint(leaf.untyped_storage().nbytes())
                self._sizes[_torch.storage_key(leaf)] = -(-size // granularity) * granularity
        self.device_type = next((kind for kind in kinds if kind != "cpu"), "cpu")

    def keys(self, names: Iterable[str]) -> set[int]:
        return {key for name in names for key in self._keys.get(name, ())}

    def entering(self, order: Iterable[str]) -> list[str]:
        """Inputs of the program that some nodes read, but tangents."""
        read = {source for name in order for source in self.nodes[name].all_input_nodes}
        return sorted(
            node.name for node in read if node.op == "placeholder" and node.name not in self._tangents
        )

    def bytes(self, keys: Iterable[int]) -> int:
        return sum(self._sizes[key] for key in keys)


def _first_saved(records: Sequence[LoweredMemory]) -> int:
    """Position of the first output of the forward that is saved for the backward."""
    count = len(records[0].output_names)
    return count - saved_count(*records) if len(records) == 2 else count


def _tangents(
    ports: Ports, arriving: Sequence[Arrival], names: Sequence[str]
) -> tuple[list[tuple[tuple[str, ...], int]], set[str]]:
    """The tangents that the backward alone holds, (nodes, bytes) of each storage; those that were not
    seen."""
    known = {arrival.port: arrival for arrival in arriving}
    found: dict[int, tuple[list[str], int]] = {}
    unseen = set()
    for name in names:
        if name not in ports.tangents:
            continue
        arrival = known.get(ports.tangents[name])
        if arrival is None or arrival.storage is None:
            unseen.add(name)
        elif not arrival.lasting:
            found.setdefault(arrival.storage, ([], arrival.bytes))[0].append(name)
    return [(tuple(nodes), size) for nodes, size in found.values()], unseen
