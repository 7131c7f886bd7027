"""An outage of the ledger: which parts of a process have logged that they can't use it, and a line when it is over."""

from __future__ import annotations

import threading

from sqlalchemy.exc import DBAPIError

from service import clock
from service.database.engine import Database
from service.errors import DatabaseError
from service.logs import get_logger

logger = get_logger("service.batch")


class Outage:
    """Each part of a service notices an outage, and its end, for itself. Any thread may call the methods.

    SQLite may let one part read while another one waits for the write lock, so the outage lasts until all parts that
    have noticed it can work again.
    """

    def __init__(self) -> None:
        self._parts: set[str] = set()
        self._began_at = 0.0
        self._lock = threading.Lock()

    def cause_for(self, part: str, ledger: Database, error: BaseException) -> str | None:
        """Why this part can't use the ledger, in one line for a log. None if the error is not about the ledger."""
        if not isinstance(error, DBAPIError | DatabaseError | OSError):
            return None
        self.noticed_by(part)
        return ledger.why(error)

    def noticed_by(self, part: str) -> None:
        """This part can't use the ledger, and logs that."""
        with self._lock:
            if not self._parts:
                self._began_at = clock.boottime()
            self._parts.add(part)

    def over_for(self, part: str) -> None:
        """This part can use the ledger. Logs that the outage is over, if it was the last part that could not."""
        if part not in self._parts:
            return
        with self._lock:
            self._parts.remove(part)
            is_over, seconds = not self._parts, clock.boottime() - self._began_at
        if is_over:
            logger.info(f"the ledger is reachable again after {max(1, round(seconds))} s")
