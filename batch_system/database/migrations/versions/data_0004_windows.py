"""Which code may work with these tables, and with those of the application, beside newer code."""

import sqlalchemy as sa
from alembic import op

revision = "data_0004"
down_revision = "data_0003"
branch_labels = None
depends_on = None
oldest = "data_0004"
with_ledger = "ledger_0027"


def upgrade() -> None:
    op.create_table(
        "batch_data_windows",
        sa.Column("history", sa.String(100), nullable=False),
        sa.Column("oldest", sa.String(100), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("history"),
    )
