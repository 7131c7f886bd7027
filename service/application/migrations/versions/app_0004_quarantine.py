"""Makes nothing. The tables that it made are those of the history data_… (service/database/migrations).

It stays, because databases are at this revision, and later migrations of a clone may follow it.
"""

revision = "app_0004"
down_revision = "app_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
