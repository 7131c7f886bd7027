"""What the commands share: options, functions that read their values, and waiting for async
work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from batch_system import clock
from batch_system.cli import complete
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from batch_system.operations.asking.actor import Actor

T = TypeVar("T")

LONGEST_LIST, ITEM_CHARACTERS = 8_000_000, 100
"""The most characters of a list in JSON, and roughly those of an item without its texts. A file may
have any number.
"""
MOST_DIGITS = 15
"""The most digits of a number in an option. They must be ASCII digits, although int() also accepts
other scripts.
"""

TaskName = Annotated[
    str, typer.Argument(help="The task's name.", autocompletion=complete.task_names)
]
OptionalTaskName = Annotated[
    str | None,
    typer.Argument(help="The task's name.", metavar="NAME", autocompletion=complete.task_names),
]
OfTask = Annotated[
    str | None,
    typer.Option(help="Show only runs and slots of this task.", autocompletion=complete.task_names),
]
ABOUT_RUN = (
    "The id of a run, at least 6 digits of its beginning or end, or a task's name: its newest run."
)
RunOrTask = Annotated[
    str, typer.Argument(metavar="RUN", help=ABOUT_RUN, autocompletion=complete.task_names)
]
RunOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help=ABOUT_RUN, autocompletion=complete.task_names, show_default=False
    ),
]
Note = Annotated[str | None, typer.Option(help="Why; it is kept in the audit.")]
Limit = Annotated[
    int,
    typer.Option(
        parser=lambda value: whole(1, 100_000)(value),
        metavar="NUMBER",
        help="The largest number to show.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a new event loop, and return its result. Errors of the driver become a
    DatabaseError.
    """
    import asyncio

    from batch_system.operations.asking.databases import errors_explained

    with errors_explained():
        return asyncio.run(work)


def actor() -> Actor:
    """The user who has called the command, as the ledger records it."""
    import socket

    from batch_system.operations.asking.actor import Actor

    return Actor(user(), source="cli", address=socket.gethostname())


def user() -> str:
    """The name of the user who has started the command."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # in a container, the user may have no name
        return f"user {os.getuid()}"


def first_of(texts: Sequence[str], most: int) -> list[str]:
    """At most this many of the texts, and a text with the number of the others."""
    others = len(texts) - most
    return [*texts[:most], *([f"and {others:,} more"] if others > 0 else [])]


def within(items: Sequence[T], texts: Callable[[T], Sequence[str]]) -> list[T]:
    """As many of the first items as fit into LONGEST_LIST characters. `texts` returns the texts of
    an item.
    """
    space, fitting = LONGEST_LIST, []
    for item in items:
        space -= sum(map(len, texts(item))) + ITEM_CHARACTERS
        if space < 0:
            break
        fitting.append(item)
    return fitting


def whole(least: int, most: int) -> Callable[[Any], int]:
    """The parser of an option that takes a whole number."""

    def read(value: Any) -> int:
        text = str(value)
        if not re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", text) or not least <= int(text) <= most:
            raise typer.BadParameter(
                f"it is {echoed(text)}; allowed: a whole number from {least:,} to {most:,}"
            )
        return int(text)

    return read


def seconds(value: Any) -> float:
    """The parser of an option that takes seconds."""
    text = str(value)
    if not re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}(\.[0-9]{{1,{MOST_DIGITS}}})?", text):
        raise typer.BadParameter(
            f"it is {echoed(text)}; allowed: seconds from 0, such as 10 or 0.5"
        )
    return float(text)


def pairs(options: list[str]) -> dict[str, str]:
    """`name=value` options as a dictionary."""
    parameters: dict[str, str] = {}
    for pair in options:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidParameters(f"--param is {echoed(pair)}; allowed: name=value")
        if name in parameters:
            raise InvalidParameters(
                f"--param has the name {echoed(name)} twice; allowed: one value for each name"
            )
        parameters[name] = value
    return parameters


def instant(text: str, option: str, zone: ZoneInfo | None = None, age: str = "") -> datetime:
    """Read an instant in ISO 8601. A text without an offset is in `zone`, or in UTC.

    `age`: the end of the error message, if the option also takes an age. Raises InvalidParameters.
    """
    from batch_system.batch.queue.requests import YEARS

    try:
        # Python allows any character between the date and the time.
        if not re.fullmatch(r"[0-9W][0-9:,.TWZ +-]*", text):
            raise ValueError(text)
        parsed = datetime.fromisoformat(text)
        at = (parsed if parsed.tzinfo else parsed.replace(tzinfo=zone or UTC)).astimezone(UTC)
        if at.year not in YEARS:  # so that it can be shown in every zone
            raise ValueError(text)
        return at
    except (ValueError, OverflowError):
        raise InvalidParameters(
            f"{option} is {echoed(text)}; allowed: ISO 8601, such as 2026-11-25T02:00 or "
            f"2026-11-25T02:00+09:00{age}"
        ) from None


def age(text: str, option: str) -> timedelta:
    """Read a length of time such as 30m, 12h or 90d. Raises InvalidParameters."""
    if (read := re.fullmatch(r"([0-9]{1,5})([mhd])", text)) is None:
        raise InvalidParameters(f"{option} is {echoed(text)}; allowed: an age such as 12h or 90d")
    return timedelta(**{{"m": "minutes", "h": "hours", "d": "days"}[read[2]]: int(read[1])})


def instant_or_age(text: str, option: str) -> datetime:
    """Read an instant in ISO 8601, or an age such as `90s`, `30m`, `2h`, `7d`. Raises
    InvalidParameters.
    """
    age = re.fullmatch(r"([0-9]+)([smhd])", text)
    if age is None:
        return instant(text, option, age=", or an age such as 2h or 7d")
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[age[2]]
    try:
        if len(age[1]) > MOST_DIGITS:
            raise OverflowError
        return clock.now() - timedelta(**{unit: int(age[1])})
    except OverflowError:
        raise InvalidParameters(
            f"{option} is {echoed(text)}; allowed: an age that does not reach back before the year "
            "1"
        ) from None
