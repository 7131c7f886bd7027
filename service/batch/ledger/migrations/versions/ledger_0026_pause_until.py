"""When a pause of a task ends by itself."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0026"
down_revision = "ledger_0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("paused_until", sa.DateTime(timezone=True)))
