"""Functions that the commands share: options, their values, and waiting for async work."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from service import clock
from service.cli import complete
from service.errors import InvalidParameters
from service.escaping import echoed

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

T = TypeVar("T")

LARGEST_SHOWN, ITEM_CHARACTERS = 8_000_000, 100
"""Characters of a list in JSON, and about those of an item beside its texts: what is read may have any number."""
MOST_DIGITS = 15
"""Of a number that somebody types. (Python reads those of all scripts, and refuses more than 4,300.)"""

TaskName = Annotated[str, typer.Argument(help="The task's name.", autocompletion=complete.task_names)]
OfTask = Annotated[str | None, typer.Option(help="Only of this task.", autocompletion=complete.task_names)]
RunOrTask = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id, its first digits, or a task.", autocompletion=complete.task_names),
]
OneRun = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or its first 6 or more digits.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a new event loop, and return its result. Errors of the driver become a DatabaseError."""
    import asyncio

    from service.operations.databases import errors_explained

    with errors_explained():
        return asyncio.run(work)


def user() -> str:
    """The name of the user who has called the command."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def first_of(texts: Sequence[str], most: int) -> list[str]:
    """The first items, and the number of the others."""
    more = len(texts) - most
    return [*texts[:most], *([f"and {more:,} more"] if more > 0 else [])]


def within(items: Sequence[T], texts: Callable[[T], Sequence[str]]) -> list[T]:
    """As many of the first items as fit into LARGEST_SHOWN characters, with all their texts."""
    left, found = LARGEST_SHOWN, []
    for item in items:
        left -= sum(map(len, texts(item))) + ITEM_CHARACTERS
        if left < 0:
            break
        found.append(item)
    return found


def whole(least: int, most: int) -> Callable[[Any], int]:
    """The parser of an option that takes a whole number."""

    def read(given: Any) -> int:
        text = str(given)
        if not re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", text) or not least <= int(text) <= most:
            raise typer.BadParameter(f"it is {echoed(text)}; allowed: a whole number from {least:,} to {most:,}")
        return int(text)

    return read


def seconds(given: Any) -> float:
    """The parser of an option that takes seconds."""
    text = str(given)
    if not re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}(\.[0-9]{{1,{MOST_DIGITS}}})?", text):
        raise typer.BadParameter(f"it is {echoed(text)}; allowed: seconds from 0, such as 10 or 0.5")
    return float(text)


def utc(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def pairs(given: list[str]) -> dict[str, str]:
    """`name=value` options as a dictionary."""
    found: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidParameters(f"--param {echoed(pair)}: it takes name=value")
        if name in found:
            raise InvalidParameters(f"--param {echoed(name)}: it is given twice; one value is allowed")
        found[name] = value
    return found


def instant(text: str, option: str, zone: ZoneInfo | None = None, age: str = "") -> datetime:
    """The instant of ISO 8601 text; without an offset it is in `zone`, or UTC. `age` is the end of the error's text."""
    try:
        if not re.fullmatch(r"[0-9W][0-9:,.TWZ +-]*", text):  # Python takes anything between the date and the time
            raise ValueError(text)
        parsed = datetime.fromisoformat(text)
        found = (parsed if parsed.tzinfo else parsed.replace(tzinfo=zone or UTC)).astimezone(UTC)
        if not 1900 < found.year < 9000:  # every zone can show it
            raise ValueError(text)
        return found
    except (ValueError, OverflowError):
        raise InvalidParameters(
            f"{option} is {echoed(text)}; allowed: ISO 8601, such as 2026-11-25T02:00 or 2026-11-25T02:00+09:00{age}"
        ) from None


def instant_or_age(text: str, option: str) -> datetime:
    """The instant of ISO 8601 text, or of an age such as `90s`, `30m`, `2h`, `7d`."""
    age = re.fullmatch(r"([0-9]+)([smhd])", text)
    if age is None:
        return instant(text, option, age=", or an age such as 2h or 7d")
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[age[2]]
    try:
        if len(age[1]) > MOST_DIGITS:
            raise OverflowError
        return clock.now() - timedelta(**{unit: int(age[1])})
    except OverflowError:
        raise InvalidParameters(f"{option} is {echoed(text)}; allowed: an age that lies after the year 1") from None
