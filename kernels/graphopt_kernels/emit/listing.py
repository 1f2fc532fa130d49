"""The ``triton`` dump format: the kernels that a lowered program comes to, and where each is launched."""

from __future__ import annotations

from typing import IO

from graphopt.candidate import Reason
from graphopt.errors import EmitError
from graphopt.program import Level, Program
from graphopt_kernels.emit.groups import grouped

__all__ = ["write_triton"]


def write_triton(program: Program, stream: IO[str]) -> None:
    """Write each distinct kernel of ``program`` once, with the layers that it is for, and say which
    operators stay
    calls of ATen and why. Raises ``EmitError`` for programs that are not lowered."""
    if program.level is not Level.LOWERED:
        raise EmitError(
            f"{program.name} is at the {program.level} level; kernels are made of lowered programs",
            hint="dump the final stage",
        )
    grouping = grouped(program.graph)
    taken = dict(grouping.taken)
    stream.write(f"# program {program.name} @ {program.level}: {len(grouping.kernels)} launches\n")
    seen: dict[str, list[str]] = {}
    why: dict[str, Reason] = {}
    for kernel in grouping.kernels:
        seen.setdefault(kernel.file.name, []).append(", ".join(kernel.layers) or "no layer")
        for node in kernel.nodes:
            if node.name in taken:
                why.setdefault(kernel.file.name, taken[node.name])
    for name, source in {k.file.name: k.file.source for k in grouping.kernels}.items():
        stream.write(f"\n# --- {name}.py, launched for\n")
        for layers in seen[name]:
            stream.write(f"#   {layers}\n")
        if name in why:
            stream.write(f"# {why[name]}\n")
        stream.write(f"{source}")
    if grouping.left:
        stream.write("\n# --- left to ATen\n")
    counts: dict[str, int] = {}
    for _, reason in grouping.left:
        counts[str(reason)] = counts.get(str(reason), 0) + 1
    for reason_text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        stream.write(f"#   {count} x {reason_text}\n")
