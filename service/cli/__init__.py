"""`batch …`, also `python -m service`: parses, calls, prints.

A command imports what it needs when it runs, so that `batch --help` and a shell's completion answer at once.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from service import escaping
from service.cli import (
    account,
    backup,
    diff,
    items,
    lint,
    logs,
    manage,
    new,
    restore,
    runs,
    serve,
    show,
    tasks,
    watch,
)
from service.cli.examples import EXAMPLES
from service.errors import BatchError

LONGEST_MESSAGE = 4_000
"""Characters of an error on stderr."""


class Panels(TyperGroup):
    """Lists commands under headings. It stands in for rich, whose import would take longer than all the rest."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        widest = max(map(len, self.commands))
        for name, command in self.commands.items():
            line = name.ljust(widest), (command.help or "").partition("\n\n")[0]
            panels.setdefault(str(getattr(command, "rich_help_panel", None)), []).append(line)
        for panel, lines in panels.items():
            with formatter.section(panel):
                formatter.write_dl(lines)


cli = typer.Typer(
    cls=Panels,
    rich_markup_mode=None,
    name="batch",
    help="Batch System: tasks on schedule, every slot accounted for.",
    epilog="`batch COMMAND --help` has examples. Commands read the settings from the environment and `.env`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


backups = typer.Typer(
    cls=Panels,
    rich_markup_mode=None,
    help="Make backups, check, compare, copy and restore them.",
    epilog="`batch backup COMMAND --help` has examples. FILE is a path, a name, `latest`, or s3://bucket/prefix/name.",
    no_args_is_help=True,
)


def _add(panel: str, name: str, command: Callable[..., None], group: typer.Typer = cli) -> None:
    """The docstring is the help, and its first paragraph the line in the list of commands."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    shown = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    examples = "\n".join(f"  {line}\n      {what}" for line, what in EXAMPLES[name].items())
    group.command(name.split(" ")[-1], help=shown, epilog=f"\b\nExamples:\n{examples}", rich_help_panel=panel)(command)


_add("Service", "serve", serve.serve)
_add("Tasks", "new", new.new)
_add("Tasks", "tasks", tasks.tasks)
_add("Tasks", "next", tasks.next_)
_add("Tasks", "lint", lint.lint)
_add("Tasks", "pause", manage.pause)
_add("Tasks", "resume", manage.resume)
_add("Runs", "run", runs.run)
_add("Runs", "runs", runs.runs)
_add("Runs", "show", show.show)
_add("Runs", "logs", logs.logs)
_add("Runs", "watch", watch.watch)
_add("Runs", "cancel", manage.cancel)
_add("Runs", "retry", manage.retry)
_add("Runs", "quarantine", items.quarantine)
_add("Runs", "redrive", items.redrive)
_add("Runs", "backfill", manage.backfill)
_add("Runs", "account", account.account)
_add("Runs", "prune", manage.prune)
_add("Look", "backup list", backup.list_, backups)
_add("Look", "backup show", backup.show, backups)
_add("Look", "backup diff", diff.diff, backups)
_add("Make and restore", "backup create", backup.create, backups)
_add("Make and restore", "backup verify", backup.verify, backups)
_add("Make and restore", "backup restore", restore.restore, backups)
_add("Elsewhere", "backup upload", backup.upload, backups)
_add("Elsewhere", "backup download", backup.download, backups)
_add("Keep", "backup prune", backup.prune, backups)
_add("Keep", "backup pin", backup.pin, backups)
_add("Keep", "backup unpin", backup.unpin, backups)
cli.add_typer(backups, name="backup", rich_help_panel="Backups")


def main() -> None:
    """The entry point: what was wrong is said in one line on stderr, with exit code 2."""
    if sys.stdout is None:  # it was closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal that can't show a character must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli(prog_name="batch", standalone_mode=False)
    except TyperException as error:
        code = _refuse(error.format_message())
    except BatchError as error:
        code = _refuse(error.message)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:  # stdout is full, or closed
        code = _refuse(f"the output can't be written: {error.strerror}")
    raise SystemExit(code)


def _refuse(message: str) -> int:
    from service import console

    if message:  # there is none where the help was shown instead
        console.warn(f"batch: {escaping.cut(message, LONGEST_MESSAGE)}")
    return 2
