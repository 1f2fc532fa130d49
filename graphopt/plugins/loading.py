"""Find plugins, import them and read their hooks: one plugin's failure is that plugin's alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from graphopt.errors import PluginError, nearest
from graphopt.plugins.hookspecs import API_VERSION, GROUP, HookSpecs
from graphopt.plugins.records import PluginRecord, Status
from graphopt.plugins.watch import PATIENCE_SECONDS, watched

__all__ = ["GUARDED", "INLINE", "LoadedPlugin", "describe_error", "load_plugins"]

GUARDED = (Exception, SystemExit)
"""What a plugin may throw without taking the host down; some call ``sys.exit`` on import."""

INLINE = "inline"
_OWN = "graphopt"


@dataclass
class LoadedPlugin:
    """A plugin on the way through the host. ``hooks`` maps hook names to their functions."""

    name: str
    distribution: str
    version: str
    status: Status = "active"
    error: str = ""
    hooks: dict[str, pluggy.HookImpl] = field(default_factory=dict)
    silenced: set[str] = field(default_factory=set)
    slow: list[str] = field(default_factory=list)
    patience: float = PATIENCE_SECONDS

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call one hook with those of the arguments that its function names."""
        implementation = self.hooks[hook]
        return implementation.function(*(arguments[name] for name in implementation.argnames))

    def watched(self, what: str) -> AbstractContextManager[None]:
        """The block is code of this plugin: if it takes long, the plugin is named, and ``slow`` says so."""
        if self.distribution == _OWN:
            # The report times graphopt's own passes; there is nobody else to name.
            return nullcontext()
        return watched(f"plugin {self}: {what}", self.patience, lambda text: self._note(what, text))

    def _note(self, what: str, text: str) -> None:
        said = text.removeprefix(f"plugin {self}: ")
        # What is called again and again is told once.
        if all(not known.startswith(f"{what} took") for known in self.slow):
            self.slow.append(said)

    def record(self) -> PluginRecord:
        return PluginRecord(
            self.name,
            self.distribution,
            self.version,
            self.status,
            self.error,
            tuple(sorted(self.hooks)),
            tuple(self.slow),
        )

    def __str__(self) -> str:
        return f"{self.name!r} of {self.distribution}"


def load_plugins(
    entry_points: Iterable[EntryPoint],
    inline: Sequence[object],
    disabled: frozenset[str],
    *,
    strict: bool,
    patience: float = PATIENCE_SECONDS,
) -> list[LoadedPlugin]:
    """Every plugin of the entry points and then the inline ones, failed and disabled included.

    graphopt's own come first, then by distribution and name, so that the order does not depend on
    the order of installation. Raises ``PluginError`` for an inline plugin that is not one (the
    caller named it), and with ``strict`` for any plugin that fails to load.
    """
    manager = pluggy.PluginManager("graphopt")
    manager.add_hookspecs(HookSpecs)
    plugins: list[LoadedPlugin] = []
    by_name: dict[str, LoadedPlugin] = {}

    def load(plugin: LoadedPlugin, get: Callable[[], object], *, required: bool) -> None:
        plugins.append(plugin)
        if plugin.name in disabled or "all" in disabled:
            plugin.status = "disabled"
        elif (twin := by_name.get(plugin.name)) is not None:
            plugin.status = "failed"
            plugin.error = (
                f"plugin {plugin.name!r} is registered twice: by distribution {twin.distribution} and by "
                f"distribution {plugin.distribution}; the first counts"
            )
        else:
            by_name[plugin.name] = plugin
            _read_hooks(manager, plugin, get)
        if plugin.error and required:
            raise PluginError(f"plugin {plugin} ({plugin.status}): {plugin.error}")

    unique = {(_distribution(e), e.name, e.value): e for e in entry_points}
    for entry in sorted(unique.values(), key=lambda e: (_distribution(e) != _OWN, _distribution(e), e.name)):
        version = entry.dist.version if entry.dist is not None else ""
        plugin = LoadedPlugin(entry.name, _distribution(entry), version, patience=patience)
        load(plugin, entry.load, required=strict)
    for given in inline:
        name = str(getattr(given, "__name__", type(given).__name__))
        plugin = LoadedPlugin(name, INLINE, "", patience=patience)
        load(plugin, lambda given=given: given, required=True)  # type: ignore[misc]

    for name in sorted(disabled - {"all"} - {plugin.name for plugin in plugins}):
        close = nearest(name, [plugin.name for plugin in plugins])
        error = "no plugin of that name" + (f"; did you mean {close!r}?" if close else "")
        if strict:
            raise PluginError(f"cannot disable {name!r}: {error}")
        plugins.append(LoadedPlugin(name, "GRAPHOPT_DISABLE_PLUGINS", "", "disabled", error))
    return plugins


def describe_error(error: BaseException) -> str:
    """``ImportError: No module named 'acme'``, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _read_hooks(manager: pluggy.PluginManager, plugin: LoadedPlugin, get: Callable[[], object]) -> None:
    """Fill ``plugin.hooks``, or its status and error."""
    try:
        with plugin.watched("its import"):
            found = get()
        version = getattr(found, "graphopt_api", None)
        if version != API_VERSION:
            plugin.status = "incompatible"
            plugin.error = (
                f"graphopt_api is {version}, this graphopt has {API_VERSION}"
                if version is not None
                else f"graphopt_api is missing; a plugin for this graphopt sets graphopt_api = {API_VERSION}"
            )
            return
        _check_names(manager, found)
        manager.register(found, name=plugin.name)
        for caller in manager.get_hookcallers(found) or ():
            for implementation in caller.get_hookimpls():
                if implementation.plugin is found:
                    if implementation.hookwrapper or implementation.wrapper:
                        raise PluginError(f"{caller.name} is a wrapper; hooks return records")
                    plugin.hooks[caller.name] = implementation
    except GUARDED as error:
        plugin.status, plugin.hooks = "failed", {}
        plugin.error = error.message if isinstance(error, PluginError) else describe_error(error)


def _check_names(manager: pluggy.PluginManager, found: object) -> None:
    """A marked function that no hook is named after, or a hook without the mark, is a mistake."""
    known = [name for name in dir(HookSpecs) if name.startswith("graphopt_")]
    for name in dir(found):
        marked = manager.parse_hookimpl_opts(found, name) is not None
        if marked and name not in known:
            close = nearest(name, known)
            raise PluginError(f"there is no hook {name!r}" + (f"; did you mean {close!r}?" if close else ""))
        if not marked and name in known:
            raise PluginError(f"{name} is not marked with @graphopt.hookimpl")
    if not any(name in known for name in dir(found)):
        raise PluginError(f"it implements no hook of the group {GROUP}")
