"""Where calibrated figures live: one JSON file for each device in the user's cache folder.

Files are replaced whole; one that is truncated, foreign or from another version is left out with a warning
that says why.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

from graphopt.atomic import write_atomically
from graphopt.cache_folder import cache_folder, file_stem
from graphopt.device import DeviceSpec
from graphopt.record_json import RecordFormatError, decode, encode

__all__ = ["CalibrationWarning", "cache_folder", "store_calibration", "stored_calibrations"]

SCHEMA = "graphopt/calibration@1"


class CalibrationWarning(UserWarning):
    """Stored figures that were left out, or a kernel that was measured without, and why."""


def store_calibration(spec: DeviceSpec) -> Path:
    """Write the figures of a device where later runs find them; the path written.

    Raises ``OSError`` where the cache folder cannot be written.
    """
    folder = cache_folder() / "devices"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(spec.name)}.json"
    write_atomically(path, json.dumps({"schema": SCHEMA, "device": encode(spec)}, indent=2) + "\n")
    return path


def stored_calibrations() -> dict[str, DeviceSpec]:
    """Stored figures by device name. Unreadable files are skipped with a ``CalibrationWarning``."""
    found: dict[str, DeviceSpec] = {}
    for path in sorted((cache_folder() / "devices").glob("*.json")):
        try:
            spec = _read(path)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"ignoring calibrated figures in {path}: {error}; run 'graphopt calibrate' again",
                CalibrationWarning,
                stacklevel=2,
            )
            continue
        found[spec.name] = spec
    return found


def _read(path: Path) -> DeviceSpec:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RecordFormatError(f"expected schema {SCHEMA!r}")
    spec = decode(DeviceSpec, data.get("device"))
    rates = {"copy": spec.copy_bytes_per_second, "read": spec.read_bytes_per_second}
    rates |= {"host link": spec.host_link_bytes_per_second}
    for table, values in (("matmul", spec.matmul_flops), ("vector", spec.vector_flops)):
        if "float32" not in values:
            raise RecordFormatError(f"the {table} rates lack float32")
        rates |= {f"{table} {dtype}": rate for dtype, rate in values.items()}
    for name, rate in rates.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise RecordFormatError(f"the {name} rate is {rate}")
    return spec
