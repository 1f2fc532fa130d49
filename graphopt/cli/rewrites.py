"""Names of rewrites on the command line: listed, or in a file."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import InputsError

__all__ = ["named_rewrites"]


def named_rewrites(text: str | None) -> tuple[str, ...] | None:
    """``"a/b/c,d/schedules"``, or ``"@FILE"`` with one a line; ``""`` is none of them, ``None`` all.

    Raises ``InputsError`` for a file that cannot be read.
    """
    if text is None:
        return None
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputsError(f"cannot read rewrites from {text[1:]!r}: {error}") from error
    else:
        lines = text.split(",")
    return tuple(line.strip() for line in lines if line.strip())
