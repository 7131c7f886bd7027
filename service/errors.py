"""Every error that this package raises on purpose.

    BatchError
    ├── DomainError             for authors: a rule of their domain was broken; carries `message`
    ├── RetryAfter              for authors: the attempt failed, and is to be tried again after so many seconds
    ├── InvalidSetting          a setting has a value that is not allowed
    ├── InvalidSchedule         a cron expression or a time zone that can't be used (also a ValueError)
    ├── InvalidTask             a task class that can't be registered
    ├── InvalidParameters       a run was asked for with parameters that its signature refuses
    ├── ChunkError              a loop over chunks, or a chunk of it, was used in a way that would lose or double items
    ├── UnknownTask             no task of that name is loaded
    ├── UnknownRun              no run has this id, or several have ids that begin so
    ├── DatabaseError
    │   ├── DatabaseUnreachable no connection could be made
    │   ├── DatabaseTooNew      the database's migrations are newer than this code
    │   ├── DatabaseInUse       a process of an older version lives, and the ledger has to be migrated
    │   ├── DatabaseBusy        SQLite's one write lock stayed taken for too long
    │   ├── SecondWriter        a run that holds a writing session asked SQLite for another one
    │   └── LeaseLost           an attempt that lost its run or its lease, or was given up, can't commit any more
    └── BackupError             a backup could not be made, read, compared, copied or restored; nothing was lost
        └── DamagedBackup       a backup is not what was written, or its rows don't load

    Interrupted (BaseException) a run stops at a checkpoint because the service does; `except Exception` can't eat it

Messages name what was wrong, where, and what is allowed.
"""

from __future__ import annotations

import datetime

from service.escaping import brief

LONGEST_MESSAGE = 4_000
"""Characters of what is said about something from outside."""


class BatchError(Exception):
    """The root of the tree; `message` is what a person reads."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DomainError(BatchError):
    """For authors: raise it, or a subclass, when a rule of the domain is broken."""


class RetryAfter(BatchError):
    """For authors: raise it in a run to have it tried again after so many seconds (or a timedelta), whatever `on` says.

    It counts as an attempt. The wait is at most `max_wait` of the task's `retry`, whose `attempts` hold too.
    """

    def __init__(self, seconds: float | datetime.timedelta, message: str | None = None) -> None:
        self.seconds = seconds.total_seconds() if isinstance(seconds, datetime.timedelta) else float(seconds)
        super().__init__(message or f"to be tried again after {self.seconds:g} s")

    def __reduce__(self) -> tuple[type[RetryAfter], tuple[float, str]]:
        return type(self), (self.seconds, self.message)


class InvalidSetting(BatchError):
    pass


class InvalidSchedule(BatchError, ValueError):
    pass


class InvalidTask(BatchError):
    pass


class InvalidParameters(BatchError):
    pass


class ChunkError(BatchError):
    pass


class UnknownTask(BatchError):
    pass


class UnknownRun(BatchError):
    pass


class DatabaseError(BatchError):
    pass


class DatabaseUnreachable(DatabaseError):
    pass


class DatabaseTooNew(DatabaseError):
    pass


class DatabaseInUse(DatabaseError):
    pass


class DatabaseBusy(DatabaseError):
    pass


class SecondWriter(DatabaseError):
    pass


class LeaseLost(DatabaseError):
    pass


class BackupError(BatchError):
    """A file from elsewhere may have names of any length, and any number of them: what is said is cut."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message, LONGEST_MESSAGE))


class DamagedBackup(BackupError):
    pass


class Interrupted(BaseException):
    """Raised by `checkpoint()` when the run must stop here and will be resumed later."""
