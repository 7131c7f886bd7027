"""Collects the outcomes, log lines and progress of a node's runs, writes them to the ledger in
groups, and counts them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock, failures
from batch_system.batch.context.progress import Progress
from batch_system.batch.execution import pings
from batch_system.batch.execution.attempt import Attempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger import attempts, database_time, run_logs, transitions
from batch_system.batch.ledger.attempts import EncodedOutcomes, Outcome
from batch_system.batch.ledger.parts import Split
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, Rank, RunState
from batch_system.batch.nodes import harm
from batch_system.batch.queue.gates import Closed
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.database import troubles
from batch_system.logs import get_logger
from batch_system.metrics.process import ProcessMetrics

logger = get_logger("batch_system.batch")

GROUP_LIMIT = 1_000
"""The most outcomes that are written in one transaction."""
MOST_BYTES = 32_000_000
"""The most bytes of log lines in the buffer. Further lines stay in the log buffers of their
attempts.
"""
PROGRESS_SECONDS = 0.5
"""How often the progress of the runs is written."""


@dataclass
class Group:
    """The outcomes, log blocks and progress that are written in one transaction."""

    outcomes: list[Outcome] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    progress: list[dict[str, Any]] = field(default_factory=list)
    packed: list[dict[str, Any]] = field(default_factory=list)
    """The blocks as rows with compressed lines, after `prepare`."""
    encoded: EncodedOutcomes | None = None
    """The outcomes in encoded form, after `encode`."""

    def __bool__(self) -> bool:
        return bool(self.outcomes or self.blocks or self.progress)

    def __str__(self) -> str:
        ends = [f"the end of run {outcome.id}" for outcome in self.outcomes]
        return ", ".join(ends + [f"lines of run {block.run}" for block in self.blocks])

    def parts(self) -> Iterator[Group]:
        """Yield a group for each outcome and each block. Progress is left out; it is reported again
        later.
        """
        yield from (Group(outcomes=[outcome]) for outcome in self.outcomes)
        yield from (Group(blocks=[block]) for block in self.blocks)

    def divided(self, free: Collection[str]) -> tuple[Group, Group]:
        """Split the group in two: one for the runs in `free`, with all log lines, and one for the
        rest. Progress of other runs is left out; it is reported again.
        """
        outcomes = [outcome for outcome in self.outcomes if outcome.id in free]
        progress = [row for row in self.progress if row["id"] in free]
        return (
            Group(outcomes, self.blocks, progress, self.packed),
            Group([outcome for outcome in self.outcomes if outcome.id not in free]),
        )

    @property
    def runs(self) -> list[str]:
        """The ids of the runs whose rows the group changes."""
        return sorted(
            {outcome.id for outcome in self.outcomes} | {row["id"] for row in self.progress}
        )

    def states_only(self) -> Group:
        """The outcomes without their results, errors and messages, for a database that refuses
        these.
        """
        reason = "its result, its error or its parts can't be stored"
        outcomes = []
        for o in self.outcomes:
            state = RunState.FAILED if o.split is not None else o.state
            because = reason if state == RunState.FAILED else None
            bare = replace(o, result=None, error=None, message=None, split=None, split_rows=None)
            outcomes.append(replace(bare, state=state, reason=because))
        return Group(outcomes)

    async def prepare(self, kind: str) -> None:
        """Compress the log lines and encode the outcomes. Call it before the transaction begins.

        `kind`: of the database.
        """
        self.packed = await offload(run_logs.pack, self.blocks) if self.blocks else []
        for outcome in self.outcomes:
            if outcome.split is not None and outcome.split.params and outcome.split_rows is None:
                outcome.split_rows = await offload(outcome.split.rows, kind)
        self.encode(kind)

    def encode(self, kind: str) -> None:
        """Encode the outcomes for a database of this kind, unless they are encoded already or need
        its time.
        """
        if (
            self.encoded is None
            and self.outcomes
            and all(outcome.due_at is None for outcome in self.outcomes)
        ):
            self.encoded = attempts.encode(self.outcomes, kind)

    async def write(self, connection: AsyncConnection) -> list[Outcome]:
        """Write the group in the caller's transaction. Returns the outcomes that were refused,
        because another node holds their runs.
        """
        outcomes = await harm.charge_suspects(connection, await self._due_by_the_ledger(connection))
        bounced = await transitions.finish(connection, outcomes, self.encoded)
        await run_logs.write(connection, self.packed)
        await attempts.write_progress(connection, self.progress)
        return bounced

    async def _due_by_the_ledger(self, connection: AsyncConnection) -> list[Outcome]:
        """The outcomes, with the instants of retries and resumes in database time.

        The clock of the database may have been set while the attempt was running.
        """
        if all(outcome.due_at is None for outcome in self.outcomes):
            return self.outcomes
        now = await database_time.now_of(connection)
        return [
            replace(o, due_at=now + (o.due_at - o.ended_at)) if o.due_at else o
            for o in self.outcomes
        ]


async def write_one_by_one(group: Group, write: Callable[[Group], Awaitable[None]]) -> None:
    """Write each part of a group separately, because the database has refused the group.

    If it refuses a part too, only the state of the run is written.
    """
    for part in group.parts():
        try:
            await write(part)
        except DBAPIError as error:
            if not troubles.is_refused(error):
                raise
            logger.error(f"{part} can't be stored as it is: {str(error).splitlines()[0]}")
            await write(part.states_only())


class WriteBuffer:
    """Collects the content of the next groups. A group that could not be written is put back."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._outcomes: list[Outcome] = []
        self._blocks: list[Block] = []
        self._bytes = 0
        self._progress_at = 0.0
        self._next: Group | None = None

    @property
    def waiting(self) -> int:
        """The number of outcomes that are not written yet."""
        return len(self._outcomes) + (len(self._next.outcomes) if self._next is not None else 0)

    def add_ending(self, attempt: Attempt, ending: Ending) -> None:
        """Add the outcome of an attempt that has ended, and its last log lines."""
        log = attempt.state.log
        self._add_blocks(_blocks(attempt, log.drop_lines if self._is_full else log.take_lines))
        self._outcomes.append(_outcome(attempt, ending, self._node))

    def take(self, attempts: Iterable[Attempt]) -> Group:
        """The next group: up to GROUP_LIMIT outcomes, and the new log lines and progress of
        `attempts`.

        A run that was split is written alone, because inserting its parts can take longer than all
        other outcomes.
        """
        if (group := self._next) is not None:
            self._next = None
            return group
        running = list(attempts)
        for attempt in running:
            if attempt.state.log.has_lines and not self._is_full:
                self._add_blocks(_blocks(attempt, attempt.state.log.take_lines))
        splits = (
            number for number, outcome in enumerate(self._outcomes) if outcome.split is not None
        )
        number = min(GROUP_LIMIT, max(1, next(splits, GROUP_LIMIT)))
        outcomes = self._outcomes[:number]
        self._outcomes = self._outcomes[number:]
        blocks = self._blocks
        self._blocks = []
        self._bytes = 0
        return Group(outcomes, blocks, self._take_progress(running))

    @property
    def has_next(self) -> bool:
        """Whether `prepare_next` has made the next group."""
        return self._next is not None

    def prepare_next(self, attempts: Iterable[Attempt], kind: str) -> None:
        """Make the group that `take` returns next, if it is full, while the database writes the
        previous one.

        `kind`: of the database.
        """
        if self._next is None and len(self._outcomes) >= GROUP_LIMIT:
            self._next = self.take(attempts)
            self._next.encode(kind)

    def put_back(self, group: Group) -> None:
        """Put a group that could not be written in front of everything collected since."""
        following = self._next or Group()
        self._next = None
        self._outcomes = group.outcomes + following.outcomes + self._outcomes
        newer = self._blocks
        self._blocks = []
        self._bytes = 0
        self._add_blocks(group.blocks + following.blocks + newer)

    @property
    def _is_full(self) -> bool:
        return self._bytes >= MOST_BYTES

    def _add_blocks(self, blocks: list[Block]) -> None:
        self._blocks += blocks
        self._bytes += sum(block.size for block in blocks)

    def _take_progress(self, attempts: list[Attempt]) -> list[dict[str, Any]]:
        if clock.monotonic() < self._progress_at + PROGRESS_SECONDS:
            return []
        self._progress_at = clock.monotonic()
        return progress_of(attempts)


def progress_of(attempts: Iterable[Attempt]) -> list[dict[str, Any]]:
    """The rows for `attempts.write_progress`: one for each attempt with progress that was not taken
    yet.
    """
    reports = [(attempt, attempt.state.meter.take()) for attempt in attempts]
    return [
        {
            "id": attempt.claimed.id,
            "fence": attempt.claimed.fence,
            "rate": progress.rate,
            **_progress(attempt, progress),
        }
        for attempt, progress in reports
        if progress is not None
    ]


def _blocks(attempt: Attempt, take: Callable[[], list[LogLine]]) -> list[Block]:
    """The lines of an attempt in blocks. `take`: the method of its log buffer that returns them."""
    claimed, blocks = attempt.claimed, []
    for lines in run_logs.split(take()):
        blocks.append(Block(claimed.id, claimed.fence, claimed.attempt, attempt.lines_taken, lines))
        attempt.lines_taken += len(lines)
    return blocks


def _outcome(attempt: Attempt, ending: Ending, node: str) -> Outcome:
    claimed, ended_at = attempt.claimed, attempt.ledger_time()
    is_interrupted = ending.state == RunState.INTERRUPTED
    is_final = ending.wait is None and not is_interrupted
    return Outcome(
        id=claimed.id,
        fence=claimed.fence,
        state=ending.state,
        outcome=ending.outcome,
        number=claimed.attempt,
        node=node,
        task=claimed.task,
        slot=claimed.slot,
        started_at=claimed.attempt_started_at,
        ended_at=ended_at,
        reason=ending.reason,
        result=ending.result,
        error=_facts(claimed, ending) if ending.error else None,
        due_at=None if is_final else ended_at + timedelta(seconds=ending.wait or 0),
        rank=Rank.INTERRUPTED if is_interrupted else None,
        fingerprint=ending.fingerprint,
        is_awaited=claimed.awaited_by is not None,
        part=claimed.part,
        split=_split(attempt, ending),
        harm=ending.harm,
        harm_is_proven=ending.harm_is_proven,
        **_progress(attempt, attempt.state.meter.latest()),
    )


def _split(attempt: Attempt, ending: Ending) -> Split | None:
    task = attempt.task
    if ending.state != RunState.WAITING or task.partition is None:
        return None
    return Split(task.partition.gate, task.queue_of_parts, ending.parts)


def _facts(claimed: Claimed, ending: Ending) -> dict[str, Any] | None:
    """The facts of the error. Those of a part include its fingerprint, with which its parent
    fails.
    """
    facts: dict[str, Any] | None = (
        failures.facts_of(ending.error) if ending.error is not None else None
    )
    if facts is not None and claimed.origin == Origin.PART:
        facts |= {"fingerprint": ending.fingerprint}
    return facts


def _progress(attempt: Attempt, progress: Progress | None) -> dict[str, Any]:
    """The values of PROGRESS_COLUMNS by column name. Empty if the attempt has reported no
    progress.
    """
    if progress is None:
        return {}
    started_at, at = attempt.claimed.attempt_started_at, None
    if progress.age is not None:
        at = max(started_at, attempt.ledger_time() - timedelta(seconds=progress.age))
    return {
        "count": progress.done,
        "total": progress.total,
        "count_before": progress.before,
        "message": progress.message,
        "progress_at": at,
    }


def count_ended(
    metrics: ProcessMetrics, attempt: Attempt, outcome: Outcome, is_refused: bool
) -> None:
    """Count an attempt that has ended. `is_refused`: another node holds the run, so the outcome is
    not in the ledger.
    """
    if is_refused:
        metrics.count_refused()
    else:
        seconds = (outcome.ended_at - outcome.started_at).total_seconds()
        goes_on = outcome.due_at is not None or outcome.split is not None
        state = None if goes_on else outcome.state.value
        metrics.count_attempt(outcome.task, outcome.outcome, seconds, state, attempt.claimed.origin)
    count_work(metrics, attempt)


def count_work(metrics: ProcessMetrics, attempt: Attempt) -> None:
    """Count the work of an attempt that the engine is about to forget, whether its outcome is in
    the ledger or not.
    """
    metrics.count_work(attempt.task.name, attempt.state.loops.done_here, attempt.state.log.dropped)


def report_closed(
    metrics: ProcessMetrics, tasks: Mapping[str, Task], closed: Sequence[Closed]
) -> None:
    """Report waiting runs that this node has closed to the metrics, the log and dead man's
    switches.

    Call it after the commit. `tasks`: those that the node has loaded.
    """
    for run in closed:
        metrics.count_run(run.task, run.state, run.origin)
        if run.state == RunState.FAILED:  # only a warning: the parts have logged errors
            logger.warning(f"{run.task} failed: {run.reason}", run=run.id)
        if (task := tasks.get(run.task)) is not None:
            pings.run_ended(task, run.state)
