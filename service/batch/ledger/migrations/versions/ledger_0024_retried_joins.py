"""A run whose join is tried again no longer goes before runs that are queued for theirs, and have a lane."""

from alembic import op

revision = "ledger_0024"
down_revision = "ledger_0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("UPDATE batch_runs SET rank = 0 WHERE rank = -1 AND state = 'retrying'")
