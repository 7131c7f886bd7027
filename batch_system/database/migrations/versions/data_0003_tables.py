"""Our tables beside the authors' data, with which they commit, as the first release makes them.

They hold the places of loops and their fences, what was done once, and the items that runs set
aside.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "data_0003"
down_revision = None
branch_labels = None
depends_on = None
oldest = "data_0003"

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "batch_checkpoints",
        sa.Column("run", Id, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("cursor", Json),
        sa.Column("count", sa.BigInteger()),
        sa.Column("finished", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("result", Json),
        sa.Column("at", Instant),
        sa.PrimaryKeyConstraint("run", "name"),
    )
    op.create_table(
        "batch_once",
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("run", Id, nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_batch_once_run", "batch_once", ["run"])
    op.create_table(
        "batch_quarantine",
        sa.Column("id", Id, nullable=False),
        sa.Column("run", Id, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("item", sa.String(1000), nullable=False),
        sa.Column("error", Json, nullable=False),
        sa.Column("times", sa.Integer(), nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.Column("redriven_by", Id),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run", "item"),
    )
