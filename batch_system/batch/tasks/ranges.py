"""ranges(): splits a select by its key into parts of about the same number of rows."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Select, func, literal, select

from batch_system.batch.chunks.keys import Key
from batch_system.batch.tasks.partitions import MOST_PARTS, Part
from batch_system.database.session import application_database
from batch_system.errors import ChunkError
from batch_system.escaping import echoed


async def ranges(statement: Select[*tuple[Any, ...]], *, key: Any, parts: int) -> list[Part]:
    """Make parts of a select, for `split()`: each has a `start` and a `stop`, as `chunks()` takes
    them.

      async def split(self) -> list[Part]:
          return await ranges(select(Product), key=Product.id, parts=64)

      async def work(self, part: Part) -> None:
          async for chunk in self.chunks(select(Product), key=Product.id, **part):
              ...

    The first part has no start and the last one no stop, so rows that are added later belong to one
    of them. There are fewer parts if there are fewer rows; without any row there is one.

    Args:
      statement: A select without ORDER BY and LIMIT.
      key: The column that identifies and orders the rows, ascending. One pass over its index
          finds the bounds.
      parts: How many parts, from 1 to 10,000.

    Raises ChunkError.
    """
    if isinstance(parts, bool) or not isinstance(parts, int) or not 1 <= parts <= MOST_PARTS:
        raise ChunkError(
            f"ranges(): parts is {echoed(parts)}; allowed: an int from 1 to {MOST_PARTS:,}"
        )
    columns = Key(statement, key).columns
    if len(columns) > 1 or columns[0].descends:
        raise ChunkError(
            "ranges(): key has several columns, or a descending one; allowed: one column, ascending"
        )
    column = columns[0].column
    keys = statement.with_only_columns(column.label("key"), maintain_column_froms=True)
    async with application_database().session(readonly=True) as db:
        rows = (await db.execute(select(func.count()).select_from(keys.subquery()))).scalar_one()
        if not rows:
            return [Part(start=None, stop=None)]
        place = (func.row_number().over(order_by=column) - 1).label("place")
        numbered = statement.with_only_columns(
            column.label("key"), place, maintain_column_froms=True
        ).subquery()
        share = literal(min(parts, rows), BigInteger)
        begins = (numbered.c.place * share) % literal(
            rows, BigInteger
        ) < share  # a multiple of rows / parts was passed
        bounds = select(numbered.c.key).where(numbered.c.place > 0, begins).order_by(numbered.c.key)
        stops = list((await db.execute(bounds)).scalars())
    return [
        Part(start=start, stop=stop)
        for start, stop in zip([None, *stops], [*stops, None], strict=True)
    ]
