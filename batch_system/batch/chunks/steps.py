"""`self.step("name")`: a part of a run that later attempts do not repeat once it is done."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Self

from pydantic_core import PydanticSerializationError, to_json
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import clock
from batch_system.batch.context import current_run, fencing
from batch_system.database import sql
from batch_system.database.companions import checkpoints
from batch_system.database.session import application_database
from batch_system.errors import ChunkError

INSERT = sql.statement(
    "INSERT INTO batch_checkpoints (run, name, fence, finished, result, at) "
    "VALUES (:run, :name, :fence, :finished, :result, :at) ON CONFLICT (run, name) DO NOTHING "
    "RETURNING fence",
    run=checkpoints.c.run,
    finished=checkpoints.c.finished,
    result=checkpoints.c.result,
    at=checkpoints.c.at,
)


class Step:
    """`async with self.step("totals") as step:`, and in it `if not step.is_done: step.result = …`.

    Attributes:
        is_done: Whether an earlier attempt of the run has completed the step.
        result: Any value that JSON can hold. The body sets it; a later attempt finds it here, as
            read from JSON.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_done = False
        self.result: Any = None
        self._database = application_database()
        self._run = current_run.current_run_if_any()
        self._row = name
        self._db: AsyncSession | None = None
        if self._run is not None:
            if self._database.kind not in fencing.KINDS:
                raise ChunkError(
                    f"step() needs SQLite or PostgreSQL, and DATABASE_URL is {self._database.kind}"
                )
            self._row = current_run.state_of(self._run).loops.name("step", name)

    @property
    def db(self) -> AsyncSession:
        """A session whose changes are committed together with the step's result. Raises ChunkError
        if the step is done.
        """
        if self.is_done:
            raise ChunkError(
                f"step {self.name!r} is done already: use its session under `if not step.is_done:` "
                "only"
            )
        if self._db is None:
            self._db = self._database.session()
            self._db.info["advice"] = "wait for anything else before the first use of `step.db`"
        return self._db

    async def __aenter__(self) -> Self:
        if self._run is None:
            return self
        self._run.checkpoint()
        query = select(checkpoints.c.result).where(
            checkpoints.c.run == self._run.id, checkpoints.c.name == self._row
        )
        async with self._database.reader.connect() as connection:
            row = (await connection.execute(query)).first()
        if row is not None:
            self.is_done = True
            self.result = row.result
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None and not self.is_done:
                await self._complete()
        finally:
            if self._db is not None:
                await asyncio.shield(self._db.close())

    async def _complete(self) -> None:
        self.result = self._as_json()
        if self._run is not None:
            await self.db.flush()
            values = {
                "run": self._run.id,
                "name": self._row,
                "fence": self._run.fence,
                "finished": True,
            }
            result = await self.db.execute(
                INSERT, {**values, "result": self.result, "at": clock.now()}
            )
            if result.first() is None:
                raise ChunkError(
                    f"step {self.name!r} is already completed, by a commit whose reply was lost"
                )
        if self._db is not None:
            await self._db.commit()
        self.is_done = True

    def _as_json(self) -> Any:
        try:
            return json.loads(to_json(self.result))
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            raise ChunkError(
                f"the result of step {self.name!r} can't be kept as JSON: {error}"
            ) from None
