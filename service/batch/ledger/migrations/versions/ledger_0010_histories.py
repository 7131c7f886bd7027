"""Changes no table. Older code is refused from here on: it takes the tables beside the authors' data for its own.

Since this revision those tables have a history of their own, in the application's database
(batch_data_alembic_version).
"""

revision = "ledger_0010"
down_revision = "ledger_0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
