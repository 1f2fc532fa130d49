"""The dump formats that ship: records for the plugin host."""

from __future__ import annotations

from graphopt.dump.dot import write_dot
from graphopt.dump.json import write_json
from graphopt.dump.page import write_page, write_pages
from graphopt.dump.python import write_python
from graphopt.dump.text import write_text
from graphopt.plugins.records import DumpFormat

__all__ = ["FORMATS"]

FORMATS = (
    DumpFormat("text", ".txt", write_text, "numbered, typed, one call a line (docs/dumps.md)"),
    DumpFormat("json", ".json", write_json, "the same facts, structured for tools"),
    DumpFormat("py", ".py", write_python, "the code that fx runs"),
    DumpFormat("html", ".html", write_page, "a page to open layers and zoom in", write_pages),
    DumpFormat("dot", ".dot", write_dot, "a Graphviz picture, clustered by layer"),
)
