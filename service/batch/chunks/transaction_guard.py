"""A chunk's transaction is the chunk's: its body neither commits it nor ends it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from service.errors import ChunkError


class Guard:
    """Watches one session, and raises ChunkError where its body takes the transaction into its own hands."""

    def __init__(self) -> None:
        self.is_committing = self.is_over = self._was_rolled_back = False

    def watch(self, session: Session, number: int) -> None:
        def before_commit(session: Session) -> None:
            if not (self.is_committing or session.in_nested_transaction()):
                raise ChunkError(
                    f"the body of chunk {number} commits by itself: leave commit() out, the end of the block does it"
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
        """A flush that failed leaves the session inactive."""
        if self._was_rolled_back or not is_active:
            raise ChunkError(
                f"chunk {number} was rolled back inside its block, by rollback() or by an error that was caught there: "
                "raise to roll back a chunk, and put what may fail into `async with db.begin_nested():`"
            )
