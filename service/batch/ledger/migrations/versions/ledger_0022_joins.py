"""A run that is queued after its parts keeps its lane until its attempt goes on."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0022"
down_revision = "ledger_0021"
branch_labels = None
depends_on = None

JOINING = "state = 'queued' AND attempt > attempts_before"
HOLDS_LANE = sa.text("attempt > attempts_before AND state IN ('running', 'waiting', 'queued')")
FREE_LANE = 20_000
"""No run has a lane above this one yet."""


def upgrade() -> None:
    op.drop_index("uq_batch_runs_exclusive", "batch_runs")
    place = "row_number() OVER (PARTITION BY exclusive ORDER BY id) AS place"
    joining = f"SELECT id, {place} FROM batch_runs WHERE {JOINING}"
    lane = f"{FREE_LANE} + j.place"
    op.execute(f"UPDATE batch_runs SET rank = -1, lane = {lane} FROM ({joining}) AS j WHERE j.id = batch_runs.id")
    op.create_index(
        "uq_batch_runs_exclusive",
        "batch_runs",
        ["exclusive", "lane"],
        unique=True,
        sqlite_where=HOLDS_LANE,
        postgresql_where=HOLDS_LANE,
    )
