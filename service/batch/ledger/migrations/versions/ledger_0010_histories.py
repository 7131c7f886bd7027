"""Changes no table. It makes older code refuse this ledger, since that code also migrates the tables of the
application database.

Since this revision those tables have their own history, in the application database (batch_data_alembic_version).
"""

revision = "ledger_0010"
down_revision = "ledger_0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
