"""The plugin host: asks plugins for records, checks and attributes them, and survives them."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import EntryPoint
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from graphopt.errors import PipelineError, PluginError, UnknownNameError
from graphopt.plugins.capturing import CaptureHook
from graphopt.plugins.hookspecs import GROUP
from graphopt.plugins.loading import GUARDED, INLINE, LoadedPlugin, describe_error, load_plugins
from graphopt.plugins.records import (
    CacheScoreSpec,
    CodecSpec,
    Command,
    CostModelFactory,
    DumpFormat,
    KernelSpec,
    OperatorCost,
    PluginRecord,
    PolicySpec,
    Registered,
    ReplacementSpec,
    ScorerSpec,
    ShareScoreSpec,
    TunableSpec,
)
from graphopt.plugins.returned import (
    read_cache_scores,
    read_passes,
    read_pipelines,
    read_records,
    read_rules,
    read_schemes,
    read_stores,
    read_weight_formats,
)
from graphopt.plugins.watch import PATIENCE_SECONDS

if TYPE_CHECKING:
    from graphopt.decoding.stores import CacheStore
    from graphopt.device import DeviceSpec
    from graphopt.packing import Scheme
    from graphopt.packing.formats import WeightFormat
    from graphopt.passes import Pass, PassContext
    from graphopt.program import Program
    from graphopt.report import PassRecord

__all__ = ["PluginHost", "default_host"]

T = TypeVar("T")
_FACADE = {
    "graphopt_passes": "passes",
    "graphopt_rules": "passes",
    "graphopt_kernels": "kernels",
    "graphopt_codecs": "codecs",
    "graphopt_schemes": "schemes",
    "graphopt_weight_formats": "weight_formats",
    "graphopt_stores": "stores",
    "graphopt_scorers": "scorers",
    "graphopt_share_scores": "share_scores",
    "graphopt_cache_scores": "cache_scores",
    "graphopt_tunables": "tunables",
    "graphopt_replacements": "replacements",
    "graphopt_policies": "policies",
    "graphopt_pipelines": "pipelines",
    "graphopt_cost_models": "cost_models",
    "graphopt_costs": "costs",
    "graphopt_devices": "devices",
    "graphopt_formats": "formats",
    "graphopt_commands": "commands",
}
_KIND = {
    "graphopt_passes": "pass",
    "graphopt_kernels": "kernel",
    "graphopt_pipelines": "pipeline",
    "graphopt_devices": "device",
    "graphopt_commands": "verb",
    "graphopt_policies": "policy",
    "graphopt_cost_models": "cost model",
    "graphopt_costs": "cost of operator",
    "graphopt_formats": "dump format",
    "graphopt_replacements": "replacement",
}
"""What is registered through the hooks whose records are used or looked into one by one."""

_Reader = Callable[[object], Iterator[tuple[str, T]]]


class PluginHost:
    """Plugins of the entry-point group ``graphopt.plugins`` and those given inline.

    Nothing is imported before the first question, and each hook is asked once. A plugin that
    cannot be imported, speaks another ``graphopt_api``, raises, or returns what its hook does not
    allow is recorded (``records()``) and the rest goes on; a hook counts whole or not at all.

    ``disabled`` defaults to the names in ``GRAPHOPT_DISABLE_PLUGINS`` (comma-separated, or
    ``all``); ``strict`` to ``GRAPHOPT_STRICT_PLUGINS=1``, which turns every such record into a
    ``PluginError``. An inline plugin that is no plugin raises either way: the caller named it.

    Code of a plugin that takes ``patience`` seconds is named on the log ``graphopt`` while it runs, and in
    ``PluginRecord.slow`` once it has ended.
    """

    def __init__(
        self,
        plugins: Sequence[object] = (),
        *,
        entry_points: Iterable[EntryPoint] | None = None,
        disabled: Iterable[str] | None = None,
        strict: bool | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._inline = tuple(plugins)
        self._entry_points = None if entry_points is None else tuple(entry_points)
        named = os.environ.get("GRAPHOPT_DISABLE_PLUGINS", "").split(",") if disabled is None else disabled
        self._disabled = frozenset(name.strip() for name in named if name.strip())
        self._strict = os.environ.get("GRAPHOPT_STRICT_PLUGINS") == "1" if strict is None else strict
        self._patience = patience
        self._registries: dict[str, Mapping[str, Registered[Any]]] = {}

    # --- what is registered ----------------------------------------------------------------

    def passes(self) -> Mapping[str, type[Pass]]:
        """Pass classes by name; rules that plugins give are a pass for each plugin, ``acme-rules``."""
        if "graphopt_passes" not in self._registries:
            found = self._ask("graphopt_passes", lambda plugin, given: read_passes(given), "pass")
            of_rules = self._ask(
                "graphopt_rules", lambda plugin, given: read_rules(given, plugin.name), "pass", found
            )
            self._registries["graphopt_rules"] = MappingProxyType(of_rules)
            self._registries["graphopt_passes"] = MappingProxyType({**found, **of_rules})
        return {name: registered.value for name, registered in self._registries["graphopt_passes"].items()}

    def kernels(self) -> Mapping[str, KernelSpec]:
        """Kernels by name."""
        return self._values("graphopt_kernels", read_records(KernelSpec), "kernel")

    def codecs(self) -> Mapping[str, CodecSpec]:
        """Codecs for saved values by name."""
        return self._values("graphopt_codecs", read_records(CodecSpec), "codec")

    def schemes(self) -> Mapping[str, type[Scheme]]:
        """Classes of ways to keep weights, by name."""
        return self._values("graphopt_schemes", read_schemes, "scheme")

    def weight_formats(self) -> Mapping[str, type[WeightFormat]]:
        """Classes of ways in which checkpoints hold packed weights, by name."""
        return self._values("graphopt_weight_formats", read_weight_formats, "weight format")

    def stores(self) -> Mapping[str, type[CacheStore]]:
        """Classes of ways to keep keys and values, by name; scores that they go by are known after it."""
        self.cache_scores()
        return self._values("graphopt_stores", read_stores, "store")

    def scorers(self) -> Mapping[str, ScorerSpec]:
        """Ways to say how much a packed weight is off, by name."""
        return self._values("graphopt_scorers", read_records(ScorerSpec), "scorer")

    def share_scores(self) -> Mapping[str, ShareScoreSpec]:
        """Ways to say what sharing keys and values costs, by name."""
        return self._values("graphopt_share_scores", read_records(ShareScoreSpec), "share score")

    def cache_scores(self) -> Mapping[str, CacheScoreSpec]:
        """Ways to say which keys to keep, by name; operators find them from here on."""
        return self._values("graphopt_cache_scores", read_cache_scores, "cache score")

    def tunables(self) -> Mapping[str, TunableSpec]:
        """Kernels whose launches can be tuned, by name."""
        return self._values("graphopt_tunables", read_records(TunableSpec), "tunable kernel")

    def replacements(self) -> Mapping[str, ReplacementSpec]:
        """What may run groups of operators of lowered graphs, by name."""
        return self._values("graphopt_replacements", read_records(ReplacementSpec), "replacement")

    def pipelines(self) -> Mapping[str, Traversable]:
        """Files of named pipelines."""
        return self._values("graphopt_pipelines", read_pipelines, "pipeline")

    def cost_models(self) -> Mapping[str, CostModelFactory]:
        """Cost models by name."""
        return self._values("graphopt_cost_models", read_records(CostModelFactory), "cost model")

    def costs(self) -> Mapping[str, OperatorCost]:
        """What operators of plugins take, by the operators' names."""
        return self._values("graphopt_costs", read_records(OperatorCost), "cost of operator")

    def devices(self) -> Mapping[str, DeviceSpec]:
        """Devices by name; ``device`` also knows their aliases."""
        from graphopt.device import DeviceSpec

        return self._values("graphopt_devices", read_records(DeviceSpec), "device")

    def policies(self) -> Mapping[str, PolicySpec]:
        """Ways to pick schedules, by name."""
        return self._values("graphopt_policies", read_records(PolicySpec), "policy")

    def formats(self) -> Mapping[str, DumpFormat]:
        """Dump formats by name."""
        return self._values("graphopt_formats", read_records(DumpFormat), "dump format")

    def commands(self) -> Mapping[str, Command]:
        """Verbs that plugins add to the command line."""
        return self._values("graphopt_commands", read_records(Command), "command")

    # --- by name ---------------------------------------------------------------------------

    def pass_class(self, name: str) -> type[Pass]:
        """The pass ``"fuse-moe"``, also spelled ``"acme/fuse-moe"`` with its plugin's name."""
        plugin, slash, bare = name.rpartition("/")
        found = self.passes().get(bare)
        if found is not None and (not slash or self.owner("graphopt_passes", bare).plugin == plugin):
            return found
        raise self._unknown("pass", name, self.passes())

    def device(self, name: str) -> DeviceSpec:
        """The device of that name or alias, in any case; raises ``UnknownNameError``."""
        wanted = name.lower()
        for spec in self.devices().values():
            if wanted in (spec.name.lower(), *(alias.lower() for alias in spec.aliases)):
                return spec
        raise self._unknown("device", name, self.devices())

    def codec(self, name: str) -> CodecSpec:
        """The codec of that name; raises ``UnknownNameError``."""
        try:
            return self.codecs()[name]
        except KeyError:
            raise self._unknown("codec", name, self.codecs()) from None

    def scheme(self, text: str) -> Scheme:
        """The scheme that ``"int4{group=64}"`` spells.

        Raises ``UnknownNameError`` (scheme, option), ``PipelineError`` for text that cannot be read and
        ``QuantizationError`` for options that the scheme cannot hold.
        """
        cls, options = self._spelled(text, "scheme", self.schemes())
        return cls.configured(**options)

    def weight_format(self, text: str) -> WeightFormat:
        """The format that ``"gptq{zeros=v2}"`` spells.

        Raises ``UnknownNameError`` (format, option), ``PipelineError`` for text that cannot be read and
        ``CheckpointError`` for options that the format cannot hold.
        """
        cls, options = self._spelled(text, "weight format", self.weight_formats())
        return cls.configured(**options)

    def scorer(self, name: str) -> ScorerSpec:
        """The scorer of that name; raises ``UnknownNameError``."""
        try:
            return self.scorers()[name]
        except KeyError:
            raise self._unknown("scorer", name, self.scorers()) from None

    def share_score(self, name: str) -> ShareScoreSpec:
        """The score of sharing of that name; raises ``UnknownNameError``."""
        try:
            return self.share_scores()[name]
        except KeyError:
            raise self._unknown("share score", name, self.share_scores()) from None

    def tunable(self, name: str) -> TunableSpec:
        """The tunable kernel of that name; raises ``UnknownNameError``."""
        try:
            return self.tunables()[name]
        except KeyError:
            raise self._unknown("tunable kernel", name, self.tunables()) from None

    def cost_model(self, name: str) -> CostModelFactory:
        """The cost model of that name; raises ``UnknownNameError``."""
        try:
            return self.cost_models()[name]
        except KeyError:
            raise self._unknown("cost model", name, self.cost_models()) from None

    def policy(self, name: str) -> PolicySpec:
        """The policy of that name, also spelled with its plugin's; raises ``UnknownNameError``."""
        plugin, slash, bare = name.rpartition("/")
        found = self.policies().get(bare)
        if found is not None and (not slash or self.owner("graphopt_policies", bare).plugin == plugin):
            return found
        raise self._unknown("policy", name, self.policies())

    def owner(self, hook: str, name: str) -> Registered[Any]:
        """Who registered ``name`` through ``hook``.

        The plugin is ``""`` where nobody did: a pass may come straight from Python.
        """
        getattr(self, _FACADE[hook])()
        return self._registries[hook].get(name, Registered(None, "", ""))

    # --- the plugins themselves ------------------------------------------------------------

    def records(self) -> tuple[PluginRecord, ...]:
        """Every plugin as it stands now; hooks that were not asked yet may still fail."""
        return tuple(plugin.record() for plugin in self._plugins)

    def sources(self) -> tuple[tuple[PluginRecord, frozenset[str]], ...]:
        """Every plugin as it stands now, with the modules that its hooks are of."""
        return tuple(
            (plugin.record(), frozenset(hook.function.__module__ for hook in plugin.hooks.values()))
            for plugin in self._plugins
        )

    def check(self) -> tuple[PluginRecord, ...]:
        """Ask every registration hook and look into what is registered, have a small model captured, then
        ``records()``."""
        from graphopt.plugins.diagnosis import diagnosed, probe_captures

        for ask in _FACADE.values():
            getattr(self, ask)()
        probe_captures(self)
        for hook, name, wrong in diagnosed(self):
            self.blame(hook, name, PluginError(f"{_KIND[hook]} {name!r}: {wrong}"))
        return self.records()

    # --- what they registered, in use --------------------------------------------------------

    def using(self, hook: str, name: str) -> AbstractContextManager[None]:
        """The block runs what was registered as ``name`` through ``hook``: its time is that plugin's."""
        plugin = self._registrant(hook, name)
        return nullcontext() if plugin is None else plugin.watched(f"{_KIND[hook]} {name!r}")

    def blame(self, hook: str, name: str, error: BaseException) -> str:
        """Record that what was registered as ``name`` through ``hook`` failed in use, and say so.

        Raises ``PluginError`` where the host is strict.
        """
        said = error.message if isinstance(error, PluginError) else f"raised {describe_error(error)}"
        what = f"{_KIND[hook]} {name!r}"
        what = said if said.startswith(what) else f"{what} {said}"
        plugin = self._registrant(hook, name)
        if plugin is None:
            return what
        if what not in plugin.error:
            plugin.status = "failed"
            plugin.error = f"{plugin.error}; {what}" if plugin.error else what
        if self._strict:
            raise PluginError(f"plugin {plugin} failed: {what}") from error
        return f"plugin {plugin}: {what}"

    def _registrant(self, hook: str, name: str) -> LoadedPlugin | None:
        wanted = self.owner(hook, name)
        same = (p for p in self._plugins if (p.name, p.distribution) == (wanted.plugin, wanted.distribution))
        return next(same, None)

    # --- capture ---------------------------------------------------------------------------

    def capture_hooks(self) -> tuple[CaptureHook, ...]:
        """Plugins that may capture a model, in the order in which they are asked: inline ones, which the
        caller named, come first."""
        having = [plugin for plugin in self._plugins if CaptureHook.NAME in plugin.hooks]
        having.sort(key=lambda plugin: plugin.distribution != INLINE)
        return tuple(
            CaptureHook(plugin, functools.partial(self._fail, plugin, CaptureHook.NAME)) for plugin in having
        )

    # --- observers -------------------------------------------------------------------------

    def notify_before(self, ctx: PassContext, step: Pass, program: Program) -> None:
        """Tell observers that ``step`` is about to look at ``program``."""
        self._notify("graphopt_before_pass", ctx=ctx, step=step, program=program)

    def notify_after(self, ctx: PassContext, step: Pass, program: Program, record: PassRecord) -> None:
        """Tell observers what came of ``step``. One that raises, or changes the program, is recorded and not
        told again."""
        self._notify("graphopt_after_pass", ctx=ctx, step=step, program=program, record=record)

    # --- inside ----------------------------------------------------------------------------

    @functools.cached_property
    def _plugins(self) -> list[LoadedPlugin]:
        found = self._entry_points
        if found is None:
            found = tuple(importlib.metadata.entry_points(group=GROUP))
        return load_plugins(
            found, self._inline, self._disabled, strict=self._strict, patience=self._patience
        )

    def _values(self, hook: str, read: _Reader[T], kind: str) -> Mapping[str, T]:
        if hook not in self._registries:
            asked = self._ask(hook, lambda plugin, given: read(given), kind)
            self._registries[hook] = MappingProxyType(asked)
        registry = cast("Mapping[str, Registered[T]]", self._registries[hook])
        return {name: registered.value for name, registered in registry.items()}

    def _ask(
        self,
        hook: str,
        read: Callable[[LoadedPlugin, object], Iterator[tuple[str, T]]],
        kind: str,
        taken: Mapping[str, Registered[T]] = MappingProxyType({}),
    ) -> dict[str, Registered[T]]:
        """What every plugin returns from ``hook``, by name; names that are ``taken`` count as registered."""
        registry: dict[str, Registered[T]] = {}
        for plugin in self._plugins:
            if hook not in plugin.hooks:
                continue
            try:
                new: dict[str, Registered[T]] = {}
                # Also what a generator does while it is read, and modules that are imported by name.
                with plugin.watched(hook):
                    for name, value in read(plugin, plugin.call(hook)):
                        first = registry.get(name) or new.get(name) or taken.get(name)
                        if first is not None:
                            raise PluginError(
                                f"{kind} {name!r} is registered twice: by {first.plugin!r} of "
                                f"{first.distribution} and by {plugin}"
                            )
                        new[name] = Registered(value, plugin.name, plugin.distribution)
            except GUARDED as error:
                self._fail(plugin, hook, error)
            else:
                registry.update(new)
        return registry

    def _spelled(self, text: str, kind: str, known: Mapping[str, T]) -> tuple[T, Mapping[str, Any]]:
        from graphopt.pipeline import parse_items

        items = parse_items(text, kind, kind)
        if len(items) != 1:
            raise PipelineError(f"expected one {kind}, got {text!r}")
        ((name, options),) = items
        if name not in known:
            raise self._unknown(kind, name, known)
        return known[name], options

    def _unknown(self, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """The error, with the plugins that could have brought the name and failed."""
        broken = [f"plugin {r.name!r} ({r.status}): {r.error}" for r in self.records() if r.error]
        return UnknownNameError(kind, name, known, note="; ".join(broken))

    def _notify(self, hook: str, **arguments: Any) -> None:
        for plugin in self._plugins:
            if hook in plugin.hooks and hook not in plugin.silenced:
                try:
                    with plugin.watched(hook):
                        self._observe(plugin, hook, **arguments)
                except GUARDED as error:
                    plugin.silenced.add(hook)
                    self._fail(plugin, hook, error)

    def _observe(self, plugin: LoadedPlugin, hook: str, program: Program, **arguments: Any) -> None:
        """Call an observer; a program that it changes is put back."""
        failed: BaseException | None = None
        with program.edit(hook) as edit:
            try:
                plugin.call(hook, program=program, **arguments)
            except GUARDED as error:
                failed = error
            if edit.differs:
                raise PluginError("it changed the program, which was put back: observers only look")
        if failed is not None:
            raise failed

    def _fail(self, plugin: LoadedPlugin, hook: str, error: BaseException) -> None:
        if isinstance(error, PluginError):
            what = f"{hook}: {error.message}"
        else:
            what = f"{hook} raised {describe_error(error)}"
        plugin.status = "failed"
        if what not in plugin.error:
            plugin.error = f"{plugin.error}; {what}" if plugin.error else what
        if self._strict:
            raise PluginError(f"plugin {plugin} failed: {what}") from error


@functools.cache
def default_host() -> PluginHost:
    """The installed plugins, loaded once per process on first use."""
    return PluginHost()
