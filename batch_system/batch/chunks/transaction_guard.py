"""Transaction guard: raises if the body of a chunk commits or rolls back the chunk's transaction.
Apart from chunks.py, because it knows only sessions of SQLAlchemy, no loop and no run.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from batch_system.errors import ChunkError


class Guard:
    """Watches the session of one chunk. Savepoints of the body are allowed.

    The chunk sets `is_committing` before its own commit, and `is_over` before it closes the
    session.
    """

    def __init__(self) -> None:
        self.is_committing = self.is_over = self._was_rolled_back = False

    def watch(self, session: Session, number: int) -> None:
        """Watch the session of the chunk with this number. The session's methods then raise
        ChunkError.
        """

        def before_commit(session: Session) -> None:
            if not (self.is_committing or session.in_nested_transaction()):
                raise ChunkError(
                    f"the body of chunk {number} calls commit(): leave it out, since the chunk is "
                    "committed at its end"
                )

        def after_soft_rollback(_: Session, transaction: SessionTransaction) -> None:
            self._was_rolled_back |= transaction.parent is None and not self.is_over

        def after_begin(_: Session, transaction: SessionTransaction, __: Any) -> None:
            if not transaction.nested:
                self.refuse_if_rolled_back(number)

        event.listen(session, "before_commit", before_commit)
        event.listen(session, "after_soft_rollback", after_soft_rollback)
        event.listen(session, "after_begin", after_begin)

    def refuse_if_rolled_back(self, number: int, is_active: bool = True) -> None:
        """Raise ChunkError if the transaction was rolled back, or the session is inactive after a
        failed flush.
        """
        if self._was_rolled_back or not is_active:
            raise ChunkError(
                f"chunk {number} was rolled back inside its block, by rollback() or by an error "
                "that was caught there: "
                "raise an error to roll back a chunk, and put what may fail into `async with "
                "db.begin_nested():`"
            )
