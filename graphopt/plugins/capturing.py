"""Asking one plugin to capture a model: its answer, its time and its failures are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphopt.plugins.loading import LoadedPlugin

if TYPE_CHECKING:
    import torch

    from graphopt.plugins.records import CaptureInputs, CaptureOptions

__all__ = ["CaptureHook"]


@dataclass(frozen=True)
class CaptureHook:
    """The hook ``graphopt_capture`` of one plugin. ``refuse(error)`` records that it failed, and raises
    ``PluginError`` where the host is strict."""

    NAME: ClassVar[str] = "graphopt_capture"

    plugin: LoadedPlugin
    refuse: Callable[[BaseException], None]

    def ask(self, model: torch.nn.Module, inputs: CaptureInputs, options: CaptureOptions) -> object:
        """What the plugin returns. Raises what it raises; time is watched."""
        with self.plugin.watched(self.NAME):
            return self.plugin.call(self.NAME, model=model, inputs=inputs, options=options)

    def __str__(self) -> str:
        return f"plugin {self.plugin}"
