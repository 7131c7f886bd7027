"""The selection of tasks that a person pauses or mutes together."""

from __future__ import annotations

from pydantic import BaseModel, Field

from batch_system.errors import InvalidParameters
from batch_system.operations.asking.filter import PoolName, TaskName


class Selection(BaseModel):
    """All tasks, those of a pool, or those with a tag."""

    tag: TaskName | None = Field(None, description="The tasks that have this tag.")
    pool: PoolName | None = Field(None, description="The tasks of this pool.")
    all_tasks: bool = Field(False, description="All tasks.")

    @property
    def is_empty(self) -> bool:
        """Whether it names no tasks."""
        return self.tag is None and self.pool is None and not self.all_tasks

    def check(self) -> None:
        """Raises InvalidParameters if it names no tasks, or names them in two ways."""
        if sum((self.tag is not None, self.pool is not None, self.all_tasks)) != 1:
            raise InvalidParameters("name either a tag, a pool, or all tasks")
