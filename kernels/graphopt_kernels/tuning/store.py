"""What tuning found, as files: shipped with the package, and in the user's cache folder.

One JSON file for each model of device, an entry a line. An entry says which kernel it is of and for which
problem, on which device, under which versions of torch and triton and for which code of the kernel it was
measured; it counts only where all of these are the same. ``configuration`` is ``null`` where nothing beat the
default. Files are replaced whole. One that is truncated, foreign or from another version is left out with a
``TuningWarning`` that says why.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from graphopt.atomic import write_atomically
from graphopt.cache_folder import cache_folder, file_stem, lent_tuning
from graphopt.record_json import RecordFormatError, decode, encode
from graphopt_kernels.tuning.warning import TuningWarning

__all__ = [
    "Entry",
    "all_entries",
    "cached_file",
    "code_of",
    "read_entries",
    "shipped_file",
    "stored_entries",
    "versions",
    "write_entries",
]

SCHEMA = "graphopt/tuning@1"
_SHIPPED = files("graphopt_kernels").joinpath("tuning", "results")


@dataclass(frozen=True)
class Entry:
    """The outcome of one tuning. Problem and configuration are as ``fields_text`` writes them; the latter is
    ``None`` where nothing beat the default. ``default_us`` and ``us``: microseconds of the default and of
    what was chosen."""

    kernel: str
    problem: str
    device: str
    torch: str
    triton: str
    code: str
    configuration: str | None
    default_us: float
    us: float

    @property
    def subject(self) -> tuple[str, ...]:
        """What a newer entry takes the place of this one for: code is only ever the present one."""
        return self.kernel, self.problem, self.device, self.torch, self.triton


def versions() -> tuple[str, str]:
    """Major and minor version of torch and of triton, ``"none"`` without."""
    return _version("torch"), _version("triton")


@functools.cache
def _version(package: str) -> str:
    try:
        return ".".join(version(package).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return "none"


@functools.cache
def code_of(sources: tuple[str, ...]) -> str:
    """A hash of the code of some modules; comments, layout and docstrings of it do not count.

    They are not imported. Raises ``ModuleNotFoundError``.
    """
    digest = hashlib.sha256()
    for name in sources:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no source of {name!r}", name=name)
        digest.update(_code(Path(spec.origin).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def shipped_file(device: str) -> Traversable:
    """The package's own results for a device, as ``device_text`` names it; it need not be there."""
    return _SHIPPED.joinpath(_name(device))


def cached_file(device: str) -> Path:
    """The user's results for a device; it need not be there."""
    return cache_folder() / "tuning" / _name(device)


def _name(device: str) -> str:
    return f"{file_stem(device.partition(',')[0])}.json"


def stored_entries(device: str) -> list[Entry]:
    """The entries for a device: the shipped ones, those of artefacts, the user's, which count most."""
    known = _read(
        (shipped_file(device), *(folder / _name(device) for folder in lent_tuning()), cached_file(device))
    )
    return [entry for entry in known if entry.device == device]


def all_entries() -> list[Entry]:
    """The entries for every device, in the same order."""
    paths: list[Path | Traversable] = []
    for folder in (_SHIPPED, cache_folder() / "tuning"):
        if folder.is_dir():
            paths += sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return _read(paths)


def _read(paths: Iterable[Path | Traversable]) -> list[Entry]:
    known: list[Entry] = []
    for path in paths:
        try:
            known += read_entries(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(
                f"ignoring the results of tuning in {path}: {error}; run 'graphopt tune' again",
                TuningWarning,
                stacklevel=3,
            )
    return known


def read_entries(path: Path | Traversable) -> list[Entry]:
    """The entries of a file. Raises ``OSError``, or ``ValueError`` for one that is none of this version."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RecordFormatError(f"expected schema {SCHEMA!r}")
    listed = data.get("entries")
    if not isinstance(listed, list):
        raise RecordFormatError("expected a list of entries")
    entries = [decode(Entry, item, where=f"entries[{number}]") for number, item in enumerate(listed)]
    for number, entry in enumerate(entries):
        for name, value in (("default_us", entry.default_us), ("us", entry.us)):
            if not (value > 0 and math.isfinite(value)):
                raise RecordFormatError(f"entries[{number}].{name} is {value}")
    return entries


def write_entries(path: Path, new: Iterable[Entry]) -> None:
    """Put ``new`` into the file at ``path`` in place of older entries for the same; the rest stays.

    A file that cannot be read is replaced, with a ``TuningWarning``. Raises ``OSError`` where the folder
    cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[Entry] = []
    try:
        kept = read_entries(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"replacing {path}: {error}", TuningWarning, stacklevel=2)
    merged = {entry.subject: entry for entry in (*kept, *new)}
    write_atomically(path, _document(sorted(merged.values(), key=lambda entry: entry.subject)))


def _document(entries: Sequence[Entry]) -> str:
    lines = ",\n".join(f"  {json.dumps(encode(entry))}" for entry in entries)
    body = f"[\n{lines}\n ]" if lines else "[]"
    return f'{{\n "schema": "{SCHEMA}",\n "entries": {body}\n}}\n'
