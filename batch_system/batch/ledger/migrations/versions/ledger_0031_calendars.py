"""How the author has written an expression with `H`."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0031"
down_revision = "ledger_0029"
branch_labels = None
depends_on = None
oldest = "ledger_0027"


def upgrade() -> None:
    op.add_column("batch_schedules", sa.Column("given", sa.Text))
