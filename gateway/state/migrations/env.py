"""What Alembic runs: our migrations, in the transaction of whoever opens the database."""

from alembic import context

from gateway.state.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
