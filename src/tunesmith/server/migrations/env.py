"""Brings a database to the present form; called by the store, which gives its connection."""

from __future__ import annotations

from alembic import context

from tunesmith.server.store import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
context.run_migrations()
