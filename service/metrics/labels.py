"""The names of tasks as labels, in limited number, so that many tasks do not make the metrics
large.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_TASKS = 1_000
"""How many tasks have labels of their own."""

OTHER = "other"
"""The label of all further tasks together."""


class TaskLabels:
    """Gives each of the first MOST_TASKS tasks its name as a label, which it keeps while the
    service lives.
    """

    def __init__(self, most: int = MOST_TASKS) -> None:
        self._most = most
        self._named: set[str] = set()

    def admit(self, tasks: Iterable[str]) -> None:
        """Give labels to these tasks, in the order of their names, as long as there are any
        left.
        """
        for task in sorted(set(tasks) - self._named):
            if len(self._named) >= self._most:
                return
            self._named.add(task)

    def of(self, task: str) -> str:
        """The label of a task: its name, or OTHER. A task that was not admitted yet gets a label if
        one is left.
        """
        if task not in self._named and len(self._named) < self._most:
            self._named.add(task)
        return task if task in self._named else OTHER
