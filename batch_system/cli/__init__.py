"""`batch …`, also `python -m batch_system`: parses, calls, prints.

A command imports what it needs when it runs, so that `batch --help` and a shell's completion answer
at once.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from batch_system import escaping, interrupts
from batch_system.cli import (
    access,
    account,
    backup,
    bulk,
    calendars,
    demo,
    diff,
    incidents,
    items,
    lint,
    logs,
    maintenance,
    manage,
    new,
    night,
    opening,
    restore,
    run,
    runs,
    serve,
    settings,
    show,
    status,
    tasks,
    watch,
    why,
    work,
)
from batch_system.cli.asked import with_options
from batch_system.cli.examples import EXAMPLES
from batch_system.cli.opening import EXIT_CODES, FAILED, INTERRUPTED, MISTAKE
from batch_system.errors import BatchError

LONGEST_MESSAGE = 4_000
"""The largest number of characters of an error that is printed on stderr."""

STARTING = ("serve", "work")
"""The commands that start a service or a worker, which itself handles SIGINT."""

ABOUT = {
    "backup": "Make, verify, compare, copy and restore backups.",
    "token": "Make, list and revoke tokens, by which programs and people use the HTTP API.",
    "alerts": "List the messages about incidents, and try out the channels.",
    "calendars": "List and show the named calendars, whose dates tasks leave out.",
    "maintenance": "List and end the pauses and mutes of many tasks, also planned ones.",
}
"""What the groups of commands are for."""
BACKUPS: dict[str, dict[str, Any]] = {
    "View": {
        "list": backup.list_,
        "show": backup.show,
        "diff": diff.diff,
    },
    "Make and restore": {
        "create": backup.create,
        "verify": backup.verify,
        "restore": restore.restore,
    },
    "Copy": {
        "upload": backup.upload,
        "download": backup.download,
    },
    "Keep and delete": {
        "prune": backup.prune,
        "pin": backup.pin,
        "unpin": backup.unpin,
        "delete": backup.delete,
    },
}
TOKENS: dict[str, dict[str, Any]] = {
    "Tokens": {
        "create": access.create,
        "list": access.list_,
        "revoke": access.revoke,
        "sessions": access.sessions,
        "end-session": access.end_session,
    },
}
ALERTS: dict[str, dict[str, Any]] = {
    "Alerts": {
        "list": incidents.messages,
        "test": incidents.send_test,
    },
}
CALENDARS: dict[str, dict[str, Any]] = {
    "Calendars": {
        "list": calendars.list_,
        "show": calendars.show,
    },
}
MAINTENANCE: dict[str, dict[str, Any]] = {
    "Maintenance": {
        "list": maintenance.list_,
        "end": maintenance.end,
    },
}
PANELS: dict[str, dict[str, Any]] = {
    "Service": {
        "serve": serve.serve,
        "demo": demo.demo,
        "work": work.work,
        "night": night.night,
        "forecast": night.forecast,
        "status": status.status,
        "doctor": status.doctor,
        "nodes": status.nodes,
        "pools": status.pools,
        "config": settings.config,
        "migrate": settings.migrate,
    },
    "Tasks": {
        "new": new.new,
        "tasks": tasks.tasks,
        "next": tasks.next_,
        "keys": tasks.keys,
        "lint": lint.lint,
        "pause": maintenance.pause,
        "resume": maintenance.resume,
        "maintenance": MAINTENANCE,
        "calendars": CALENDARS,
    },
    "Runs": {
        "run": run.run,
        "runs": runs.runs,
        "show": show.show,
        "why": why.why,
        "logs": logs.logs,
        "watch": watch.watch,
        "cancel": bulk.cancel,
        "retry": bulk.retry,
        "undo": bulk.undo,
        "quarantine": items.quarantine,
        "redrive": items.redrive,
        "backfill": manage.backfill,
        "account": account.account,
        "prune": manage.prune,
    },
    "Incidents": {
        "incidents": incidents.incidents,
        "ack": incidents.ack,
        "mute": maintenance.mute,
        "unmute": maintenance.unmute,
        "alerts": ALERTS,
    },
    "Backups": {"backup": BACKUPS},
    "Access": {
        "token": TOKENS,
        "changes": access.changes,
    },
}
"""The functions of the commands, under the headings that `--help` shows. `backup`, `token`,
`alerts`, `calendars` and `maintenance` are groups.
"""


class Group(TyperGroup):
    """A group that lists its commands under headings. It does not use rich, because importing rich
    takes very long.

    A command is built when it is called, because building all of them takes as long as running most
    of them.
    """

    panels: ClassVar[dict[str, dict[str, Any]]] = PANELS
    prefix: ClassVar[str] = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            from batch_system import console

            console.write(ctx.get_help())
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for panel in self.panels.values() for name in panel]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        functions = {
            name: function for panel in self.panels.values() for name, function in panel.items()
        }
        # If the name is unknown, all commands are built, because typer suggests a name that is
        # similar.
        for name in [cmd_name] if cmd_name in functions else functions:
            if name not in self.commands:
                self.commands[name] = _command(f"{self.prefix}{name}", functions[name])
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, self.list_commands(ctx)))
        for panel, commands in self.panels.items():
            with formatter.section(panel):
                rows = commands.items()
                formatter.write_dl(
                    [(name.ljust(widest), _paragraphs(name, command)[0]) for name, command in rows]
                )


class BackupGroup(Group):
    panels = BACKUPS
    prefix = "backup "


class TokenGroup(Group):
    panels = TOKENS
    prefix = "token "


class AlertGroup(Group):
    panels = ALERTS
    prefix = "alerts "


class CalendarGroup(Group):
    panels = CALENDARS
    prefix = "calendars "


class MaintenanceGroup(Group):
    panels = MAINTENANCE
    prefix = "maintenance "


def _paragraphs(name: str, command: Callable[..., None] | dict[str, Any]) -> list[str]:
    """The paragraphs of a command's help. The first one is also shown in the list of commands."""
    text = ABOUT[name] if isinstance(command, dict) else inspect.cleandoc(command.__doc__ or "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _command(name: str, command: Callable[..., None] | dict[str, Any]) -> Any:
    """Build a command. `name`: its full name, such as `backup list`."""
    if isinstance(command, dict):
        return typer.main.get_group(GROUPS[name])
    examples = "\n".join(f"  {line}\n      {purpose}" for line, purpose in EXAMPLES[name].items())
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    text = "\n\n".join(_paragraphs(name, command))
    app.command(name.split()[-1], help=text, epilog=f"\b\nExamples:\n{examples}")(
        with_options(command)
    )
    return typer.main.get_command(app)


cli = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    name="batch",
    epilog="`batch COMMAND --help` shows examples. Commands read the settings from the environment "
    "and from `.env`.",
    pretty_exceptions_enable=False,
)
backups = typer.Typer(
    cls=BackupGroup,
    rich_markup_mode=None,
    name="backup",
    help=ABOUT["backup"],
    epilog="`batch backup COMMAND --help` shows examples. FILE is a path, a name, `latest`, or "
    "s3://bucket/prefix/name.",
)
tokens = typer.Typer(
    cls=TokenGroup,
    rich_markup_mode=None,
    name="token",
    help=ABOUT["token"],
    epilog="`batch token COMMAND --help` shows examples.",
)
alerts = typer.Typer(
    cls=AlertGroup,
    rich_markup_mode=None,
    name="alerts",
    help=ABOUT["alerts"],
    epilog="`batch alerts COMMAND --help` shows examples.",
)
maintenance_windows = typer.Typer(
    cls=MaintenanceGroup,
    rich_markup_mode=None,
    name="maintenance",
    help=ABOUT["maintenance"],
    epilog="`batch pause` and `batch mute` begin and plan them. `batch maintenance COMMAND --help` "
    "shows examples.",
)
named_calendars = typer.Typer(
    cls=CalendarGroup,
    rich_markup_mode=None,
    name="calendars",
    help=ABOUT["calendars"],
    epilog="A calendar is a file of CALENDARS_DIR, such as bank.toml. `batch calendars COMMAND "
    "--help` shows examples.",
)
GROUPS = {
    "backup": backups,
    "token": tokens,
    "alerts": alerts,
    "calendars": named_calendars,
    "maintenance": maintenance_windows,
}


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from batch_system.cli import version

        version.print_version()
        raise typer.Exit


@cli.callback()
def about(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version, and that of your application.",
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask the service at this URL over its HTTP API, instead of the ledger. Also "
            "BATCH_URL."
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file that holds the token for --url, and nothing else. Also BATCH_TOKEN.",
        ),
    ] = None,
) -> None:
    """Batch System runs tasks on a schedule, and accounts for every slot: each instant at which a
    task is due.
    """
    if context.invoked_subcommand not in STARTING:
        interrupts.raise_in_commands()
    opening.ask_service(url, token_file)


def main() -> None:
    """The entry point of `batch`. An error is one line on stderr, and its kind decides the exit
    code.
    """
    if sys.stdout is None:  # the shell has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal can't show is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli(prog_name="batch", standalone_mode=False)
        if code == INTERRUPTED:  # what typer returns after a KeyboardInterrupt
            _refuse("ended by Ctrl-C")
    except TyperException as error:
        code = _refuse(error.format_message())
    except BatchError as error:
        code = _refuse(error.message, EXIT_CODES[error.kind])
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:  # for example, the disk of stdout is full
        code = _refuse(f"the output can't be written: {error.strerror}", FAILED)
    raise SystemExit(code)


def _refuse(message: str, code: int = MISTAKE) -> int:
    """Print an error, and return the exit code."""
    from batch_system import console

    console.warn(f"batch: {escaping.cut(message, LONGEST_MESSAGE)}")
    return code
