"""Every error that this package raises on purpose.

    BatchError
    ├── DomainError             for authors: a rule of their domain was broken
    ├── RetryAfter              for authors: the attempt failed; says when the next one starts
    ├── InvalidSetting          a setting has a value that is not allowed
    ├── InvalidSchedule         a cron expression or time zone is not valid (also a ValueError)
    ├── InvalidTask             a task class that can't be registered
    ├── InvalidParameters       the parameters of a requested run don't fit the task's signature
    │   └── WrongState          the run or the task is in a state in which this can't be done
    ├── ChunkError              a chunk or a loop over chunks is used so that items would be lost
    ├── ProcessDied             the process of a run has ended before its run() had
    │   └── MemoryExceeded      a run used more than the `memory` of its task (also a MemoryError)
    ├── UnknownTask             no task has this name
    ├── UnknownRun              no run has this id, or several ids begin with it or end in it
    ├── NoLedger                there is no ledger yet, because no service has ever run
    ├── UnknownIncident         no incident has this id, or several open ones end in it
    ├── UnknownMaintenance      no maintenance window has this id
    ├── UnknownToken            no valid token has this name or id
    ├── UnknownPreview          no preview has this id, or it has expired
    ├── TooManyWaiting          as many runs of a key wait as the backlog of its limit allows
    ├── Forbidden               the role of the caller does not allow this
    ├── DatabaseError
    │   ├── DatabaseUnreachable no connection to the database could be opened
    │   │   └── DatabaseDamaged SQLite has found that the file of the database is damaged
    │   ├── DatabaseTooNew      the database has migrations that this code does not know
    │   ├── DatabaseTooOld      the database was made by code from before the first release
    │   ├── DatabaseInUse       the ledger must be migrated, but a process of an older version lives
    │   ├── DatabaseBusy        another connection held SQLite's write lock for too long
    │   ├── DamagedRow          a row of the ledger holds something that this code never writes
    │   ├── SecondWriter        a run that has a writing session on SQLite opened another one
    │   └── LeaseLost           an attempt without its run or lease, or abandoned, can't commit
    └── BackupError             a backup can't be made, read, compared, copied or restored
        ├── UnknownBackup       no backup has this name or address
        ├── PlaceUnreachable    the place of the backups does not answer, or refuses the keys
        └── DamagedBackup       a backup's file was changed or cut, or its rows can't be loaded

    Interrupted (BaseException) the service stops, and so does a run at its next checkpoint

A message says what is wrong and where, and what is allowed. Each class has a `kind`, by which a
program decides what to do: the command line maps kinds to exit codes, and an HTTP API maps them to
statuses.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from batch_system.escaping import brief, echoed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ErrorKind = Literal[
    "not_found", "invalid", "conflict", "unavailable", "damaged", "forbidden", "too_many"
]
"""What is wrong with a request: what it names does not exist; the request itself is not allowed; it
is not possible in the present state; a database or a place can't be used now; stored data is
damaged; the caller may not ask for it; or there is too much of it, and it may be asked for later.
"""

LONGEST_MESSAGE = 4_000
"""Longest message about data from outside, in characters."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint that names the most similar one of `names`; empty if none is similar."""
    from difflib import get_close_matches

    similar = get_close_matches(name[:100], list(names), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


class BatchError(Exception):
    """The base class of all errors that this package raises; `message` is its text for people."""

    kind: ClassVar[ErrorKind] = "invalid"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DomainError(BatchError):
    """For authors: raise it, or a subclass, if a rule of the domain is broken."""


class RetryAfter(BatchError):
    """For authors: raise it in a run to retry the run after `seconds` (a number or a timedelta),
    even if the task's `retry` does not name this error in `on`.

    The attempt counts. The task's `retry` limits the number of `attempts`, and the wait to
    `max_wait`.
    """

    def __init__(self, seconds: float | datetime.timedelta, message: str | None = None) -> None:
        self.seconds = (
            seconds.total_seconds() if isinstance(seconds, datetime.timedelta) else float(seconds)
        )
        super().__init__(message or f"retry after {self.seconds:g} s")

    def __reduce__(self) -> tuple[type[RetryAfter], tuple[float, str]]:
        return type(self), (self.seconds, self.message)


class InvalidSetting(BatchError):
    pass


class InvalidSchedule(BatchError, ValueError):
    pass


class InvalidTask(BatchError):
    pass


class InvalidParameters(BatchError):
    """`fields`: what is wrong with each single value, by its place: `note`, or `parameters.day` for
    a parameter of a task. It is empty if the error is not about single values.
    """

    def __init__(self, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.fields = dict(fields or {})


class WrongState(InvalidParameters):
    kind = "conflict"


class ChunkError(BatchError):
    pass


class ProcessDied(BatchError):
    kind = "unavailable"


class MemoryExceeded(ProcessDied, MemoryError):
    # Raised where the run has asked for too much, or by the process that has ended the run's
    # process.
    fingerprint = "memory exceeded"


class UnknownTask(BatchError):
    kind = "not_found"

    @classmethod
    def named(
        cls,
        name: str,
        names: Iterable[str],
        what: str = "no task is named {}",
        listed: str = "the tasks are:",
    ) -> Self:
        """The error about a name that no task has. It lists the `names`, and suggests a similar
        one.
        """
        known = sorted(names)
        return cls(
            f"{what.format(echoed(name))}{did_you_mean(name, known)}; {listed} "
            f"{', '.join(known) or 'none'}"
        )


class TooManyWaiting(BatchError):
    kind = "too_many"


class UnknownRun(BatchError):
    kind = "not_found"


class NoLedger(BatchError):
    kind = "unavailable"


class UnknownIncident(BatchError):
    kind = "not_found"


class UnknownMaintenance(BatchError):
    kind = "not_found"


class UnknownToken(BatchError):
    kind = "not_found"


class UnknownPreview(BatchError):
    kind = "not_found"


class Forbidden(BatchError):
    kind = "forbidden"


class DatabaseError(BatchError):
    kind: ClassVar[ErrorKind] = "unavailable"


class DatabaseUnreachable(DatabaseError):
    pass


class DatabaseDamaged(DatabaseUnreachable):
    """`file`: the path of the damaged file."""

    kind = "damaged"

    def __init__(self, message: str, file: str) -> None:
        super().__init__(message)
        self.file = file


class DatabaseTooNew(DatabaseError):
    pass


class DatabaseTooOld(DatabaseError):
    pass


class DatabaseInUse(DatabaseError):
    pass


class DatabaseBusy(DatabaseError):
    pass


class DamagedRow(DatabaseError):
    kind = "damaged"


class SecondWriter(DatabaseError):
    kind = "conflict"


class LeaseLost(DatabaseError):
    kind = "conflict"


WITHOUT_POOLER = (
    "backups and restores need a connection without a pooler; set BACKUP_DATABASE_URL to the "
    "address of the server itself"
)
"""The message of a BackupError about a pooler in transaction mode. It stands here because the
process that makes a backup does not import the settings.
"""


class BackupError(BatchError):
    """The message is cut to LONGEST_MESSAGE, because a file from outside may hold any number of
    names of any length.
    """

    kind: ClassVar[ErrorKind] = "conflict"

    def __init__(self, message: str) -> None:
        super().__init__(brief(message, LONGEST_MESSAGE))


class UnknownBackup(BackupError):
    kind = "not_found"


class PlaceUnreachable(BackupError):
    kind = "unavailable"


class DamagedBackup(BackupError):
    kind = "damaged"


class Interrupted(BaseException):
    """Raised by `checkpoint()` if the run has to stop here. The run is resumed later."""
