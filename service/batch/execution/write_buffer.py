"""What a node still has to write about its runs: how they ended, what they logged, how far they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock, failures
from service.batch.context.progress import Progress
from service.batch.execution.attempt import Attempt, Ending
from service.batch.ledger import database_time, run_logs, runs, transitions
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.run_logs import Block, LogLine
from service.batch.ledger.states import Rank, RunState
from service.concurrency.offload import offload
from service.logs import get_logger

GROUP_LIMIT = 1_000
MOST_BYTES = 32_000_000
"""Of lines that wait for the ledger, all runs together. What comes then waits in its run, and is bounded there."""
PROGRESS_SECONDS = 0.5
FEW = 20

logger = get_logger("service.batch")


@dataclass
class Entry:
    """One group, written in one transaction."""

    outcomes: list[Outcome] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    progress: list[dict[str, Any]] = field(default_factory=list)
    packed: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.outcomes or self.blocks or self.progress)

    def __str__(self) -> str:
        ends = [f"the end of run {outcome.id}" for outcome in self.outcomes]
        return ", ".join(ends + [f"lines of run {block.run}" for block in self.blocks])

    def parts(self) -> Iterator[Entry]:
        """Each of its rows for itself, but for the progress, which is of the moment."""
        yield from (Entry(outcomes=[outcome]) for outcome in self.outcomes)
        yield from (Entry(blocks=[block]) for block in self.blocks)

    def bare(self) -> Entry:
        """What must be written in any case: the states."""
        lost = "its result or error can't be stored"
        return Entry(
            [
                replace(o, result=None, error=None, message=None, reason=lost if o.state == RunState.FAILED else None)
                for o in self.outcomes
            ]
        )

    async def prepare(self) -> None:
        """Compress the lines, before a transaction is open."""
        self.packed = await offload(run_logs.pack, self.blocks) if self.blocks else []

    async def write(self, connection: AsyncConnection) -> list[Outcome]:
        """Returns the outcomes that bounced, because another node holds their run."""
        bounced = await transitions.finish(connection, await self._due_by_the_ledger(connection))
        await run_logs.write(connection, self.packed)
        await runs.mirror_progress(connection, self.progress)
        return bounced

    async def _due_by_the_ledger(self, connection: AsyncConnection) -> list[Outcome]:
        """What goes on later is claimed by the ledger's time, and that may have stepped while the attempt went on."""
        if all(outcome.due_at is None for outcome in self.outcomes):
            return self.outcomes
        now = await database_time.now_of(connection)
        return [replace(o, due_at=now + (o.due_at - o.ended_at)) if o.due_at else o for o in self.outcomes]


class Journal:
    """Collects between two groups. What could not be written is put back, and goes with the next one."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._outcomes: list[Outcome] = []
        self._blocks: list[Block] = []
        self._bytes = 0
        self._progress_at = 0.0

    @property
    def waiting(self) -> int:
        """Outcomes that are not written yet."""
        return len(self._outcomes)

    def ended(self, attempt: Attempt, ending: Ending) -> None:
        self._keep(_blocks(attempt, attempt.state.log.take_lines if self._has_room else attempt.state.log.drop_lines))
        self._outcomes.append(_outcome(attempt, ending, self._node))

    def take(self, attempts: Iterable[Attempt]) -> Entry:
        """The next group: outcomes up to a limit, and what the running attempts have logged since."""
        running = list(attempts)
        for attempt in running:
            if self._has_room:
                self._keep(_blocks(attempt, attempt.state.log.take_lines))
        outcomes, self._outcomes = self._outcomes[:GROUP_LIMIT], self._outcomes[GROUP_LIMIT:]
        blocks, self._blocks, self._bytes = self._blocks, [], 0
        return Entry(outcomes, blocks, self._take_progress(running))

    def put_back(self, entry: Entry) -> None:
        self._outcomes = entry.outcomes + self._outcomes
        newer, self._blocks, self._bytes = self._blocks, [], 0
        self._keep(entry.blocks + newer)

    @property
    def _has_room(self) -> bool:
        return self._bytes < MOST_BYTES

    def _keep(self, blocks: list[Block]) -> None:
        self._blocks += blocks
        self._bytes += sum(block.size for block in blocks)

    def _take_progress(self, attempts: list[Attempt]) -> list[dict[str, Any]]:
        if clock.monotonic() < self._progress_at + PROGRESS_SECONDS:
            return []
        self._progress_at = clock.monotonic()
        return progress_of(attempts)


def progress_of(attempts: Iterable[Attempt]) -> list[dict[str, Any]]:
    """What `runs.mirror_progress` has to be told of these attempts since it was told last."""
    made = [(attempt, attempt.state.meter.take()) for attempt in attempts]
    return [
        {"id": attempt.claimed.id, "fence": attempt.claimed.fence, "rate": new.rate, **_progress(attempt, new)}
        for attempt, new in made
        if new is not None
    ]


def _blocks(attempt: Attempt, take: Callable[[], list[LogLine]]) -> list[Block]:
    """`take`: how its run gives its lines."""
    claimed, made = attempt.claimed, []
    for lines in run_logs.split(take()):
        made.append(Block(claimed.id, claimed.fence, claimed.attempt, attempt.lines_taken, lines))
        attempt.lines_taken += len(lines)
    return made


def _outcome(attempt: Attempt, ending: Ending, node: str) -> Outcome:
    claimed, ended_at = attempt.claimed, attempt.ledger_time()
    interrupted = ending.state == RunState.INTERRUPTED
    is_over = ending.wait is None and not interrupted
    return Outcome(
        id=claimed.id,
        fence=claimed.fence,
        state=ending.state,
        outcome=ending.outcome,
        number=claimed.attempt,
        node=node,
        task=claimed.task,
        started_at=claimed.attempt_started_at,
        ended_at=ended_at,
        reason=ending.reason,
        result=ending.result,
        error=failures.facts_of(ending.error) if ending.error else None,
        due_at=None if is_over else ended_at + timedelta(seconds=ending.wait or 0),
        rank=Rank.INTERRUPTED if interrupted else None,
        **_progress(attempt, attempt.state.meter.latest()),
    )


def _progress(attempt: Attempt, made: Progress | None) -> dict[str, Any]:
    """The values of PROGRESS_COLUMNS, if something was said."""
    if made is None:
        return {}
    since, at = attempt.claimed.attempt_started_at, None
    if made.age is not None:
        at = max(since, attempt.ledger_time() - timedelta(seconds=made.age))
    return {
        "count": made.done,
        "total": made.total,
        "count_before": made.before,
        "message": made.message,
        "progress_at": at,
    }


def tell(outcomes: list[Outcome]) -> None:
    """A line for each run where they are few; else one for all. Those that went wrong have said so themselves."""
    if len(outcomes) > FEW:
        counts = Counter(outcome.outcome for outcome in outcomes)
        logger.info(", ".join(f"{number:,} runs {outcome}" for outcome, number in counts.items()))
        return
    for outcome in outcomes:
        if outcome.state == RunState.SUCCEEDED:
            seconds = (outcome.ended_at - outcome.started_at).total_seconds()
            logger.info(f"{outcome.task} {outcome.outcome} in {seconds:.2f} s", run=outcome.id)
