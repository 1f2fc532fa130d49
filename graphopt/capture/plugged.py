"""Calls of a model as plugins captured them: each kind of call by the first plugin that does.

A plugin's graph becomes a module with the model's own parameters (``stand_in``), is compared with the model
(``faithful.stands_for``), and goes through dynamo into the session like any model: what graphopt does with a
program, it does with this one. Whatever is wrong with it is the plugin's, and the next one is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from graphopt import _torch
from graphopt.apart import CompiledApart
from graphopt.capture.faithful import stands_for
from graphopt.capture.kept import KeptModel
from graphopt.capture.stand_in import keep_layers, stand_in
from graphopt.errors import GraphoptError, PluginError, brief
from graphopt.plugins.capturing import CaptureHook
from graphopt.plugins.loading import GUARDED
from graphopt.plugins.records import Capture, CaptureInputs, CaptureOptions
from graphopt.report import CaptureRecord
from graphopt.restored import cuda_devices, random_state_restored
from graphopt.session import NotPlanned, Session

__all__ = ["PluggedCapture", "ask"]

MOST = 8
"""Kinds of calls that plugins are asked about for one model, as many as dynamo compiles of one function."""

_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class _Offer:
    """What a plugin captured: the module, which calls it stands for, and whether of other sizes too."""

    hook: CaptureHook
    module: torch.nn.Module
    key: tuple[Any, ...]
    dynamic: bool


@dataclass
class _Entry:
    offer: _Offer
    call: Callable[..., Any]
    state: list[tuple[Mapping[str, Any], str, torch.Tensor]]
    programs: list[str] = field(default_factory=list)

    def current(self) -> bool:
        """Whether the model has the parameters and buffers that it had."""
        return all(table.get(key) is tensor for table, key, tensor in self.state)


def ask(
    hook: CaptureHook,
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: CaptureOptions,
) -> tuple[torch.nn.Module, Capture] | None:
    """What one plugin captures of one call, as a module in place of ``model``; the model is left as it was.

    Raises what the plugin raises, and ``PluginError`` for an answer that cannot be used.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    copies = [_copied(leaf) for leaf in leaves]
    given, named = pytree.tree_unflatten(copies, spec)
    kept = KeptModel(model)
    try:
        with (
            random_state_restored(),
            torch.random.fork_rng(devices=cuda_devices(model)),
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            returned = hook.ask(model, CaptureInputs(given, named), options)
    finally:
        changed = kept.put_back()
    if changed:
        raise PluginError(f"it changed the model, which was put back: {changed}")
    if returned is None:
        return None
    module = stand_in(model, returned, len(leaves))
    assert isinstance(returned, Capture)
    return module, returned


class PluggedCapture:
    """``capture`` asks plugins about the first call; where one answers, the object is called as the model is.

    ``differs(call, args, kwargs)`` says how what was captured differs from the model, or ``""``; ``refused``
    raises ``InputsError`` for arguments that the model itself does not take. ``compare`` holds captures
    against the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        session: Session,
        *,
        dynamic: bool | None,
        compare: bool,
        differs: Callable[..., str],
        refused: Callable[..., None],
    ) -> None:
        self.model, self.session, self.dynamic, self.compare = model, session, dynamic, compare
        self._differs, self._refused = differs, refused
        self._modules = list(model.modules())
        self._entries: list[_Entry] = []
        self._declined: list[tuple[Any, ...]] = []
        self._given_up: dict[str, CaptureRecord] = {}
        self._own: Callable[..., Any] | None = None

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a plugin captured this call, which is planned then.

        Raises what planning raises, and ``PluginError`` where a plugin fails and errors are raised.
        """
        if any(entry.current() and self._is_of(entry, args, kwargs) for entry in self._entries):
            return True
        return any(self._take(offer, args, kwargs) for offer in self._offers(args, kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for entry in self._entries:
            if self._is_of(entry, args, kwargs) and entry.current():
                return self._run(entry, args, kwargs)
        key = self._key(args, kwargs, sizes=True)
        if len(self._entries) + len(self._declined) < MOST and key not in self._declined:
            if self.capture(args, kwargs):
                return self._run(self._entries[-1], args, kwargs)
            self._declined.append(key)
        if self._own is None:
            self._own = CompiledApart(
                self.model, self.session.backend, fullgraph=True, dynamic=self.dynamic
            )
        return self._own(*args, **kwargs)

    def records(self) -> tuple[CaptureRecord, ...]:
        """What each plugin captured, and why others did not."""
        found: dict[str, CaptureRecord] = {}
        for entry in self._entries:
            plugin = entry.offer.hook.plugin
            known = found.get(str(plugin))
            programs = (*(known.programs if known else ()), *entry.programs)
            found[str(plugin)] = CaptureRecord(plugin.name, plugin.distribution, programs)
        for label, record in self._given_up.items():
            known = found.get(label)
            programs = known.programs if known else ()
            found[label] = CaptureRecord(record.plugin, record.distribution, programs, record.reason)
        return tuple(found.values())

    def _run(self, entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = len(self.session.captured)
        try:
            return entry.call(*args, **kwargs)
        finally:
            entry.programs += [captured.name for captured in self.session.captured[known:]]

    def _offers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[_Offer]:
        """What plugins captured of this call and may stand for the model, in the order of plugins."""
        leaves = pytree.tree_leaves((args, kwargs))
        trained = (*self.model.parameters(), *(x for x in leaves if isinstance(x, torch.Tensor)))
        training = torch.is_grad_enabled() and any(t.requires_grad for t in trained)
        options = CaptureOptions("train" if training else "infer", self.dynamic)
        for hook in self.session.host.capture_hooks():
            if str(hook.plugin) in self._given_up:
                continue
            try:
                answer = ask(hook, self.model, args, kwargs, options)
            except GUARDED as error:
                if not isinstance(error, PluginError):
                    # What the model does not take no plugin can capture.
                    self._refused(args, kwargs)
                self._give_up(hook, error)
                continue
            if answer is None:
                continue
            module, capture = answer
            if why := self._unlike(hook, module, args, kwargs, training):
                self._give_up(hook, PluginError(why))
                continue
            yield _Offer(hook, module, self._key(args, kwargs, sizes=not capture.dynamic), capture.dynamic)

    def _unlike(
        self, hook: CaptureHook, module: torch.nn.Module, args: Any, kwargs: Any, training: bool
    ) -> str:
        if not self.compare:
            return ""
        found = stands_for(self.model, module, args, kwargs, training=training)
        if found.refused:
            self.session.diagnostics.append(
                f"what {hook} captured was not compared with the model: {found.refused}"
            )
        return found.difference

    def _take(self, offer: _Offer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Capture and plan what a plugin offers; everything as it was where that fails."""
        session, go_back = self.session, self.session.checkpoint()
        dynamic = self.dynamic if offer.dynamic else False

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            keep_layers(offer.module, gm.graph)
            return session.backend(gm, inputs)

        call = CompiledApart(offer.module, backend, fullgraph=True, dynamic=dynamic)
        known = len(session.captured)
        session.whole, session.capturing = True, True
        why = "its graph runs no tensor operation"
        try:
            call(*args, **kwargs)
        except NotPlanned:
            why = self._differs(call, args, kwargs)
        except Exception as error:
            inner = _torch.inner_error(error)
            if isinstance(inner, GraphoptError):
                raise inner from None
            why = f"its graph could not be compiled: {brief(inner)}"
        finally:
            session.capturing = False
        if why:
            go_back()
            self._give_up(offer.hook, PluginError(why))
            return False
        programs = [captured.name for captured in session.captured[known:]]
        self._entries = [entry for entry in self._entries if entry.current()]
        self._entries.append(_Entry(offer, call, _state_slots(self._modules), programs))
        return True

    def _give_up(self, hook: CaptureHook, error: BaseException) -> None:
        """The plugin is not asked about this model again."""
        plugin = hook.plugin
        said = error.message if isinstance(error, PluginError) else f"it raised {brief(error)}"
        self._given_up[str(plugin)] = CaptureRecord(plugin.name, plugin.distribution, (), said)
        hook.refuse(error)
        if self.session.on_error == "raise":
            raise PluginError(f"{hook} did not capture the model: {said}") from error

    def _is_of(self, entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._key(args, kwargs, sizes=not entry.offer.dynamic) == entry.offer.key

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, sizes: bool) -> tuple[Any, ...]:
        """Equal for calls that one graph may stand for."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        modes = tuple(module.training for module in self._modules)
        casts = tuple(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        )
        return (spec, tuple(_look(leaf, sizes) for leaf in leaves), modes, casts, torch.is_grad_enabled())


def _look(leaf: Any, sizes: bool) -> Any:
    if isinstance(leaf, torch.Tensor):
        shape = tuple(leaf.shape) if sizes else leaf.dim()
        return (type(leaf), leaf.dtype, leaf.device, shape, leaf.requires_grad)
    return (type(leaf), leaf) if type(leaf) in _PLAIN else _Same(leaf)


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal for one and the same object, which lives as long."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _state_slots(modules: list[torch.nn.Module]) -> list[tuple[Mapping[str, Any], str, torch.Tensor]]:
    tables = [vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers")]
    return [(table, key, tensor) for table in tables for key, tensor in table.items() if tensor is not None]


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)
