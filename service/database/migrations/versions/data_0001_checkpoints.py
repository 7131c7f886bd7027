"""Places of loops, fences, and what was done once: beside the authors' data, since they commit with it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "data_0001"
down_revision = None
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "batch_checkpoints",
        sa.Column("run", Id, nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("cursor", Json, nullable=True),
        sa.Column("count", sa.BigInteger(), nullable=True),
        sa.Column("finished", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("result", Json, nullable=True),
        sa.Column("at", Instant, nullable=True),
        sa.PrimaryKeyConstraint("run", "name"),
    )
    op.create_table(
        "batch_once",
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("run", Id, nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
