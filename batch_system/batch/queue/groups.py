"""start_all(): many runs in one transaction, and one run that follows when all of them have
ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncSession

from batch_system.batch.ledger.states import StartPriority
from batch_system.batch.ledger.waits import Gate
from batch_system.batch.queue import enqueue, session_starts
from batch_system.batch.queue.requests import StartRequest, Starts
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed

MOST_MEMBERS = 10_000


class Start:
    """A run to start: `Start(MailTask, to="ann")`. The arguments are those of `start()`."""

    def __init__(
        self,
        task: type[BaseTask],
        /,
        *,
        slot: datetime | None = None,
        at: datetime | None = None,
        delay: float | timedelta | None = None,
        priority: StartPriority | None = None,
        on: Literal["success", "end"] = "success",
        params: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """`on`: for a follow-up, whether it needs a success of all members, or only their end."""
        self.task = task
        self.on = on
        self._asked: dict[str, Any] = {"slot": slot, "at": at, "delay": delay, "params": params}
        self._asked["priority"] = priority
        self._given = given

    def checked(self, key: str | None = None) -> StartRequest:
        """The request, after its checks. Raises InvalidParameters."""
        return StartRequest.checked(TaskRegistry.of(self.task), self._given, key=key, **self._asked)


async def start_all(
    starts: Iterable[Start],
    *,
    then: Start | None = None,
    key: str | None = None,
    in_group: bool = False,
    session: AsyncSession | None = None,
) -> str | None:
    """Queue many runs in one transaction: all of them, or none. Returns the id of the run of
    `then`; None without it.

      await start_all([Start(MailTask, to=reader) for reader in readers], then=Start(ReportTask))

    Args:
      starts: At most 10,000.
      then: The follow-up: a run that waits for all of them. It is queued when all have succeeded,
          or with on="end" when all have ended. If one of them does not succeed, it is skipped; when
          a person then retries that run, it waits again. Without any `starts` it is queued at
          once.
      key: 1 to 200 characters, the key of the follow-up. If its task already has a run with this
          key, nothing is written, and the id of that run is returned.
      in_group: Whether the follow-up, or without one the runs, join the group of the calling run.
          Not with `session`.
      session: The runs exist if, and only if, the transaction of this session commits: see
          `start()`.

    Raises InvalidParameters before anything is written, UnknownTask if no service has loaded one of
    the tasks, DatabaseError if the ledger can't be reached, and with `in_group` LeaseLost if
    another node holds the calling run.
    """
    members = list(starts)
    if len(members) > MOST_MEMBERS:
        raise InvalidParameters(
            f"start_all(): {len(members):,} runs; allowed: at most {MOST_MEMBERS:,}"
        )
    for each in (*members, *([then] if then is not None else [])):
        if not isinstance(each, Start):
            raise InvalidParameters(
                f"start_all(): {echoed(each)} is not a Start; write Start(MailTask, to=…)"
            )
    if key is not None and then is None:
        raise InvalidParameters(
            "start_all(): key is the key of the follow-up, so it needs then=Start(…)"
        )
    if then is not None and then.on not in tuple(Gate):
        raise InvalidParameters(
            f"start_all(): on is {echoed(then.on)}; allowed: 'success' or 'end'"
        )
    requests = await offload(lambda: tuple(each.checked() for each in members))
    if not requests and then is None:
        return None
    follow_up = then.checked(key) if then is not None else None
    gate = then.on if then is not None else None
    asked = Starts(requests, follow_up, gate, in_group)
    run = await (enqueue.submit(asked) if session is None else session_starts.write(session, asked))
    return str(run) if then is not None else None
