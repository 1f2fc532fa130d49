"""What this package registers: devices, the roofline cost model, ``graphopt calibrate``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from graphopt.device import DeviceSpec
from graphopt.plugins import Command, CostModelFactory, hookimpl

if TYPE_CHECKING:
    import click

    from graphopt.cost import CostModel

__all__ = ["graphopt_api", "graphopt_commands", "graphopt_cost_models", "graphopt_devices"]

graphopt_api = 1


@hookimpl
def graphopt_devices() -> Iterable[DeviceSpec]:
    """The device table, calibrated figures on top."""
    # Imported when asked: it needs torch, and `graphopt --help` loads this module.
    from graphopt_cost_model.devices import load_devices

    return tuple(load_devices().values())


@hookimpl
def graphopt_cost_models() -> Iterable[CostModelFactory]:
    """The roofline model."""
    return (CostModelFactory("roofline", _roofline, "slowest resource per operator, plus launches"),)


@hookimpl
def graphopt_commands() -> Iterable[Command]:
    """``graphopt calibrate``."""
    return (Command("calibrate", "measure the present device and keep its figures", _calibrate),)


def _roofline(device: DeviceSpec) -> CostModel:
    from graphopt_cost_model.roofline import RooflineCostModel

    return RooflineCostModel(device)


def _calibrate() -> click.Command:
    from graphopt_cost_model.calibrate_command import command

    return command
