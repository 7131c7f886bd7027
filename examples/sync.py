"""A run that is not async executes in a thread of its own, so it may block: for example on files,
or in libraries without async.

`call_db` gives it the database: it calls a function with a session, like that of `async with
get_db()`, while the thread waits. The function should only query and return; do work that takes
long afterwards, in the thread.
"""

import csv
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session as DbSession

from batch_system import BaseTask, TaskRegistry, call_db, get_logger
from service.application.models import User

logger = get_logger(__name__)


class SyncTask(BaseTask):
    """Write the users into a CSV file."""

    name = "sync_task"
    description = "Write the users into a CSV file"
    schedule = "0 11 * * *"

    def run(self, file: Path = Path("users.csv")) -> int:
        rows = call_db(self._rows, readonly=True)
        part = file.with_name(f"{file.name}.part")
        with part.open("w", newline="", encoding="utf-8") as part_file:
            writer = csv.writer(part_file)
            writer.writerow(["id", "email"])
            writer.writerows(rows)
        part.replace(file)  # so that no reader ever sees half of the file
        logger.info(f"Wrote {len(rows)} users into {file}")
        return len(rows)

    def _rows(self, db: DbSession) -> list[tuple[int, str]]:
        return [
            (user, email)
            for user, email in db.execute(select(User.id, User.email).order_by(User.id))
        ]


TaskRegistry.register(SyncTask)
