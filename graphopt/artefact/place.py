"""Which machines an artefact runs on: those of the same kind as the one that it was written on."""

from __future__ import annotations

import platform

import torch

from graphopt.artefact.records import MadeFor
from graphopt.errors import ArtefactError

__all__ = ["check_place", "check_torch", "place_of"]


def place_of(device: torch.device) -> MadeFor:
    """The kind of machine that is here, for steps on ``device``."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if device.type != "cuda":
        return MadeFor(device.type, platform.machine(), vectors, "")
    major, minor = torch.cuda.get_device_capability(device)
    return MadeFor("cuda", f"{major}.{minor}", vectors, torch.cuda.get_device_name(device))


def check_place(made: MadeFor) -> list[str]:
    """Raise ``ArtefactError`` where steps of ``made`` do not run here; else what may differ, as notes."""
    if made.kind == "cuda" and not torch.cuda.is_available():
        raise ArtefactError(
            f"the artefact is for CUDA devices of capability {made.capability[:20]} ({made.name[:40]}), "
            "and there is none here",
            hint="optimize and save the model on the kind of machine that is to run it",
        )
    if made.kind not in ("cpu", "cuda"):
        raise ArtefactError(f"the artefact is for a device {made.kind[:40]!r}; expected cpu or cuda")
    here = place_of(torch.device(made.kind))
    if here.capability != made.capability:
        raise ArtefactError(
            f"the artefact is for {made.kind} of {made.capability[:40]}, this is {here.capability}",
            hint="optimize and save the model on the kind of machine that is to run it",
        )
    notes = []
    if here.kind == "cpu" and here.vectors != made.vectors:
        notes.append(
            f"saved on {made.vectors[:20]}, loaded on {here.vectors}: results may differ by rounding"
        )
    if here.name != made.name:
        notes.append(f"saved on {made.name[:40]}, loaded on {here.name}: predictions are for the former")
    return notes


def check_torch(made: str) -> None:
    """Raise ``ArtefactError`` unless torch is of the release that programs were traced with."""
    if _release(made) != _release(torch.__version__):
        raise ArtefactError(
            f"the artefact was made with torch {made[:40]}, this is {torch.__version__}: "
            "another release traces other programs",
            hint="save it again with this torch",
        )


def _release(text: str) -> list[str]:
    return text.partition("+")[0].split(".")[:2]
