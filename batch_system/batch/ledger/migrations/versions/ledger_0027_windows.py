"""Which code may work with the ledger beside newer code: a table, and what the code of each node
knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0027"
down_revision = "ledger_0026"
branch_labels = None
depends_on = None
oldest = "ledger_0027"


def upgrade() -> None:
    op.create_table(
        "batch_windows",
        sa.Column("history", sa.String(100), nullable=False),
        sa.Column("oldest", sa.String(100), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("history"),
    )
    op.add_column("batch_nodes", sa.Column("ledger", sa.String(100)))
