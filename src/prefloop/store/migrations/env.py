"""Runs the migrations on the connection that the store hands over, in its one transaction."""

from alembic import context

from prefloop.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True, render_as_batch=True)
context.run_migrations()
