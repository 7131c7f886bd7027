"""Handle errors inside a task: what is logged with `exc_info` stands in the run's log, and in Sentry if it is set up.

An error that is handled is over: the run has `succeeded`, and is not tried again. Handle it so where the next slot
makes good for this one. In most tasks it is better to let it fly. Then the run has `failed`, with the traceback in the
ledger; a Retry policy tries it again; and Sentry gets it just the same. Or handle what you know how to handle, and let
the rest fly: leave out the second `except`.
"""

from sqlalchemy import func, select

from service import BaseTask, DomainError, TaskRegistry, get_db, get_logger
from service.application.models import Session

logger = get_logger(__name__)


class RobustTask(BaseTask):
    """Check that no session ends before it begins."""

    name = "robust_task"
    description = "Check that no session ends before it begins"
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
            raise DomainError(f"{count} sessions end before they begin")


TaskRegistry.register(RobustTask)
