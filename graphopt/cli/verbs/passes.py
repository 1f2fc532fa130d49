"""``graphopt passes``: what can be done to a graph, by whom, with which options."""

from __future__ import annotations

import inspect
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from graphopt.cli.options import json_option
from graphopt.cli.output import write_json, write_table
from graphopt.plugins import default_host

if TYPE_CHECKING:
    from graphopt.passes import Pass

__all__ = ["command", "described"]


@click.command("passes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List passes, or show one with its options."""
    host = default_host()
    if name is not None:
        found = described(host.pass_class(name))
        write_json(found) if as_json else click.echo(_page(found))
        return
    listed = [described(cls) for cls in host.passes().values()]
    if as_json:
        write_json(listed)
    else:
        write_table(
            ("pass", "level", "result", "plugin", "what it does"),
            [(p["name"], p["level"], p["result"], p["plugin"], p["summary"]) for p in listed],
        )
    broken = [record for record in host.records() if record.error]
    if broken:
        names = ", ".join(record.name for record in broken)
        click.echo(f"graphopt: plugins that failed are left out: {names} (graphopt plugins)", err=True)


def described(cls: type[Pass]) -> dict[str, Any]:
    """What ``--json`` says of a registered pass."""
    from graphopt.options import format_value
    from graphopt.passes import pass_options

    hints = get_type_hints(cls)
    return {
        "name": cls.name,
        "level": str(cls.level),
        "result": "exact" if cls.exact else "lossy",
        "plugin": default_host().owner("graphopt_passes", cls.name).plugin,
        "summary": cls.summary,
        "after": dict(cls.after),
        "before": dict(cls.before),
        "options": [
            {
                "name": option,
                "type": getattr(hints[option], "__name__", None)
                if isinstance(hints[option], type)
                else str(hints[option]),
                "default": None if default is MISSING else format_value(default),
            }
            for option, default in pass_options(cls).items()
        ],
        "doc": inspect.getdoc(cls) or "",
    }


def _page(found: dict[str, Any]) -> str:
    lines = [f"{found['name']} ({found['level']}, {found['result']}, plugin {found['plugin']})"]
    lines += [found["summary"], ""] if found["summary"] else [""]
    lines += [*found["doc"].replace("``", "`").splitlines(), ""] if found["doc"] else []
    for word in ("after", "before"):
        lines += [f"runs {word} {other}: {why}" for other, why in found[word].items()]
    lines.append("options:" if found["options"] else "no options")
    width = max((len(option["name"]) for option in found["options"]), default=0)
    for option in found["options"]:
        default = "required" if option["default"] is None else f"default {option['default']}"
        lines.append(f"  {option['name']:<{width}}  {option['type']}, {default}")
    return "\n".join(lines)
