"""orders"""

import sqlalchemy as sa
from alembic import op
from shop.models import SCHEMA

revision = "5f3a9c0d"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "batch_orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        schema=SCHEMA,
    )


def downgrade() -> None:
    op.drop_table("batch_orders", schema=SCHEMA)
