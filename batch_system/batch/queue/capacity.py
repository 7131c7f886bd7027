"""How many more runs this process could start right now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from batch_system.batch.tasks.registry import Task
from batch_system.settings.pools import DEFAULT_POOL

OWN_POOLS: Mapping[str, int | None] = {DEFAULT_POOL: None}


@dataclass
class Capacity:
    """How many more runs this node could start right now.

    Attributes:
      runs: The number in all.
      threads: How many of them in threads.
      pools: The pools whose runs the node claims, each with the number of further child
          processes; None if its runs execute on the event loop and in threads.
    """

    runs: int
    threads: int
    pools: dict[str, int | None] = field(default_factory=lambda: dict(OWN_POOLS))

    def has_room(self, task: Task) -> bool:
        """Whether a run of the task could start."""
        if self.runs < 1 or task.pool not in self.pools:
            return False
        children = self.pools[task.pool]
        return task.on_loop or self.threads > 0 if children is None else children > 0

    def holds(self, tasks: Mapping[str, Task], numbers: Mapping[str, int]) -> bool:
        """Whether this many runs of each task could start. `tasks`: those that the node has loaded,
        by name.
        """
        if sum(numbers.values()) > self.runs or not numbers.keys() <= tasks.keys():
            return False
        left = replace(self, pools=dict(self.pools))
        return all(
            left.take(tasks[name]) for name, number in numbers.items() for _ in range(number)
        )

    def take(self, task: Task) -> bool:
        """Reserve capacity for a run of the task. Returns False if none is left."""
        if not self.has_room(task):
            return False
        self.runs -= 1
        children = self.pools[task.pool]
        if children is not None:
            self.pools[task.pool] = children - 1
        elif not task.on_loop:
            self.threads -= 1
        return True
