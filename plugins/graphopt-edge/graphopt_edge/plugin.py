"""What this plugin registers. Nothing here imports torch: ``graphopt --help`` loads this module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from graphopt import DeviceSpec
from graphopt.plugins import CostModelFactory, DumpFormat, hookimpl

if TYPE_CHECKING:
    from graphopt.cost import CostModel

__all__ = ["graphopt_api", "graphopt_cost_models", "graphopt_devices", "graphopt_formats"]

graphopt_api = 1


@hookimpl
def graphopt_devices() -> Iterable[DeviceSpec]:
    from graphopt_edge.devices import DEVICES

    return DEVICES


@hookimpl
def graphopt_cost_models() -> Iterable[CostModelFactory]:
    return [CostModelFactory("serial", _serial, "computes and moves bytes one after the other")]


@hookimpl
def graphopt_formats() -> Iterable[DumpFormat]:
    from graphopt_edge.table import write

    return [DumpFormat("csv", ".csv", write, "a row for each call, for spreadsheets")]


def _serial(device: DeviceSpec) -> CostModel:
    from graphopt_edge.serial import SerialCostModel

    return SerialCostModel(device)
