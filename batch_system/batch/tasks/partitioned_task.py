"""PartitionedTask: a task whose runs are split into parts, which run side by side, on all nodes
together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from batch_system.batch.context.current_run import current_run, state_of
from batch_system.batch.context.upstream import Done
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.partitions import Part, Stage


class PartitionedTask(BaseTask):
    """A task in three stages: `split()` makes parts, `work()` does one of them, `join()` follows
    when all have succeeded.

    Each part is a run of its own, with its own attempts, log, progress and chunks. A retry of the
    run executes only the parts that did not succeed.

    Attributes:
      parallel: How many parts of the task may run at once, on all nodes together.
      fail_fast: Whether the first part that fails cancels the others. Otherwise all parts run to
          their end.
    """

    parallel: ClassVar[int] = 8
    fail_fast: ClassVar[bool] = False

    @abstractmethod
    def split(self, *args: Any, **parameters: Any) -> Any:
        """`async def split(self) -> list[Part]`: the parts, at most 10,000. Its parameters are
        those of a run.

        It is called once per run. The parts are stored, and computed again only if a person runs it
        from the beginning.
        """

    @abstractmethod
    def work(self, part: Part) -> Any:
        """Do one part. Loops in chunks, steps and everything else work as in `run()`, within the
        part.

        The returned value is the result of the part, which `join()` gets.
        """

    def join(self, parts: list[Done]) -> Any:
        """Called once, when all parts have succeeded: `parts` has their results. It returns the
        result of the run.
        """
        return None

    def _methods_with_parameters(self) -> tuple[Callable[..., Any], ...]:
        return self.run, self.split

    def run(self, *args: Any, **parameters: Any) -> Any:
        """Call the method of the current stage, which the service decides."""
        return getattr(self, state_of(current_run()).stage or Stage.SPLIT)(**parameters)
