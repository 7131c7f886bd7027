"""The models, queries and migrations of this clone's own application."""
