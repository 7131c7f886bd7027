"""Starts that are committed with the authors' data, and then handed over to the ledger."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "data_0005"
down_revision = "data_0004"
branch_labels = None
depends_on = None
oldest = "data_0004"

Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "batch_starts",
        sa.Column("number", Number, sa.Identity(), primary_key=True),
        sa.Column("id", Id, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("follow_up", Id),
        sa.Column("run", Json, nullable=False),
    )
    op.create_index("ix_batch_starts_follow_up", "batch_starts", ["follow_up", "number"])
