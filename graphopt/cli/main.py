"""The ``graphopt`` command: its verbs, those of plugins, and what a failure looks like.

Nothing here imports torch; ``graphopt --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

import click

from graphopt import __version__
from graphopt.errors import GraphoptError, PluginError, nearest
from graphopt.plugins import Command, default_host
from graphopt.plugins.loading import GUARDED, describe_error

__all__ = ["cli", "main"]


def _core(name: str, summary: str) -> Command:
    def load() -> click.Command:
        module = f"graphopt.cli.verbs.{name.replace('-', '_')}"
        return cast(click.Command, importlib.import_module(module).command)

    return Command(name, summary, load)


_CORE = {
    command.name: command
    for command in (
        _core("dump", "Write the graphs of TARGET, rewritten, as text, JSON, Python, HTML, DOT or MLIR."),
        _core("run", "Optimize TARGET, run one step and report what it took."),
        _core("cost", "Say what one step of TARGET takes as it is."),
        _core("explain", "Explain what holds the peak of TARGET, or which layers it has."),
        _core("diff", "Compare two programs, or one before and after passes, by layer."),
        _core("bench", "Measure TARGET as it is, optimized, and as peers make it."),
        _core("bisect", "Find the smallest set of rewrites of TARGET that fails."),
        _core("repro", "Write a folder that reproduces a failure of TARGET with one command."),
        _core("passes", "List passes, or show one with its options."),
        _core("lint", "Say what is wrong with pipeline files."),
        _core("schema", "Write the JSON Schema of pipeline files, for editors."),
        _core("plugins", "List plugins and what is wrong with them."),
        _core("new-plugin", "Write a plugin NAME: a project with a pass, its entry point and a test."),
        _core("quality", "Compare predictions of TARGET before and after its weights are packed."),
        _core("weights", "List the packed weights of a checkpoint."),
        _core("pareto", "Show peak bytes against time of TARGET."),
    )
}


class _Verbs(click.Group):
    """Core verbs and those of plugins; a verb is loaded when it is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_CORE, *sorted(_plugin_verbs())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _CORE:
            return _CORE[name].load()
        found = _plugin_verbs().get(name)
        return _loaded(name, found.load) if found is not None else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            close = nearest(name, known)
            ctx.fail(f"no such verb {name!r}" + (f"; did you mean {close!r}?" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        summaries = {**_CORE, **_plugin_verbs()}
        with formatter.section("Verbs"):
            formatter.write_dl(
                [(name, _sentence(summaries[name].summary)) for name in self.list_commands(ctx)]
            )


def _sentence(summary: str) -> str:
    """A plugin's summary as the core's are written."""
    return summary[:1].upper() + summary[1:].rstrip(".") + "."


def _plugin_verbs() -> dict[str, Command]:
    """Verbs of plugins. A core verb cannot be replaced: the talk says who tried."""
    host, found = default_host(), {}
    for name, command in host.commands().items():
        if name in _CORE:
            owner = host.owner("graphopt_commands", name).plugin
            click.echo(f"graphopt: plugin {owner!r} offers {name!r}, which is graphopt's own verb", err=True)
        else:
            found[name] = command
    return found


def _loaded(name: str, load: Callable[[], click.Command]) -> click.Command:
    owner = default_host().owner("graphopt_commands", name).plugin
    try:
        command = load()
    except GUARDED as error:
        raise PluginError(
            f"plugin {owner!r} cannot load its verb {name!r}: {describe_error(error)}"
        ) from error
    if not isinstance(command, click.Command):
        raise PluginError(f"plugin {owner!r} gives {command!r} for its verb {name!r}, not a click command")
    return command


@click.group(
    cls=_Verbs,
    subcommand_metavar="VERB [ARGUMENTS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="TARGET is package.module:factory (returning a model, or a model and its inputs) or a .pt2 file.",
)
@click.version_option(__version__, prog_name="graphopt", message="%(prog)s %(version)s")
def cli() -> None:
    """Give a PyTorch model a byte budget; get the fastest program that fits."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    try:
        returned = cli.main(args=arguments, prog_name="graphopt", standalone_mode=False)
        sys.stdout.flush()
    except GraphoptError as error:
        click.echo(f"graphopt: error[{error.code}]: {error}", err=True)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return _closed_pipe()
        click.echo(
            f"graphopt: error[file]: {error.filename or 'a file'}: {error.strerror or error}", err=True
        )
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("graphopt: interrupted", err=True)
        return 130
    return returned if isinstance(returned, int) else 0


def _closed_pipe() -> int:
    """The reader of stdout went away (`graphopt dump ... | head`): nothing is left to say."""
    # The interpreter must not try to flush into the closed pipe on its way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
