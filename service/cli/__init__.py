"""`batch …`, also `python -m service`: parses, calls, prints.

A command imports what it needs when it runs, so that `batch --help` and a shell's completion answer at once.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar

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
from service.cli.opening import EXIT_CODES, FAILED, MISTAKE
from service.errors import BatchError

LONGEST_MESSAGE = 4_000
"""Characters of an error on stderr."""


ABOUT_BACKUPS = "Make backups, check, compare, copy and restore them."
BACKUPS: dict[str, dict[str, Any]] = {
    "Look": {
        "list": backup.list_,
        "show": backup.show,
        "diff": diff.diff,
    },
    "Make and restore": {
        "create": backup.create,
        "verify": backup.verify,
        "restore": restore.restore,
    },
    "Elsewhere": {
        "upload": backup.upload,
        "download": backup.download,
    },
    "Keep": {
        "prune": backup.prune,
        "pin": backup.pin,
        "unpin": backup.unpin,
    },
}
PANELS: dict[str, dict[str, Any]] = {
    "Service": {
        "serve": serve.serve,
    },
    "Tasks": {
        "new": new.new,
        "tasks": tasks.tasks,
        "next": tasks.next_,
        "lint": lint.lint,
        "pause": manage.pause,
        "resume": manage.resume,
    },
    "Runs": {
        "run": runs.run,
        "runs": runs.runs,
        "show": show.show,
        "logs": logs.logs,
        "watch": watch.watch,
        "cancel": manage.cancel,
        "retry": manage.retry,
        "quarantine": items.quarantine,
        "redrive": items.redrive,
        "backfill": manage.backfill,
        "account": account.account,
        "prune": manage.prune,
    },
    "Backups": {"backup": BACKUPS},
}
"""The commands under the headings that they are listed by: functions, and one group of commands."""


class Group(TyperGroup):
    """Commands under headings, listed without rich, whose import takes longer than all the rest.

    A command is made when it is asked for: to make all of them takes as long as most of them run.
    """

    panels: ClassVar[dict[str, dict[str, Any]]] = PANELS
    words: ClassVar[str] = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            from service import console

            console.write(ctx.get_help())
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for panel in self.panels.values() for name in panel]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known = {name: function for panel in self.panels.values() for name, function in panel.items()}
        # Of an unknown name typer says which one is like it: then all are made.
        for name in [cmd_name] if cmd_name in known else known:
            if name not in self.commands:
                self.commands[name] = _made(f"{self.words}{name}", known[name])
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, self.list_commands(ctx)))
        for panel, commands in self.panels.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(widest), _help_of(one)[0]) for name, one in commands.items()])


class BackupGroup(Group):
    panels = BACKUPS
    words = "backup "


def _help_of(command: Callable[..., None] | dict[str, Any]) -> list[str]:
    """The paragraphs of its docstring. The first one is its line in the list of commands."""
    text = ABOUT_BACKUPS if isinstance(command, dict) else inspect.cleandoc(command.__doc__ or "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _made(words: str, command: Callable[..., None] | dict[str, Any]) -> Any:
    if isinstance(command, dict):
        return typer.main.get_group(backups)
    examples = "\n".join(f"  {line}\n      {what}" for line, what in EXAMPLES[words].items())
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    text = "\n\n".join(_help_of(command))
    alone.command(words.split()[-1], help=text, epilog=f"\b\nExamples:\n{examples}")(command)
    return typer.main.get_command(alone)


cli = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    name="batch",
    epilog="`batch COMMAND --help` has examples. Commands read the settings from the environment and `.env`.",
    pretty_exceptions_enable=False,
)
backups = typer.Typer(
    cls=BackupGroup,
    rich_markup_mode=None,
    name="backup",
    help=ABOUT_BACKUPS,
    epilog="`batch backup COMMAND --help` has examples. FILE is a path, a name, `latest`, or s3://bucket/prefix/name.",
)


@cli.callback()
def about() -> None:
    """Batch System: tasks on schedule, every slot accounted for."""


def main() -> None:
    """The entry point: what was wrong is said in one line on stderr, with the exit code of its kind."""
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
        code = _refuse(error.message, EXIT_CODES[error.kind])
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:  # stdout is full, or closed
        code = _refuse(f"the output can't be written: {error.strerror}", FAILED)
    raise SystemExit(code)


def _refuse(message: str, code: int = MISTAKE) -> int:
    from service import console

    console.warn(f"batch: {escaping.cut(message, LONGEST_MESSAGE)}")
    return code
