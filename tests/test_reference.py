"""The reference pages are what the code says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt.reference import main, markdown, pages

FOLDER = Path(__file__).parent.parent / "docs" / "reference"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


def test_pages_are_what_make_docs_writes(made: dict[str, str]) -> None:
    there = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.md")}
    assert sorted(there) == sorted(made), "make docs"
    stale = [name for name, path in there.items() if path.read_text(encoding="utf-8") != made[name]]
    assert not stale, "make docs writes them again"


def test_every_verb_and_pass_is_described(made: dict[str, str]) -> None:
    assert {"cli/dump.md", "cli/tune.md", "passes/insert-checkpoints.md"} <= made.keys()
    for name, text in made.items():
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (FOLDER / name).parent.joinpath(link).resolve().exists(), (name, link)
        assert text.count("```") % 2 == 0 and "``" not in text.replace("```", ""), name
        if name.startswith("cli/"):
            options = [row for row in text.splitlines() if row.startswith("| `-")]
            assert all(row.rsplit("|", 2)[1].strip() for row in options), f"{name}: an option without help"
        elif name.startswith("passes/"):
            assert "\n## Options\n\n" in text and "\n\n\n" not in text, name
            assert "|\n\n## Options" not in text, f"{name}: its module has no docstring"


def test_order_is_told_from_both_sides(made: dict[str, str]) -> None:
    why = "calls that do nothing hide which rows are read"
    assert f"- after [`normalize`](normalize.md): {why}\n" in made["passes/chunk.md"]
    assert f"- before [`chunk`](chunk.md): {why}\n" in made["passes/normalize.md"]
    assert 'it runs with `allow=("fuse-dropout",)`' in made["passes/fuse-dropout.md"]


def test_docstrings_become_markdown() -> None:
    text = "Takes ``a|b``.\n\n    Before::\n\n        x = f(y)\n\n            z\n    After."
    assert markdown(text) == "Takes `a|b`.\n\nBefore:\n\n```\nx = f(y)\n\n    z\n```\n\nAfter."


def test_pages_of_what_is_gone_are_removed(tmp_path: Path) -> None:
    for name in ("cli/gone.md", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old", encoding="utf-8")
    main(tmp_path)
    assert not (tmp_path / "cli/gone.md").exists() and (tmp_path / "notes.md").exists()
    assert (tmp_path / "passes/chunk.md").is_file()
