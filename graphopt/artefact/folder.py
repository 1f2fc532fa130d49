"""The files of an artefact: a folder that is written whole or not at all, and read with every hash checked.

::

    model.graphopt/
      artefact.json           versions, device, operators, size and hash of every other file
      programs.json           graphs, schedules, calls, arguments and results
      report.json             the report, its plan included
      memory.json             what holds the peak, and the curve of peak against time
      weights.safetensors     parameters, buffers, constants; each tensor once
      tuning/NAME.json        tuned launches of kernels on the device
      kernels/NAME.py         sources of generated kernels, to be read; they are never run
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphopt.errors import ArtefactError

__all__ = ["MANIFEST", "SCHEMA", "WEIGHTS", "Folder", "is_artefact", "written"]

SCHEMA = "graphopt/artefact@2"
_READ = ("graphopt/artefact@1", SCHEMA)
"""Formats that are read. The first holds one step, its parts beside the graphs (``contents.py``)."""

MANIFEST = "artefact.json"
WEIGHTS = "weights.safetensors"

_FILE = re.compile(
    r"(?:programs\.json|report\.json|memory\.json|weights\.safetensors|tuning/\w[\w.+-]*\.json|kernels/\w+\.py)\Z",
    re.ASCII,
)
_AGAIN = "save it again with Optimized.save(path)"


def is_artefact(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder with the first file of an artefact, loadable or not."""
    return (Path(path) / MANIFEST).is_file()


@contextmanager
def written(
    path: str | os.PathLike[str], facts: Mapping[str, Any], *, schema: str = SCHEMA
) -> Iterator[Path]:
    """A fresh folder to put files in, which becomes ``path`` once the block is left without an error.

    ``facts`` go into the manifest with the hashes of the files, ``schema`` is their format. An artefact that
    is at ``path`` is replaced. Raises ``ArtefactError`` for anything else that is there, and ``OSError``.
    """
    target = Path(path)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    # Not tempfile: it makes folders that only their owner may read, and the rename would keep that.
    made, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("tmp", "old"))
    made.mkdir()
    try:
        yield made
        files = {
            str(file.relative_to(made).as_posix()): {
                "bytes": file.stat().st_size,
                "sha256": _file_hash(file),
            }
            for file in sorted(made.rglob("*"))
            if file.is_file()
        }
        manifest = {"schema": schema, **facts, "files": files}
        text = json.dumps({**manifest, "sha256": _manifest_hash(manifest)}, indent=1)
        (made / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if target.exists():
            os.rename(target, old)
        os.rename(made, target)
    finally:
        # Whatever ended this between the two, an interrupt as well: what was there is there again.
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not os.path.lexists(target):
        return
    kind = "a link" if target.is_symlink() else "no folder" if not target.is_dir() else ""
    if kind:
        raise ArtefactError(f"{target} is there and is {kind}", hint="name a folder that is not there yet")
    there = {file.relative_to(target).as_posix() for file in target.rglob("*") if not file.is_dir()}
    if not there:
        return
    foreign = sorted(name for name in there if name != MANIFEST and not _FILE.match(name))
    if MANIFEST not in there or foreign:
        raise ArtefactError(
            f"{target} holds {(foreign or sorted(there))[0]}, which is of no artefact: it is not overwritten",
            hint="name a folder that is not there yet, or one that Optimized.save wrote",
        )


class Folder:
    """The files of an artefact at ``path``, all of them there and as they were written.

    ``facts``: what the manifest says, ``schema`` its format. Raises ``ArtefactError`` for a folder that is
    none, one of a newer format, and one in which a file is missing, truncated, changed or not named;
    ``OSError`` as ``open``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_artefact(self.path):
            what = "is not there" if not self.path.exists() else f"has no {MANIFEST}"
            raise ArtefactError(
                f"{self.path} {what}: it is no artefact", hint="write one with Optimized.save"
            )
        self.facts = self._manifest()
        self.schema: str = self.facts["schema"]
        files = self.facts.get("files")
        if not isinstance(files, dict):
            raise ArtefactError(f"{self.path}: {MANIFEST} names no files", hint=_AGAIN)
        for name, entry in files.items():
            self._check(name, entry)
        self.files = tuple(files)

    def json(self, name: str) -> Any:
        """What is in one of the files of JSON. Raises ``ArtefactError`` where it is none."""
        if name not in self.files:
            raise ArtefactError(f"{self.path} has no {name}", hint=_AGAIN)
        return _parsed(self.path / name)

    def _manifest(self) -> dict[str, Any]:
        self._check_plain(MANIFEST)
        found = _parsed(self.path / MANIFEST)
        schema = found.get("schema") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(schema, str) or not schema.startswith("graphopt/"):
            raise ArtefactError(f"{self.path}: {MANIFEST} is none of graphopt's", hint=_AGAIN)
        if schema not in _READ:
            made, known = str(found.get("graphopt", ""))[:20], " and ".join(map(repr, _READ))
            raise ArtefactError(
                f"{self.path} has format {schema[:40]!r}, this graphopt reads {known}",
                hint=f"it was written by graphopt {made}: load it with that" if made else _AGAIN,
            )
        claimed = found.pop("sha256", None)
        if claimed != _manifest_hash(found):
            raise ArtefactError(f"{self.path}: {MANIFEST} was changed: its hash is another", hint=_AGAIN)
        return found

    def _check(self, name: str, entry: Any) -> None:
        if not _FILE.match(name):
            raise ArtefactError(f"{self.path} names the file {name[:80]!r}, which is of no artefact")
        if not isinstance(entry, dict) or sorted(entry) != ["bytes", "sha256"]:
            raise ArtefactError(f"{self.path}: what is said of {name} is malformed", hint=_AGAIN)
        self._check_plain(name)
        size = (self.path / name).stat().st_size
        if size != entry["bytes"]:
            raise ArtefactError(
                f"{self.path}: {name} has {size:,} bytes, not the {str(entry['bytes'])[:20]} written: "
                "it was truncated or changed",
                hint=_AGAIN,
            )
        if _file_hash(self.path / name) != entry["sha256"]:
            raise ArtefactError(f"{self.path}: {name} was changed: its hash is another", hint=_AGAIN)

    def _check_plain(self, name: str) -> None:
        try:
            mode = os.lstat(self.path / name).st_mode
        except FileNotFoundError:
            raise ArtefactError(f"{self.path}: {name} is missing", hint=_AGAIN) from None
        if not stat.S_ISREG(mode):
            raise ArtefactError(f"{self.path}: {name} is no plain file")


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no JSON: {type(error).__name__}: {error}", hint=_AGAIN) from None


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
