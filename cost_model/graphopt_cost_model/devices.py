"""Devices that the cost model knows: the table in ``devices/*.yaml``, with calibrated figures on top."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import torch
import yaml

from graphopt.device import DeviceSpec
from graphopt.errors import GraphoptError, UnknownNameError
from graphopt_cost_model.calibration_store import stored_calibrations

__all__ = ["DeviceFileError", "load_devices", "read_device", "resolve"]

SCHEMA = "graphopt/device@1"

_NUMBERS = {
    "memory_bytes": int,
    "copy_bytes_per_second": float,
    "read_bytes_per_second": float,
    "launch_seconds": float,
    "host_link_bytes_per_second": float,
    "allocation_granularity": int,
    "workspace_bytes": int,
    "allocator_slack_bytes": int,
    "multiprocessors": int,
}
_MAY_BE_ZERO = ("workspace_bytes", "allocator_slack_bytes", "multiprocessors")
_TABLES = ("matmul_flops", "vector_flops")
_SHARES = ("emitted_matmul_share", "emitted_attention_share")
"""Tables that devices may leave out: shares by dtype, of which none is above 1."""


class DeviceFileError(GraphoptError, ValueError):
    """A device file with a missing, unknown or impossible entry."""

    code = "device-file"


def load_devices(*, calibrated: bool = True) -> dict[str, DeviceSpec]:
    """Every known device by name; figures that ``graphopt calibrate`` stored replace the table's.

    Warns (``CalibrationWarning``) of stored figures that cannot be read and goes on without them.
    """
    table = dict(_table())
    if calibrated:
        for name, spec in stored_calibrations().items():
            # Not calibrated: a property of the kernels as much as of the device.
            known = table.get(name)
            shares = {share: getattr(known, share) if known is not None else {} for share in _SHARES}
            table[name] = replace(spec, **shares)
    return table


@functools.cache
def _table() -> Mapping[str, DeviceSpec]:
    folder = files("graphopt_cost_model") / "devices"
    specs = [read_device(file) for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def read_device(file: Traversable) -> DeviceSpec:
    """The device that a YAML file describes. Raises ``DeviceFileError`` naming file and entry."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DeviceFileError(f"{file.name} is not YAML: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise DeviceFileError(f"{file.name}: expected schema {SCHEMA!r}, got {found!r}")
    figures = (*_NUMBERS, *_TABLES, *(name for name in _SHARES if name in data))
    known = {"schema", "name", "kind", "aliases", "sources", *_SHARES, *figures}
    for entry in data:
        if entry not in known:
            raise DeviceFileError(f"{file.name}: {UnknownNameError('entry', str(entry), known).message}")
    for entry in ("name", "kind", "sources", *figures):
        if entry not in data:
            raise DeviceFileError(f"{file.name}: entry {entry!r} is missing")
    sources = data["sources"]
    for entry in figures:
        if not isinstance(sources, dict) or not str(sources.get(entry, "")).strip():
            raise DeviceFileError(
                f"{file.name}: {entry!r} has no source", hint="say where the figure is from"
            )
    values: dict[str, Any] = {
        name: kind(_positive(file, name, data[name])) for name, kind in _NUMBERS.items()
    }
    for name in _TABLES:
        rates = data[name]
        if not isinstance(rates, dict) or "float32" not in rates:
            raise DeviceFileError(f"{file.name}: {name!r} needs at least a rate for 'float32'")
        values[name] = {str(dtype): _positive(file, name, rate) for dtype, rate in rates.items()}
    for name in _SHARES:
        shares = data.get(name, {})
        if not isinstance(shares, dict):
            raise DeviceFileError(f"{file.name}: {name!r} needs a share for each dtype")
        values[name] = {str(dtype): _positive(file, name, share) for dtype, share in shares.items()}
        if any(share > 1 for share in values[name].values()):
            raise DeviceFileError(f"{file.name}: a share in {name!r} is above 1")
    return DeviceSpec(
        name=str(data["name"]),
        kind=str(data["kind"]),
        aliases=tuple(map(str, data.get("aliases", ()))),
        source="; ".join(f"{name}: {sources[name]}" for name in figures),
        **values,
    )


def _positive(file: Traversable, name: str, value: Any) -> float:
    """YAML reads ``1.0e12`` as text (YAML 1.1 wants a sign in the exponent), so text counts too."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DeviceFileError(f"{file.name}: {name!r} is no number: {value!r}") from None
    if number < 0 or (number == 0 and name not in _MAY_BE_ZERO):
        raise DeviceFileError(f"{file.name}: {name!r} must be positive, got {value!r}")
    return number


def resolve(device: str | torch.device | None = None) -> DeviceSpec:
    """The spec of a device by name or alias, of a torch device, or of the present machine (``None``).

    A CUDA device is recognised by the name that its driver reports, which must be an alias as it
    stands: other boards of the same chip differ in memory and clocks. Raises ``UnknownNameError``
    for a name, or a present device, that the table does not have.
    """
    known = load_devices()
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    wanted = device.lower()
    for spec in known.values():
        if wanted in (spec.name.lower(), *(alias.lower() for alias in spec.aliases)):
            return spec
    raise UnknownNameError("device", device, known)
