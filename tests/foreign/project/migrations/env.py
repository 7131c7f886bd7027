"""As `alembic init` writes it, in short, with our tables left out."""

import os

from alembic import context
from shop.models import SCHEMA, Base
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from batch_system.database import include_object

with create_engine(os.environ["ALEMBIC_URL"], poolclass=NullPool).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=None if os.environ.get("FORGETS_US") else include_object,
        include_schemas=SCHEMA is not None,
        version_table_schema=SCHEMA,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
