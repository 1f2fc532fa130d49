"""A folder that reproduces a failure with one command: ``python repro.py``.

::

    repro.py             runs the step, says whether it fails, exits 1 if so
    pipeline.yaml        the passes that it takes
    rewrites.txt         the rewrites that it takes, one a line
    repro_model.py       the captured program as a model, and tensors.json what its tensors are like
    tensors.safetensors  the tensors themselves, only where asked for
    env.json             versions, plugins, flags, and what was seen

A model that cannot be written down alone is named by its target instead.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from graphopt.cli.repro_model import NotAlone, model_source, tensor_notes
from graphopt.cli.trial import Trial
from graphopt.errors import GraphoptError
from graphopt.passes import Pass, pass_options
from graphopt.pipeline import Pipeline

if TYPE_CHECKING:
    from graphopt.plugins import PluginHost

__all__ = ["ReproError", "Reproduction", "write_folder"]

REPRO_VERSION = "graphopt/repro@1"
_ENTRY = "repro_model:make"


class ReproError(GraphoptError):
    """A failure that no folder reproduces in a process of its own."""

    code = "repro"


@dataclass(frozen=True)
class Reproduction:
    """A folder that was checked: ``alone`` if it needs no code of the model, ``passes`` of its pipeline, and
    ``said`` what it prints. ``note``: why the model is not in it."""

    folder: Path
    alone: bool
    passes: tuple[str, ...]
    said: str
    note: str = ""


_SCRIPT = '''\
"""{title}

Run `python repro.py`: exits 1 where it fails as it did, 0 where it does not, 2 where it cannot tell.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ["GRAPHOPT_CACHE"] = "0"
sys.path[:0] = {path}
os.chdir(HERE)

from graphopt.cli.trial import Trial

TARGET = {target!r}
OPTIONS = {options}
RTOL = {rtol!r}

if __name__ == "__main__":
    rewrites = Path("rewrites.txt").read_text(encoding="utf-8").split()
    ran = Trial(TARGET, OPTIONS, RTOL).run(rewrites)
    gone = sorted(set(rewrites) - (ran.chosen if ran.chosen is not None else set(rewrites)))
    if gone:
        print(f"cannot tell: {{', '.join(gone)}} cannot be applied here")
        sys.exit(2)
    print(f"{{ran.outcome}}: {{ran.why}}" if ran.why else ran.outcome)
    sys.exit({{"fails": 1, "passes": 0, "untested": 2}}[ran.outcome])
'''


def write_folder(
    folder: Path, trial: Trial, rewrites: Sequence[str], *, fails: bool, why: str, weights: bool
) -> Reproduction:
    """Write ``folder``, which must not exist, and run it: it is kept only if it does what was seen.

    ``fails``: whether the rewrites fail together, with ``why``. Tried in turn are the model alone and the
    model by its target, each with the passes of the rewrites, then with the whole pipeline. Raises
    ``ReproError`` if none does the same.
    """
    from graphopt.plugins import default_host

    if folder.exists():
        raise ReproError(f"{folder} is there already", hint="name another folder with -o, or remove it")
    host = default_host()
    whole = Pipeline.of(trial.options["pipeline"], host)
    named = {part for name in rewrites for part in (name.split("/")[0], name.split("/")[1])}
    small = Pipeline(tuple(step for step in whole.passes if step.mandatory or step.name in named))
    alone, note = _alone(trial, weights)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    said = ""
    for files, pipeline in _attempts(alone, small, whole):
        temporary.mkdir()
        try:
            _fill(temporary, trial, rewrites, files, pipeline, host, why)
            done = subprocess.run(
                [sys.executable, "repro.py"], cwd=temporary, capture_output=True, text=True, check=False
            )
            said = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
            # An exit code alone would take any traceback for the failure.
            if done.stdout.startswith("fails" if fails else "passes"):
                shutil.rmtree(temporary / "__pycache__", ignore_errors=True)
                os.replace(temporary, folder)
                names = tuple(step.name for step in pipeline.passes)
                return Reproduction(folder, files is not None, names, said, "" if files else note)
            note = f"by itself it {said}" if files is not None else note
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise ReproError(f"no folder does the same in a process of its own: the last one said {said!r}")


def _attempts(
    alone: dict[str, Any] | None, small: Pipeline, whole: Pipeline
) -> Iterator[tuple[dict[str, Any] | None, Pipeline]]:
    for files in (alone, None) if alone is not None else (None,):
        yield files, small
        if small.passes != whole.passes:
            yield files, whole


def _alone(trial: Trial, weights: bool) -> tuple[dict[str, Any] | None, str]:
    """Files that make the model again, or why there are none."""
    from graphopt.api import dry_run
    from graphopt.cli.target import load_target, step_mode
    from graphopt.program import Level

    with step_mode(trial.options["infer"]):
        loaded = load_target(trial.target)
        # Op by op the program is one, whatever code generators make segments of.
        given = {"pipeline": (), "emit": "eager", "device": trial.options["device"]}
        captured = dry_run(loaded.model, loaded.inputs, given, "repro")
    programs = [p for p in captured.programs if p.level is Level.SEMANTIC]
    try:
        if len(programs) != 1:
            raise NotAlone(f"it is captured as {len(programs)} programs")
        (program,) = programs
        source = model_source(program, training=loaded.model.training)
        notes, values = tensor_notes(program, loaded.model, loaded.inputs)
    except NotAlone as error:
        return None, str(error)
    return {"source": source, "notes": notes, "values": values if weights else None}, ""


def _fill(
    folder: Path,
    trial: Trial,
    rewrites: Sequence[str],
    files: dict[str, Any] | None,
    pipeline: Pipeline,
    host: PluginHost,
    why: str,
) -> None:
    from graphopt.report import Environment
    from graphopt.tensors_file import write_tensors

    options = {**trial.options, "pipeline": "pipeline.yaml"}
    path = [os.path.abspath(entry) for entry in (os.getcwd(),)] if files is None else []
    if files is not None:
        # What was lost is the loss: the captured program returns its value, or what it is computed from.
        options["loss"] = None
        (folder / "repro_model.py").write_text(files["source"], encoding="utf-8")
        (folder / "tensors.json").write_text(json.dumps(files["notes"], indent=1), encoding="utf-8")
        if files["values"] is not None:
            write_tensors(folder / "tensors.safetensors", files["values"])
    steps = [_step(step) for step in pipeline.passes]
    text = yaml.safe_dump({"schema": "graphopt/pipeline@1", "passes": steps}, sort_keys=False)
    (folder / "pipeline.yaml").write_text(text, encoding="utf-8")
    (folder / "rewrites.txt").write_text("".join(f"{name}\n" for name in rewrites), encoding="utf-8")
    title = f"Fails: {why}" if why else f"Applies {', '.join(rewrites) or 'no rewrite'}."
    spelled = "{\n" + "".join(f"    {key!r}: {value!r},\n" for key, value in options.items()) + "}"
    script = _SCRIPT.format(
        title=title.replace('"""', "'''").replace("\\", "/"),
        path=repr([*path, "."]),
        target=_ENTRY if files is not None else trial.target,
        options=spelled,
        rtol=trial.rtol,
    )
    (folder / "repro.py").write_text(script, encoding="utf-8")
    seen = {
        "schema": REPRO_VERSION,
        "environment": vars(_environment(Environment)),
        "plugins": [f"{p.name} {p.distribution} {p.version}".strip() for p in host.records()],
        "target": trial.target,
        "options": trial.options,
        "rtol": trial.rtol,
        "why": why,
    }
    (folder / "env.json").write_text(json.dumps(seen, indent=1, default=str), encoding="utf-8")


def _environment(kind: Any) -> Any:
    import platform

    import torch

    import graphopt

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return kind(torch.__version__, platform.python_version(), graphopt.__version__, device)


def _step(step: Pass) -> Any:
    options = {
        name: _plain(getattr(step, name))
        for name, default in pass_options(type(step)).items()
        if getattr(step, name) != default
    }
    return {"use": step.name, "with": options} if options else step.name


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
