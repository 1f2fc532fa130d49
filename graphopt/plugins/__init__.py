"""Plugins: what one may add, and the host that loads, checks and isolates them."""

from __future__ import annotations

from graphopt.plugins.hookspecs import API_VERSION, GROUP, hookimpl
from graphopt.plugins.host import PluginHost, default_host
from graphopt.plugins.records import (
    CacheScoreSpec,
    Capture,
    CaptureInputs,
    CaptureOptions,
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

__all__ = [
    "API_VERSION",
    "GROUP",
    "CacheScoreSpec",
    "Capture",
    "CaptureInputs",
    "CaptureOptions",
    "CodecSpec",
    "Command",
    "CostModelFactory",
    "DumpFormat",
    "KernelSpec",
    "OperatorCost",
    "PluginHost",
    "PluginRecord",
    "PolicySpec",
    "Registered",
    "ReplacementSpec",
    "ScorerSpec",
    "ShareScoreSpec",
    "TunableSpec",
    "default_host",
    "hookimpl",
]
