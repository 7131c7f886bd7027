"""Indexes for the night: runs by hand, and the buckets with slots that have not succeeded."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0015"
down_revision = "ledger_0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    by_hand = sa.text("origin = 'manual'")
    op.create_index(
        "ix_batch_runs_by_hand", "batch_runs", ["created_at"], sqlite_where=by_hand, postgresql_where=by_hand
    )
    others = sa.text("failed + cancelled + skipped + missed + paused + active + unaccounted > 0")
    op.create_index(
        "ix_batch_tally_not_all_good", "batch_tally", ["bucket"], sqlite_where=others, postgresql_where=others
    )
