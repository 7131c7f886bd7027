"""Handle errors inside a task. An error logged with `exc_info` is in the log of the run, and in
Sentry if that is configured.

After a handled error the run has `succeeded`, and it is not tried again. That is right when the
next slot does the same work anyway. In most tasks it is better not to catch the error: then the run
has `failed`, the traceback is in the ledger, a Retry policy can try the run again, and Sentry
receives the error too. To handle only the errors that you expect, leave out the second `except`.
"""

from sqlalchemy import func, select

from batch_system import BaseTask, DomainError, TaskRegistry, get_db, get_logger
from service.application.models import Session

logger = get_logger(__name__)


class RobustTask(BaseTask):
    """Check that no session expires before it was created."""

    name = "robust_task"
    description = "Check that no session expires before it was created"
    schedule = "0 6 * * *"

    async def run(self) -> None:
        try:
            await self._process_data()
        except DomainError as error:
            logger.error(f"Domain error in {self.name}: {error.message}", exc_info=error)
        except Exception as error:
            logger.error(f"Unexpected error in {self.name}: {error}", exc_info=error)

    async def _process_data(self) -> None:
        wrong = select(func.count()).where(Session.expires_at < Session.created_at)
        async with get_db(readonly=True) as db:
            count = await db.scalar(wrong)
        if count:
            raise DomainError(f"{count} sessions expire before they were created")


TaskRegistry.register(RobustTask)
