"""What each node says is wrong with it: the reasons of its `/readyz`."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0025"
down_revision = "ledger_0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_nodes", sa.Column("troubles", sa.JSON().with_variant(postgresql.JSONB(), "postgresql")))
