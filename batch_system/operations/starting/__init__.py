"""Starts runs: which tasks can be started, and backfills of their slots."""
