"""The reference pages of ``docs/reference``, made of what is registered: a page for each verb and each pass.

``python -m graphopt.reference docs/reference`` writes them (``make docs``); a test compares. A verb's page is
made of its click command, a pass's of its class: fields, class variables, and the docstrings of the class and
of the module that it stands in.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from graphopt.atomic import write_atomically
from graphopt.cli.main import cli
from graphopt.cli.verbs.passes import described
from graphopt.decoding.site_pass import SitePass
from graphopt.plugins import PluginHost, default_host

__all__ = ["main", "markdown", "pages"]

_MADE = "<!-- Made by `make docs`; change the code. -->\n"
_DISTRIBUTION = "graphopt"


def pages() -> dict[str, str]:
    """The text of each page of what graphopt itself registers, by its path below the folder."""
    host = default_host()
    verbs, passes = dict(_verbs(host)), _passes(host)
    found = {f"cli/{name}.md": _verb_page(name, verb) for name, verb in verbs.items()}
    found |= {f"passes/{name}.md": _pass_page(name, passes) for name in passes}
    return {"README.md": _index(verbs, passes), **found}


def main(folder: Path) -> None:
    """Write the pages, and remove those of what is no more. Raises ``OSError``."""
    found = pages()
    for path in folder.glob("*/*.md"):
        if path.relative_to(folder).as_posix() not in found:
            path.unlink()
    for name, text in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, text)


def _verbs(host: PluginHost) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli, info_name="graphopt")
    others = {
        name
        for name in host.commands()
        if host.owner("graphopt_commands", name).distribution != _DISTRIBUTION
    }
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if command is not None and name not in others:
            yield name, command


def _passes(host: PluginHost) -> dict[str, dict[str, Any]]:
    found = {}
    for name, cls in sorted(host.passes().items()):
        if host.owner("graphopt_passes", name).distribution == _DISTRIBUTION:
            more = {
                "inexact": "" if cls.exact else cls.inexact,
                "mandatory": cls.mandatory,
                "listed": issubclass(cls, SitePass) and not cls.on_demand,
                "needs": sorted(cls.needs),
                "keeps": sorted(cls.keeps),
                "module": import_module(cls.__module__).__doc__ or "",
            }
            found[name] = described(cls) | more
    return found


def _index(verbs: Mapping[str, click.Command], passes: Mapping[str, Mapping[str, Any]]) -> str:
    guides = "[the command line](../cli.md) and [passes](../passes.md)"
    lines = ["# Reference", "", f"What is registered, one page each. The guides are {guides}.", ""]
    lines += ["## Verbs", "", "| verb | |", "|---|---|"]
    lines += [f"| [`{name}`](cli/{name}.md) | {_cell(_first(verb.help))} |" for name, verb in verbs.items()]
    lines += ["", "## Passes", "", "| pass | level | result | |", "|---|---|---|---|"]
    for name, found in passes.items():
        row = (
            f"[`{name}`](passes/{name}.md) | {found['level']} | {found['result']} | {_cell(found['summary'])}"
        )
        lines.append(f"| {row} |")
    return _joined(lines)


def _verb_page(name: str, verb: click.Command) -> str:
    given = [param for param in verb.params if isinstance(param, click.Argument)]
    options = [param for param in verb.params if isinstance(param, click.Option) and not param.hidden]
    usage = " ".join(["graphopt", name, *(["[OPTIONS]"] if options else []), *map(_argument, given)])
    lines = [f"# graphopt {name}", "", "```", usage, "```", "", markdown(verb.help or ""), ""]
    if options:
        lines += ["| option | value | default | |", "|---|---|---|---|"]
    for option in options:
        names = ", ".join(f"`{word}`" for word in (*option.opts, *option.secondary_opts))
        again = " May be repeated." if option.multiple and "repeated" not in (option.help or "") else ""
        told = f"{_cell(option.help or '')}{again}"
        lines.append(f"| {names} | {_value(option)} | {_default(option)} | {told} |")
    return _joined(lines)


def _argument(argument: click.Argument) -> str:
    word = argument.metavar or (argument.name or "").upper()
    word = word if argument.required or word.startswith("[") else f"[{word}]"
    return f"{word}..." if argument.nargs == -1 and not word.endswith("...") else word


def _value(option: click.Option) -> str:
    if option.is_flag:
        return ""
    if option.metavar:
        return f"`{_cell(option.metavar)}`"
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    return f"`{option.type.name.upper()}`"


def _default(option: click.Option) -> str:
    # Versions of click say in different ways that there is none; of flags False goes without saying.
    value = option.default
    return f"`{value}`" if isinstance(value, (str, int, float)) and value is not False and value != "" else ""


def _pass_page(name: str, passes: Mapping[str, Mapping[str, Any]]) -> str:
    found = passes[name]
    lines = [f"# {name}", "", f"{_sentence(found['summary'])}", ""]
    lines += ["| | |", "|---|---|", f"| level | {found['level']} |", f"| result | {_result(name, found)} |"]
    lines += ["| runs | always: it cannot be left out |"] if found["mandatory"] else []
    lines += [f"| {word} | {', '.join(found[word])} |" for word in ("needs", "keeps") if found[word]]
    lines += ["", markdown(found["module"]), "", "## Options", "", markdown(found["doc"]), ""]
    lines += ["| option | type | default |", "|---|---|---|"] if found["options"] else ["It has none."]
    for option in found["options"]:
        default = "required" if option["default"] is None else f"`{_cell(option['default'])}`"
        lines.append(
            f"| `{option['name']}` | `{_cell(option['type'].removeprefix('typing.'))}` | {default} |"
        )
    order = list(_order(name, passes))
    if order:
        lines += ["", "## Order", "", *order]
    return _joined(lines)


def _result(name: str, found: Mapping[str, Any]) -> str:
    if found["result"] == "exact":
        return "exact"
    if found["listed"]:
        return f'{_cell(found["inexact"])}: it runs where a pipeline lists it'
    return f'{_cell(found["inexact"])}: it runs with `allow=("{name}",)`'


def _order(name: str, passes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the pass says of its place, and what others say of it."""
    for word, other_word in (("after", "before"), ("before", "after")):
        said = dict(passes[name][word])
        for other, found in passes.items():
            if name in found[other_word]:
                said.setdefault(other, found[other_word][name])
        for other, why in sorted(said.items()):
            link = f"[`{other}`]({other}.md)" if other in passes else f"`{other}`"
            yield f"- {word} {link}: {markdown(why)}"


def markdown(text: str) -> str:
    """A docstring as Markdown: what is under ``::`` is a block of code, double backticks are single."""
    out: list[str] = []
    literal = False
    for line in inspect.cleandoc(text).splitlines():
        if literal and line and not line.startswith("    "):
            out = _closed(out)
            literal = False
        if literal:
            # The blank line between what announces a block and the block is outside of it.
            out += [line.removeprefix("    ")] if line or out[-1] != "```" else []
            continue
        # What click is not to wrap is marked for click alone.
        plain = re.sub(r"``([^`]+)``", r"`\1`", line).replace("\b", "")
        if plain.rstrip().endswith("::"):
            out += [plain.rstrip()[:-1], "", "```"]
            literal = True
        else:
            out.append(plain)
    return "\n".join(_closed(out) if literal else out).strip("\n")


def _closed(lines: list[str]) -> list[str]:
    """With the end of a block of code, before the blank lines that follow it."""
    kept = list(lines)
    while kept and not kept[-1]:
        kept.pop()
    return [*kept, "```", ""]


def _first(text: str | None) -> str:
    return markdown((text or "").partition("\n\n")[0]).replace("\n", " ")


def _cell(text: str) -> str:
    return markdown(text).replace("\n", " ").replace("|", "\\|")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _joined(lines: list[str]) -> str:
    text = "\n".join(line.rstrip() for line in lines)
    return _MADE + "\n" + re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
