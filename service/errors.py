"""Every error that this package raises on purpose.

    BatchError
    ├── DomainError             for authors: a rule of their domain was broken; carries `message`
    ├── InvalidSetting          a setting has a value that is not allowed
    ├── InvalidSchedule         a cron expression or a time zone that can't be used (also a ValueError)
    ├── InvalidTask             a task class that can't be registered
    ├── InvalidParameters       a run was asked for with parameters that its signature refuses
    ├── UnknownTask             no task of that name is loaded
    ├── UnknownRun              no run has this id, or several have ids that begin so
    ├── DatabaseError
    │   ├── DatabaseUnreachable no connection could be made
    │   ├── DatabaseTooNew      the database's migrations are newer than this code
    │   ├── DatabaseBusy        SQLite's one write lock stayed taken for too long
    │   └── SecondWriter        a run that holds a writing session asked SQLite for another one
    └── BackupError             a backup could not be made; nothing was lost

    Interrupted (BaseException) a run stops at a checkpoint because the service does; `except Exception` can't eat it

Messages name what was wrong, where, and what is allowed.
"""

from __future__ import annotations


class BatchError(Exception):
    """The root of the tree; `message` is what a person reads."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DomainError(BatchError):
    """For authors: raise it, or a subclass, when a rule of the domain is broken."""


class InvalidSetting(BatchError):
    pass


class InvalidSchedule(BatchError, ValueError):
    pass


class InvalidTask(BatchError):
    pass


class InvalidParameters(BatchError):
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


class DatabaseBusy(DatabaseError):
    pass


class SecondWriter(DatabaseError):
    pass


class BackupError(BatchError):
    pass


class Interrupted(BaseException):
    """Raised by `checkpoint()` when the run must stop here and will be resumed later."""
