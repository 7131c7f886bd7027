"""How many runs each node executes at once, which the pages show."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0017"
down_revision = "ledger_0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_nodes", sa.Column("capacity", sa.Integer))
