"""Records the chunks that runs commit, and reports them to the kill if the test has requested
one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from batch_system.batch.context.attempt_state import Loop, Loops
from batch_system.batch.context.current_run import current_run, state_of
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.states import RunState
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import Task
from batch_system.testing.kills import Kill
from batch_system.testing.records import CommittedChunk


class RecordedLoops(Loops):
    """The loops of an attempt, which call `on_commit` with a loop's name, a chunk's number and its
    items.
    """

    def __init__(self, on_commit: Callable[[str, int, list[Any]], None]) -> None:
        super().__init__()
        self._on_commit = on_commit

    def committed(self, loop: Loop, number: int, items: list[Any]) -> None:
        super().committed(loop, number, items)
        self._on_commit(loop.name, number, items)


class Recorder:
    """The chunks of each run, in the order of their commits.

    Attributes:
      kill: The kill that the test has requested, if any.
    """

    def __init__(self) -> None:
        self.chunks: defaultdict[str, list[CommittedChunk]] = defaultdict(list)
        self.kill: Kill | None = None

    def prepare(self, task: Task, instance: BaseTask) -> None:
        """Make the attempt that has just created `instance` record its chunks, and let a kill
        freeze its `run()`.
        """
        run = current_run()
        state_of(run).loops = RecordedLoops(partial(self._committed, run.id))
        if self.kill is not None:
            self.kill.prepare(instance)

    @contextmanager
    def killing(
        self, run: str, after_chunk: int | None, after_part: int | None, on_kill: Callable[[], None]
    ) -> Iterator[Kill]:
        """Within this block, kill `run` when it has come this far (see Kill), and then call
        `on_kill`.
        """
        self.kill = Kill(run, after_chunk, on_kill, after_part)
        try:
            with self.kill.freezing_tasks():
                yield self.kill
        finally:
            self.kill = None

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """Report to the kill which parts have succeeded."""
        for outcome in outcomes:
            if (
                self.kill is not None
                and outcome.part is not None
                and outcome.state == RunState.SUCCEEDED
            ):
                self.kill.part_succeeded()

    def _committed(self, run: str, loop: str, number: int, items: list[Any]) -> None:
        name = loop.partition(":")[2]  # without its prefix, the kind of the position: "chunks:"
        self.chunks[run].append(CommittedChunk(name, number, list(items)))
        if self.kill is not None:
            self.kill.committed(run)
