"""What the calls of the dead man's switch came to, by the node that makes them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0030"
down_revision = "ledger_0029"
branch_labels = None
depends_on = None
oldest = "ledger_0027"

Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("batch_nodes", sa.Column("ping", Json))
