"""How the author has written an expression with `H`, and the dates that schedules leave out."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0031"
down_revision = "ledger_0030"
branch_labels = None
depends_on = None
oldest = "ledger_0027"

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("batch_schedules", sa.Column("given", sa.Text))
    op.create_table(
        "batch_calendars",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dates", Json, nullable=False),
        sa.Column("weekend", Json, nullable=False),
        sa.Column("until", sa.String(10)),
    )
