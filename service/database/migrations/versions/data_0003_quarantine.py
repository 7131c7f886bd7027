"""Items that a run set aside: beside the authors' data, since they commit with it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "data_0003"
down_revision = "data_0002"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "batch_quarantine",
        sa.Column("id", Id, primary_key=True),
        sa.Column("run", Id, nullable=False),
        sa.Column("task", sa.String(length=100), nullable=False),
        sa.Column("item", sa.String(length=1000), nullable=False),
        sa.Column("error", Json, nullable=False),
        sa.Column("times", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("redriven_by", Id, nullable=True),
        sa.UniqueConstraint("run", "item"),
    )
